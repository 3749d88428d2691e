"""
Runs: topics with an end. What this process makes, tells its readers, and ends.

A run's events are entries of the log like all others, so any process serves
them, and a reader who was cut off goes on by id. The process that accepted the
run makes it, and writes each event once, in order, however often the log has to
be asked. The last event is `run.done` or `run.failed`, always: a process that
drains finishes its runs first, and the runs of one that died are declared
failed by the others, within `LIVE_SECONDS` and a little.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog

from app.event import RUN_TOPICS, Draft
from app.log import Batch, IdempotencyConflict, Log, LogUnavailable
from app.metrics import Tally
from app.register import LIVE_SECONDS, LOOK_SECONDS, Record, Register

# Text that waits for the log before its maker has to wait, in characters.
_MOST_WAITING = 65_536
# One event's text at most, in characters; JSON can make twelve bytes of each (two escapes).
_MOST_TEXT = 8_000
# So many runs of which nobody was told whether they were entered are kept in mind, and
# what was entered is declared lost after so many looks, if nobody asked for it again.
_MOST_UNSURE = 1_000
_UNSURE_LOOKS = 5
# Progress is for people: no more often than this.
_PROGRESS_SECONDS = 0.1


class RunFailure(Exception):
    """
    A run cannot go on; readers are told by `run.failed`.

    Attributes:
        reason: one word, for programs and metrics.
        name: what was wrong; with rule, value and cure as in every problem.
    """

    def __init__(self, reason: str, name: str, rule: str, value: object, cure: str) -> None:
        super().__init__(f"{name} {rule}")
        self.reason = reason
        self.fields = {
            "reason": reason,
            "detail": f"{name} {rule}. {cure}",
            "name": name,
            "rule": rule,
            "value": value if isinstance(value, int | float | None) else str(value)[:200],
            "cure": cure,
        }


class Teller:
    """
    What the maker of a run tells its readers.

    Tokens are put together while the log takes the ones before: none waits for
    a clock, and a fast model does not make an event of every syllable.
    """

    def __init__(self, most_text: int = _MOST_TEXT) -> None:
        self._most_text = most_text
        self._text: list[str] = []
        self._size = 0
        self._progress: dict[str, Any] | None = None
        self._told = asyncio.Event()
        self._room = asyncio.Event()
        self._over = False

    async def token(self, text: str) -> None:
        """Append *text* to what the readers see; waits while the log is far behind."""
        most = self._most_text
        self._text += [text[at : at + most] for at in range(0, len(text), most)]
        self._size += len(text)
        self._told.set()
        while self._size > _MOST_WAITING and not self._over:
            self._room.clear()
            await self._room.wait()

    async def progress(self, percent: float | None, stage: str, **facts: Any) -> None:
        """
        Tell how far the work is, 0 to 100 or None for unknown, and what is being done.

        Raises:
            TypeError, ValueError: the facts are no JSON.
        """
        told = {"percent": None if percent is None else round(percent, 1), "stage": stage, **facts}
        # Here, where its maker sees what was wrong.
        json.dumps(told, allow_nan=False)
        self._progress = told
        self._told.set()
        await asyncio.sleep(0)

    def end(self) -> None:
        """Nothing more comes."""
        self._over = True
        self._told.set()

    async def write(self, publish: Callable[[list[tuple[str, Any]]], Awaitable[None]]) -> None:
        """Hand over to *publish* what was told, in order, until the end."""
        while True:
            await self._told.wait()
            self._told.clear()
            events: list[tuple[str, Any]] = [("run.token", {"text": text}) for text in self._take()]
            if self._progress is not None:
                events.append(("run.progress", self._progress))
                self._progress = None
            over = self._over
            if events:
                await publish(events)
                if events[-1][0] == "run.progress" and not over:
                    await asyncio.sleep(_PROGRESS_SECONDS)
            if over and not self._text and self._progress is None:
                return
            if over:
                self._told.set()

    def _take(self) -> list[str]:
        texts: list[str] = []
        for text in self._text:
            if texts and len(texts[-1]) + len(text) <= self._most_text:
                texts[-1] += text
            else:
                texts.append(text)
        self._text = []
        self._size = 0
        self._room.set()
        return texts


# What makes a run: tells as it goes, and returns what `run.done` carries.
Work = Callable[[Teller], Awaitable[dict[str, Any]]]


class _Lost(Exception):
    """Others took this process for dead and have ended the run."""


class _Making:
    """One run that this process makes."""

    def __init__(self, record: Record, work: Work, most_text: int) -> None:
        self.record = record
        self.topic = RUN_TOPICS + record.id
        self.work = work
        self.teller = Teller(most_text)
        self.task: asyncio.Task[dict[str, Any]] | None = None
        self.whole: asyncio.Task[None] | None = None
        self.stopped: RunFailure | None = None
        self.batches = 0


class Runs:
    """All runs that this process makes."""

    def __init__(
        self,
        log: Log,
        register: Register,
        process: str,
        tally: Tally,
        *,
        most: int,
        max_seconds: float,
        keep_seconds: float,
        max_event_bytes: int,
        logger: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        self.register = register
        self.most = most
        self._log = log
        self._process = process
        self._tally = tally
        self._max_seconds = max_seconds
        # Records outlive the run's events in the log.
        self._keep_seconds = keep_seconds
        self._max_event_bytes = max_event_bytes
        # A larger event reaches nobody.
        self._most_text = max(1, min(_MOST_TEXT, (max_event_bytes - 20) // 12))
        self._logger = logger or structlog.get_logger()
        self._making: dict[str, _Making] = {}
        self._orphans: dict[str, Record] = {}
        # Nobody was told whether these were entered; and how often they were looked for since.
        self._unsure: dict[str, tuple[Record, int]] = {}
        self._renewed_at = 0.0
        self._begun = asyncio.Event()  # a run, since the last look

    def __len__(self) -> int:
        return len(self._making)

    async def start(self, record: Record, work: Work) -> Record | None:
        """
        Begin to make a run; return the record of the one that has this id already, if any.

        Raises:
            LogUnavailable: nothing was begun.
        """
        try:
            known = await self.register.start(record, self._max_seconds + self._keep_seconds)
        except BaseException:
            # The log is away, or the client has gone. It may have been entered all the
            # same, and then nobody would ever end it.
            if record.id not in self._making:
                self._unsure[record.id] = record, 0
                if len(self._unsure) > _MOST_UNSURE:
                    del self._unsure[next(iter(self._unsure))]
            raise
        if known is not None:
            if record.id not in self._unsure or known != record or not await self.register.renew():
                return known
            if record.id not in self._unsure:
                return known  # somebody else has begun it meanwhile
        self._unsure.pop(record.id, None)
        self._renewed_at = time.monotonic()
        self._begun.set()
        making = self._making[record.id] = _Making(record, work, self._most_text)
        self._tally.runs_started += 1
        self._tally.runs_open = len(self._making)
        self._logger.info("run_started", run=record.id, kind=record.kind, user=record.user)
        making.whole = asyncio.get_running_loop().create_task(self._make(making), name=f"run {record.id}")
        return None

    def cancel(self, id: str) -> None:
        """Stop the run *id* if this process makes it; its readers are told."""
        self._stop(id, RunFailure("cancelled", "run", "was cancelled", None, "Start another one if you need it."))

    async def look(self) -> None:
        """Stay alive, and end the runs of processes that are not; for ever."""
        while True:
            self._begun.clear()
            makers = True
            try:
                if self._making and await self.register.renew():
                    self._renewed_at = time.monotonic()
                await self._look_for_unsure()
                orphans, makers = await self.register.orphans()
                for record in orphans:
                    self._orphans[record.id] = record
                for record in list(self._orphans.values()):
                    await self._declare_lost(record)
            except LogUnavailable:
                pass  # the reader says so; runs of this process wait in `_publish`
            if not makers:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LIVE_SECONDS - LOOK_SECONDS):
                        await self._begun.wait()
            await asyncio.sleep(LOOK_SECONDS)

    async def finish(self, seconds: float) -> None:
        """Let the runs of this process come to their end, at most *seconds*; then end them."""
        whole = [making.whole for making in self._making.values() if making.whole]
        if whole:
            self._logger.info("runs_finishing", runs=len(whole), seconds=seconds)
            await asyncio.wait(whole, timeout=seconds)
        for id in list(self._making):
            self._stop(
                id,
                RunFailure(
                    "process_ended",
                    "run",
                    f"must end within SSE_DRAIN_SECONDS + SSE_RUN_FINISH_SECONDS ({seconds:g}) when its process shuts down",
                    None,
                    "Start it again; another process makes it.",
                ),
            )
        whole = [making.whole for making in self._making.values() if making.whole]
        if whole:
            await asyncio.wait(whole, timeout=2.0)

    async def close(self) -> None:
        """Let go of everything."""
        for making in list(self._making.values()):
            if making.whole is not None:
                making.whole.cancel()
        await self.register.close()

    # --- inside

    def _stop(self, id: str, failure: RunFailure) -> None:
        making = self._making.get(id)
        if making is not None and making.stopped is None:
            making.stopped = failure
            if making.task is not None:
                making.task.cancel()

    async def _make(self, making: _Making) -> None:
        record, teller = making.record, making.teller
        began = time.monotonic()
        writer = asyncio.ensure_future(teller.write(lambda events: self._publish(making, events)))
        making.task = asyncio.ensure_future(self._within(making))
        if making.stopped is not None:  # before it had its first turn
            making.task.cancel()
        how = "failed"
        try:
            await asyncio.wait([making.task, writer], return_when=asyncio.FIRST_COMPLETED)
            if writer.done():  # it never ends first but by an error
                making.task.cancel()
                writer.result()
            event, data = self._outcome(making)
            teller.end()
            await writer
            how = "done" if event == "run.done" else data["reason"]
            await self._end(record, event, data)
        except _Lost:
            how = "process_lost"
            making.task.cancel()
        except Exception as error:
            how = "internal"
            self._logger.error("run_broken", run=record.id, exc_info=error)
            # Never silence: its readers wait for an end.
            with suppress(_Lost):
                await self._end(record, "run.failed", _fault().fields)
        finally:
            writer.cancel()
            making.task.cancel()
            del self._making[record.id]
            self._tally.runs_open = len(self._making)
            self._tally.runs_ended[how] = self._tally.runs_ended.get(how, 0) + 1
            self._logger.info("run_ended", run=record.id, how=how, seconds=round(time.monotonic() - began, 3))

    async def _within(self, making: _Making) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._max_seconds) as limit:
                return await making.work(making.teller)
        except TimeoutError:
            if not limit.expired():
                raise  # one of the work's own
            raise RunFailure(
                "too_long",
                "run",
                f"must end within SSE_RUN_MAX_SECONDS ({self._max_seconds:g})",
                None,
                "Ask for less, or raise the setting.",
            ) from None

    def _outcome(self, making: _Making) -> tuple[str, dict[str, Any]]:
        """Return the last event of a run whose work has ended."""
        assert making.task is not None
        if making.task.cancelled() or making.stopped is not None:
            failure = making.stopped or RunFailure("cancelled", "run", "was cancelled", None, "Start another one.")
            return "run.failed", failure.fields
        try:
            result = making.task.result()
            size = len(json.dumps(result, allow_nan=False))  # raises where it is no JSON
        except RunFailure as error:
            return "run.failed", error.fields
        except Exception as error:
            self._logger.error("run_failed", run=making.record.id, exc_info=error)
            return "run.failed", _fault().fields
        if size > self._max_event_bytes:
            return "run.failed", RunFailure(
                "too_large",
                "result",
                f"must have at most SSE_MAX_EVENT_BYTES ({self._max_event_bytes}) bytes",
                size,
                "Let the work put it somewhere, and return where.",
            ).fields
        return "run.done", result

    async def _publish(self, making: _Making, events: list[tuple[str, Any]]) -> None:
        """Write *events* to the log, once; as often as it takes, while the run is this process's."""
        making.batches += 1
        drafts = tuple(Draft((making.topic,), json.dumps(data), event) for event, data in events)
        key = f"run:{making.record.id}:{making.batches}"
        await self._until_kept(Batch(drafts, key, Batch.of(drafts).fingerprint, own_key=True))

    async def _end(self, record: Record, event: str, data: dict[str, Any]) -> None:
        """Write the last event of a run, and note it in the register."""
        draft = Draft((RUN_TOPICS + record.id,), json.dumps(data), event)
        # One key for whoever ends it: a run has one end.
        batch = Batch.of([draft])
        batch = Batch(batch.drafts, f"run:{record.id}:end", batch.fingerprint, own_key=False)
        try:
            [id] = await self._until_kept(batch)
        except IdempotencyConflict:
            return
        while True:
            try:
                await self.register.end(record, id, self._keep_seconds)
                return
            except LogUnavailable:
                await asyncio.sleep(LOOK_SECONDS)

    async def _until_kept(self, batch: Batch) -> list[str]:
        while True:
            # A process that was frozen may have been taken for dead meanwhile.
            if self._making and time.monotonic() - self._renewed_at > LIVE_SECONDS / 2:
                try:
                    if not await self.register.renew():
                        raise _Lost
                    self._renewed_at = time.monotonic()
                except LogUnavailable:
                    await asyncio.sleep(LOOK_SECONDS / 4)
                    continue
            try:
                return await self._log.publish(batch)
            except LogUnavailable:
                await asyncio.sleep(LOOK_SECONDS / 4)

    async def _look_for_unsure(self) -> None:
        """Find the runs that were entered, as nobody was told, and that nobody makes."""
        for id, (record, looks) in list(self._unsure.items()):
            known = await self.register.get(id)
            if self._unsure.pop(id, None) is None:
                continue  # it was asked for again meanwhile, and is made
            if known == record and looks >= _UNSURE_LOOKS:
                self._orphans[id] = record
            elif known in (None, record) and looks < 4 * _UNSURE_LOOKS:
                # Whoever started it may ask again; a frozen Redis may enter it after this look.
                self._unsure[id] = record, looks + 1

    async def _declare_lost(self, record: Record) -> None:
        failure = RunFailure(
            "process_lost",
            "process",
            "must live as long as its runs",
            record.process,
            "Start the run again; another process makes it.",
        )
        draft = Draft((RUN_TOPICS + record.id,), json.dumps(failure.fields), "run.failed")
        batch = Batch.of([draft])
        try:
            [id] = await self._log.publish(
                Batch(batch.drafts, f"run:{record.id}:end", batch.fingerprint, own_key=False)
            )
        except IdempotencyConflict:
            id = record.ended or "unknown"  # it had come to its end after all
        await self.register.end(record, id, self._keep_seconds)
        self._orphans.pop(record.id, None)
        self._logger.warning("run_lost", run=record.id, kind=record.kind, maker=record.process)


def _fault() -> RunFailure:
    return RunFailure("internal", "run", "met a fault of its maker", None, "It is logged with the run's id.")
