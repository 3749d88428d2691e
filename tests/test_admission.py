"""A storm of opens lengthens its own wait, and nobody else's."""

import asyncio
import time
from collections.abc import Callable

import pytest

from app.admission import Admission
from tests.live import Answer, Site, ask, becomes, metrics, subscribed


def hold(seconds: float) -> None:
    """Keep the event loop busy, as the steps of an open do."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


class Turns:
    """Counts, turn by turn of the loop, how many opens began in it."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.order: list[int] = []

    async def watch(self) -> None:
        while True:
            self.counts.append(0)
            await asyncio.sleep(0)

    async def open(self, admission: Admission, number: int, seconds: float = 0.0) -> bool:
        let_in = await admission.enter()
        self.counts[-1] += 1
        self.order.append(number)
        hold(seconds)
        return let_in


class TestAdmission:
    async def test_nobody_waits_alone(self):
        """Without a storm an open is let in at once: no turn of the loop is lost."""
        waiting = Admission(10).enter()

        with pytest.raises(StopIteration) as done:
            waiting.send(None)
        assert done.value.value is True

    async def test_a_storm_comes_in_by_turns(self):
        """A thousand at one instant: in their order, and never many in one turn."""
        admission, turns = Admission(60), Turns()
        watching = asyncio.create_task(turns.watch())
        await asyncio.sleep(0)
        await asyncio.gather(*(turns.open(admission, number) for number in range(1_000)))
        watching.cancel()

        assert list(range(1_000)) == turns.order
        # A turn of the counter may see the end of one batch and the begin of the next.
        assert max(turns.counts) <= 64

    async def test_turns_that_take_long_let_in_fewer(self):
        """Opens of 2 ms each: soon no turn takes in more than a few."""
        admission, turns = Admission(60), Turns()
        watching = asyncio.create_task(turns.watch())
        await asyncio.sleep(0)
        await asyncio.gather(*(turns.open(admission, number, 0.002) for number in range(200)))
        watching.cancel()
        later = turns.order[100]
        begun = 0
        busy = []
        for count in turns.counts:
            begun += count
            if begun > later and count:
                busy.append(count)

        assert sum(busy) / len(busy) <= 5
        assert max(busy) <= 12

    async def test_an_open_that_waits_for_others_holds_up_none(self):
        """Opens that never get on, for want of Redis, keep nobody behind them out."""
        admission = Admission(60)
        stuck = asyncio.Event()
        let_in = 0

        async def open_and_wait() -> None:
            nonlocal let_in
            await admission.enter()
            let_in += 1
            await stuck.wait()

        tasks = [asyncio.create_task(open_and_wait()) for _ in range(500)]
        async with asyncio.timeout(10):
            while let_in < 500:  # noqa: ASYNC110
                await asyncio.sleep(0)
        stuck.set()
        await asyncio.gather(*tasks)

    async def test_who_waited_too_long_is_told(self):
        """More than can be served in time: the rest is refused, and the line is empty again."""
        admission, turns = Admission(0.01), Turns()
        turns.counts.append(0)
        answers = await asyncio.gather(*(turns.open(admission, number, 0.002) for number in range(300)))

        assert answers[0]
        assert not answers[-1]
        assert answers.count(False) == admission.refused
        assert 0 == len(admission)
        assert await admission.enter()

    async def test_who_left_the_line_is_passed_over(self):
        """A request that was cancelled while it waited takes nobody's place."""
        admission, turns = Admission(60), Turns()
        turns.counts.append(0)
        tasks = [asyncio.create_task(turns.open(admission, number)) for number in range(200)]
        await asyncio.sleep(0)
        for task in tasks[100:150]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

        assert [*range(100), *range(150, 200)] == turns.order


class TestTheDoor:
    @pytest.mark.parametrize("handoff", ["auto", "off"])
    async def test_opens_that_wait_too_long_get_429(self, handoff: str, require: Callable[..., str]):
        """
        Four hundred opens at one instant, and no patience: some are let in, the others are told when to come.

        A native EventSource reads it as 200 with `retry:`. Afterwards all is as before.
        """
        require("redis-server", "valkey-server")
        with Site() as site:
            app = site.app(site.redis(), open_wait_seconds=0.05, handoff=handoff)
            native = {"Accept": "text/event-stream"}
            answers: list[Answer] = []

            async def storm() -> bool:
                opens = (
                    ask(app.port, "GET", f"/events?topic=t&user=u{n}", headers=native if n % 2 else None)
                    for n in range(400)
                )
                answers.extend(await asyncio.gather(*opens))
                return len({answer.status for answer in answers}) == 2

            # Where clients are slower than the process, it takes more than one.
            await becomes(storm, "a refusal", 60)
            kinds = {(answer.status, answer.headers.get("x-sse-fallback")) for answer in answers}
            refused = next(answer for answer in answers if answer.status == 429)

            assert {(200, None), (200, "429"), (429, None)} == kinds
            assert "urn:sse-kit:process-busy" == refused.json["type"]
            assert refused.headers["retry-after"].isdigit()
            async with subscribed(app, "t") as stream:
                assert stream.opened
            assert 0 == (await metrics(app))["sse_opens_waiting"]
