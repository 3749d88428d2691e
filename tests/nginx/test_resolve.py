"""
upstream.conf in its `resolve` form: a name is followed without a reload.

Processes stand on addresses of their own with one port, as pods do: loopback
has 127.0.0.0/8 for that, and where packets must get lost, network namespaces.
The name server is the test's own.
"""

import asyncio
import contextlib
import ctypes
import socket
import subprocess
import threading

import pytest

from app.stack import ROOT
from tests import live
from tests.crowd import becomes
from tests.faults.parts import Network
from tests.nginx.conftest import NATIVE, Toy, reload, workers
from tests.nginx.names import NXDOMAIN, SERVFAIL, NameServer
from tests.nginx.ways import Way, way

NAME = "app-headless.kit.svc.cluster.local"


def printed(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "nginx/upstream.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def following(server: NameServer, port: int) -> dict[str, str]:
    """Return upstream.conf as generated, but looking every second."""
    text = printed("resolve", f"{NAME}:{port}", f"127.0.0.1:{server.port}").stdout
    assert "valid=5s" in text
    return {"upstream.conf": text.replace("valid=5s", "valid=1s").replace("resolver_timeout 2s", "resolver_timeout 1s")}


async def addresses(toys, base: int) -> list:
    """Start four toys on four addresses and one port."""
    first, *_ = await toys(addresses=(f"127.{base}.0.1",))
    rest = await toys(addresses=tuple(f"127.{base}.0.{number}" for number in (2, 3, 4)), port=first.port)
    for toy in (all_four := [first, *rest]):
        toy.status_body = toy.address.encode()
    return all_four


async def reached(client: Way) -> tuple[set[str], set[int]]:
    """Return who answers 24 users' requests now, and the statuses."""
    found, statuses = set(), set()
    for user in range(24):
        answer = await client.ask(f"/publish?user={user}", method="POST", body=b"{}")
        body = (await answer.whole()).decode()
        statuses.add(answer.status)
        found.add(body if answer.status == 200 else "")
    return found, statuses


async def becomes_reached(client: Way, wanted: set[str]) -> None:
    async def are_reached() -> bool:
        return (await reached(client))[0] == wanted

    await live.becomes(are_reached, f"{wanted} and no other")


class TestFollowing:
    async def test_a_changing_set(self, nginx, toys, way_name):
        """New streams go to the new addresses, old ones live on, and no worker is replaced."""
        four = await addresses(toys, 61 + ["plain", "tls", "h2"].index(way_name))
        names = await NameServer.start(four[0].address, four[1].address)
        front = nginx([], way=way_name, files=following(names, four[0].port))
        async with way(way_name, front.port) as client:
            await becomes_reached(client, {four[0].address, four[1].address})
            before = workers(front)
            streams = [await client.ask(f"/events?user={user}", NATIVE) for user in range(12)]
            assert 12 == four[0].open + four[1].open
            assert {200} == {stream.status for stream in streams}

            names.addresses = [four[2].address, four[3].address]
            await becomes_reached(client, {four[2].address, four[3].address})
            new = [await client.ask(f"/events?user={user}", NATIVE) for user in range(12)]

            assert 12 == four[2].open + four[3].open
            for toy in four:
                toy.say(b"data: x\n\n")
            for stream in (*streams, *new):
                await stream.until(lambda s: s.data == ["x"])
                assert not stream.ended
        assert before == workers(front)
        assert {NAME} == set(names.asked)
        names.close()

    async def test_one_user_one_address(self, nginx, toys):
        """Stickiness behind a name has a form of its own; the usual one would go round."""
        four = await addresses(toys, 69)
        names = await NameServer.start(*[toy.address for toy in four])
        front = nginx([], files=following(names, four[0].port))
        usual = front.prefix / "snippets/sse-sticky.conf"

        async def places() -> list[set[str]]:
            found = []
            async with way("plain", front.port) as client:
                await becomes_reached(client, {toy.address for toy in four})
                for toy in four:
                    toy.answer = 200
                for user in range(16):
                    answers = [await client.ask(f"/events?user={user}") for _ in range(6)]
                    found.append({(await answer.whole()).decode() for answer in answers})
                for toy in four:
                    toy.answer = None
            return found

        went_round = await places()
        usual.write_text((front.prefix / "snippets/sse-sticky.resolve.conf").read_text())
        await reload(front)
        stayed = await places()

        assert any(len(found) > 1 for found in went_round)
        assert all(len(found) == 1 for found in stayed), stayed
        assert 4 == len(set().union(*stayed))
        names.close()

    @pytest.mark.parametrize("trouble", ["servfail", "dead"])
    async def test_no_answer_changes_nothing(self, nginx, toys, trouble):
        """SERVFAIL and a dead name server leave the known addresses in place, as README.md says."""
        four = await addresses(toys, 64 + ["servfail", "dead"].index(trouble))
        names = await NameServer.start(four[0].address)
        front = nginx([], files=following(names, four[0].port))
        async with way("plain", front.port) as client:
            await becomes_reached(client, {four[0].address})
            names.code, names.silent = (SERVFAIL, False) if trouble == "servfail" else (0, True)
            count = len(names.asked)
            await becomes(lambda: len(names.asked) >= count + 3, "questions in vain")

            assert ({four[0].address}, {200}) == await reached(client)

            names.code, names.silent = 0, False
            names.addresses = [four[1].address]
            await becomes_reached(client, {four[1].address})
        names.close()

    async def test_no_such_name(self, nginx, toys):
        """
        NXDOMAIN takes all addresses away: 502, a native EventSource is told to come back; open
        streams go on, and all is well within seconds after the name returns.
        """
        four = await addresses(toys, 66)
        names = await NameServer.start(four[0].address)
        front = nginx([], files=following(names, four[0].port))
        async with way("plain", front.port) as client:
            await becomes_reached(client, {four[0].address})
            stream = await client.ask("/events?user=1", NATIVE)

            names.code = NXDOMAIN
            await becomes_reached(client, {""})
            _, statuses = await reached(client)
            native = await client.ask("/events", NATIVE)
            four[0].say(b"data: x\n\n")

            assert {502} == statuses
            assert (200, "502") == (native.status, native.headers["x-sse-fallback"])
            await stream.until(lambda s: s.data == ["x"])

            names.code = 0
            await becomes_reached(client, {four[0].address})
        names.close()

    async def test_a_start_without_the_name(self, nginx, toys):
        """nginx starts while nobody knows the name, and reaches the processes once somebody does."""
        four = await addresses(toys, 67)
        names = await NameServer.start()
        names.code = NXDOMAIN
        front = nginx([], files=following(names, four[0].port))
        async with way("plain", front.port) as client:
            assert (await reached(client))[1] == {502}
            names.code, names.addresses = 0, [four[0].address]
            await becomes_reached(client, {four[0].address})
        names.close()


# Of sched.h.
CLONE_NEWNET = 0x40000000
PORT = 8000


def listener(network: Network) -> socket.socket:
    """Return a listening socket of *network*; a thread alone changes its network, and a socket keeps its own."""
    made: list[socket.socket] = []

    def work() -> None:
        with open(f"/run/netns/{network.name}") as file:  # noqa: PTH123
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.create_server((network.address, PORT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


@contextlib.asynccontextmanager
async def pod(network: Network):
    """Give a toy inside *network*."""
    toy = Toy(address=network.address, port=PORT, status_body=network.address.encode())
    server = await asyncio.start_server(toy.serve, sock=listener(network))
    yield toy
    server.close()
    server.close_clients()


@pytest.fixture
def networks():
    """Three network namespaces, with an address each."""
    if not Network.possible():
        pytest.skip("a network namespace needs root, ip and nft")
    with Network() as a, Network() as b, Network() as c:
        yield a, b, c


class TestPods:
    async def test_that_vanish_and_come(self, nginx, networks):
        """
        Pods in networks of their own, behind one name. One whose packets all get lost costs its
        users proxy_connect_timeout and nothing else, until the name no longer has it; then nothing.
        A new one gets streams. Open streams of the others never end, and nothing is reloaded.
        """
        async with pod(networks[0]) as a, pod(networks[1]) as b, pod(networks[2]) as c:
            names = await NameServer.start(a.address, b.address)
            files = following(names, PORT)
            # A POST into a connection that is kept to a lost pod waits for so long.
            api = (ROOT / "nginx/snippets/sse-api.conf").read_text()
            files["snippets/sse-api.conf"] = api.replace("proxy_read_timeout 15s", "proxy_read_timeout 1s")
            front = nginx([], files=files, directives={"proxy_connect_timeout": "500ms"})
            before, loop = workers(front), asyncio.get_running_loop()
            async with way("plain", front.port) as client:
                await becomes_reached(client, {a.address, b.address})
                streams = [await client.ask(f"/events?user={user}", NATIVE) for user in range(12)]
                assert a.open
                assert b.open
                held = b.open

                with networks[0].cut():
                    began = loop.time()
                    late = [await client.ask(f"/events?user={user}", NATIVE) for user in range(12)]
                    assert {(200, None)} == {(s.status, s.headers.get("x-sse-fallback")) for s in late}
                    assert b.open == held + 12
                    assert loop.time() - began > 0.4  # some of them had to wait

                    names.addresses = [b.address, c.address]
                    await becomes_reached(client, {b.address, c.address})
                    new = [await client.ask(f"/events?user={user}", NATIVE) for user in range(12)]
                    assert c.open
                    assert b.open + c.open == held + 24

                    b.say(b"data: x\n\n")
                    c.say(b"data: x\n\n")
                    for stream in (*late, *new):
                        await stream.until(lambda s: s.data == ["x"])
                    assert held == sum(stream.data == ["x"] for stream in streams)
            assert before == workers(front)
            names.close()


class TestGenerator:
    def test_static(self):
        """One line per process, none of which is ever marked failed."""
        run = printed("static", "10.0.0.5:8000", "[2001:db8::5]:8000", "app-1.example:8000")

        assert 3 == run.stdout.count("max_fails=0;")
        assert "server [2001:db8::5]:8000 max_fails=0;" in run.stdout.splitlines()

    def test_a_pods_resolv_conf(self, tmp_path):
        """In Kubernetes a Service's bare name is completed, because nginx knows no search domains."""
        conf = tmp_path / "resolv.conf"
        conf.write_text("search kit.svc.cluster.local svc.cluster.local\nnameserver fd00::a\nnameserver 10.96.0.10\n")

        run = printed("resolve", "app-headless:8000", environment={"RESOLV_CONF": str(conf), "PATH": "/usr/bin:/bin"})

        assert f"server {NAME}:8000 resolve max_fails=0;" in run.stdout
        assert "resolver [fd00::a] valid=5s" in run.stdout

    @pytest.mark.parametrize(
        ("given", "written"),
        [("10.96.0.10", "10.96.0.10"), ("127.0.0.1:5353", "127.0.0.1:5353"), ("fd00::a", "[fd00::a]"), ("[fd00::a]:53", "[fd00::a]:53")],
    )
    def test_a_name_server(self, given, written):
        """A name server is an address, perhaps with a port; IPv6 may be written with and without brackets."""
        assert f"resolver {written} valid=5s" in printed("resolve", f"{NAME}:8000", given).stdout

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ((), "The form must be static or resolve"),
            (("static",), "at least one process"),
            (("static", "no-port"), "HOST:PORT must be a host and a port, got 'no-port'"),
            (("static", "a:1; evil on"), "HOST:PORT must be"),
            (("resolve", "a.b:80", "1.1.1.1", "more"), "got 3 arguments"),
            (("resolve", "a.b:80", "1.1.1.1; evil on"), "SERVER must be ADDRESS or ADDRESS:PORT, got"),
        ],
    )
    def test_bad_input(self, arguments, says):
        """A wrong argument is one line, and nothing on standard output that could become a file."""
        run = printed(*arguments)

        assert (2, "") == (run.returncode, run.stdout)
        assert says in run.stderr
        assert 1 == run.stderr.count("\n")
