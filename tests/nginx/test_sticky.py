"""One user, one process; and only its own users move when a process goes."""

import re

import pytest

from tests import live
from tests.nginx.conftest import reload
from tests.nginx.ways import Way, way

USERS = 160


def named(toys) -> None:
    """Let each toy answer with its own name."""
    for number, toy in enumerate(toys):
        toy.answer, toy.status_body = 200, str(number).encode()


async def places(client: Way, path: str = "/events?user={}") -> list[str]:
    """Ask once for each user; return which toy answered."""
    found = []
    for user in range(USERS):
        answer = await client.ask(path.format(user))
        found.append((await answer.whole()).decode())
        answer.close()
    return found


class TestHash:
    async def test_only_its_users_move(self, nginx, toys, way_name):
        """
        Of four processes each has its share of the users, and the same ones again. Without
        one, its users spread over the others, and nobody else moves; with it back, all is as before.
        """
        four = await toys(4)
        named(four)
        front = nginx([toy.server for toy in four], way=way_name)

        async def now(servers) -> list[str]:
            front.servers = [toy.server for toy in servers]
            front.write()
            await reload(front)
            async with way(way_name, front.port) as client:
                return await places(client)

        async with way(way_name, front.port) as client:
            before = await places(client)
            again = await places(client)
        without = await now([four[0], four[1], four[3]])
        back = await now(four)

        shares = [before.count(str(number)) for number in range(4)]
        moved = [(was, now) for was, now in zip(before, without, strict=True) if was != now]
        assert before == again == back
        assert all(USERS / 10 < share < USERS / 2 for share in shares), shares
        assert len(moved) == shares[2]
        assert {"2"} == {was for was, _ in moved}
        assert {"0", "1", "3"} == {now for _, now in moved}

    async def test_a_dead_process(self, nginx, toys):
        """Only the users of a process that does not answer are served by others."""
        three = await toys(3)
        named(three)
        front = nginx([toy.server for toy in three])
        async with way("plain", front.port) as client:
            before = await places(client)
            three[1].answer = "hang up"
            after = await places(client)

        assert all(was == now for was, now in zip(before, after, strict=True) if was != "1")
        assert "1" not in after


class TestCookie:
    async def test_a_browser_comes_back(self, nginx, toys):
        """The other form: nginx names the process in a cookie, which brings the browser back to it."""
        three = await toys(3)
        named(three)
        front = nginx([toy.server for toy in three])
        sticky = (front.prefix / "snippets/sse-sticky-cookie.conf").read_text()
        (front.prefix / "snippets/sse-sticky.conf").write_text(sticky)
        await reload(front)
        async with way("plain", front.port) as client:
            found = set()
            for _ in range(9):
                first = await client.ask("/events")
                place = bytes(await first.whole())
                found.add(place)
                cookie = re.match(r"sse_process=[^;]+", first.headers["set-cookie"])
                for _ in range(3):
                    answer = await client.ask("/events", {"Cookie": cookie[0]})
                    assert place == await answer.whole()

        assert {b"0", b"1", b"2"} == found
        assert "httponly" in first.headers["set-cookie"].lower()


class TestKey:
    @pytest.mark.parametrize("carrier", ["Authorization", "Cookie"])
    async def test_a_token_is_known_by_its_end(self, nginx, toys, carrier):
        """Tokens that differ only in their signature are different users; the zones hold no whole token."""
        three = await toys(3)
        named(three)
        front = nginx([toy.server for toy in three])
        async with way("plain", front.port) as client:
            answers = []
            for number in range(40):
                token = "head." * 400 + f"{number:032}"
                bearer = {carrier: f"Bearer {token}" if carrier == "Authorization" else f"session={token}"}
                answers.append([bytes(await (await client.ask("/events", bearer)).whole()) for _ in range(2)])

        assert all(first == second for first, second in answers)
        assert 3 == len({first for first, _ in answers})
        live.eventually(lambda: "" == front.log())
