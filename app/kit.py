"""
The parts of one process, wired together once.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from random import Random

import structlog

from app.access import Access
from app.admission import Admission
from app.buckets import Buckets
from app.chat import Chat
from app.control import Control
from app.cors import Cors
from app.figures import Figures
from app.hub import Hub, Pace
from app.keys import Keys, UrlKeys, load_keys
from app.leases import Leases
from app.log import Log
from app.memory_log import MemoryLog
from app.metrics import Metrics, Tally
from app.problem import Problem
from app.pulse import Pulse
from app.reader import Reader
from app.redis_leases import RedisLeases
from app.redis_log import RedisLog
from app.redis_register import RedisRegister
from app.redis_tickets import RedisTickets
from app.register import MemoryRegister, Register
from app.runs import Runs
from app.settings import Settings
from app.stream import Stream
from app.task import Tasks
from app.tickets import MemoryTickets, Tickets
from app.tokens import Tokens
from app.window import Window

# A user's tabs come back together after a drain; a bucket holds this many seconds of its rate.
_BURST_SECONDS = 20


class Kit:
    """
    Log, reader, window, hub and their tasks.

    Attributes:
        access: decides who asks, and what they may.
        control: ends and renews streams, wherever they live.
        leases: how many streams each user has, over all processes.
        connects: how often a user may open a stream here.
        publishes: how many events a caller may publish here.
        process: names this process in `stream.open`, in logs and in leases.
        draining: no new streams; the open ones are being ended.
        heed: what to do with each kind of notice, given its fields.
        failed: set when a task of the kit ended that must never end.
        opening: one object for each request that was let in to open a stream and has not yet.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process = secrets.token_hex(3)
        self.draining = False
        self.opening: set[object] = set()
        self.tally = Tally()
        self.logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
        pace = Pace(
            heartbeat=settings.heartbeat_seconds,
            history=settings.history_seconds,
            slow_consumer=settings.slow_consumer_seconds,
            max_age=settings.max_age_seconds,
            expiring=settings.expiring_seconds,
        )
        self.tickets: Tickets = _tickets(settings)
        self.keys: Keys | None = load_keys(settings) if settings.auth == "jwt" else None
        self.cors = Cors(settings.origins())
        self.access = _access(settings, self.keys, self.tickets)
        self.log: Log = _log(settings, pace.retention)
        self.window = Window(settings.window_max_bytes)
        self.hub = Hub(self.window, pace, time.monotonic, Random())
        self.hub.ended = self._ended
        self.heed: dict[str, Callable[[dict[str, str]], None]] = {}
        self.control = Control(
            self.process, self.hub, self.log, self.heed, evicted_seconds=settings.evicted_retry_seconds
        )
        self.leases = _leases(settings, self.process)
        self.leases.end = self.control.end_here
        self.leases.end_coming = self.control.end_coming
        self.heed["evict"] = self.leases.heed_evict
        self.heed["granted"] = self.leases.heed_granted
        self.heed["revoke"] = self.leases.heed_revoke
        self.connects = Buckets(settings.limit_connects_per_user, _BURST_SECONDS * settings.limit_connects_per_user)
        self.publishes = Buckets(settings.limit_publish_per_user, _BURST_SECONDS * settings.limit_publish_per_user)
        self.reader = Reader(
            self.log,
            self.window,
            self.hub,
            check_seconds=min(1.0, settings.history_seconds / 4),
            heed=self.heed,
        )
        self.pulse = Pulse(self.hub)
        self.admission = Admission(settings.open_wait_seconds)
        self.metrics = Metrics(
            self.tally,
            self.hub,
            self.window,
            self.reader,
            self.pulse,
            self.leases,
            max_streams=settings.max_streams,
            line=self.admission,
        )
        self.runs = Runs(
            self.log,
            _register(settings, self.process),
            self.process,
            self.tally,
            most=settings.max_runs,
            max_seconds=settings.run_max_seconds,
            keep_seconds=pace.retention,
            max_event_bytes=settings.max_event_bytes,
        )
        self.figures = Figures(self.process, self.metrics, self.hub, self.log)
        self.heed["watch"] = self.figures.heed_watch
        self.heed["figures"] = self.figures.heed_figures
        self.heed["cancel"] = lambda fields: self.runs.cancel(fields.get("run", ""))
        self.chat = Chat(
            settings.llm_base_url, settings.llm_model, settings.llm_api_key(), settings.llm_silence_seconds
        )
        self.tasks = Tasks(settings.task_root, settings.task_modules)
        self.failed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._streams = 0

    def start(self) -> None:
        """Start following the log; call it in the event loop that serves."""
        works = [("reader", self.reader.run()), ("pulse", self.pulse.run()), ("runs", self.runs.look())]
        works.append(("figures", self.figures.run()))
        if isinstance(self.keys, UrlKeys):
            works.append(("keys", self.keys.run()))
        if self.settings.redis_url:
            works.append(("leases", self.leases.run()))
        for name, work in works:
            task = asyncio.get_running_loop().create_task(work, name=name)
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    async def stop(self) -> None:
        """Stop following the log, and let go of it. The streams have ended before."""
        for stream in list(self.hub.streams.values()):
            self.hub.cut(stream, "draining")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.leases.stop()
        await self.tickets.close()
        await self.runs.close()
        await self.chat.close()
        await self.log.close()
        self.metrics.close()

    def next_stream_id(self) -> str:
        """Return an id that no other stream of any process has."""
        self._streams += 1
        return f"{self.process}-{self._streams}"

    def ended_here(self, stream: Stream) -> None:
        """Give back the place of *stream*: all that it was to write is on its way."""
        self.leases.release(stream.id)

    def refusal(self) -> Problem | None:
        """Return why no new stream can be opened now, or None."""
        if self.draining:
            return Problem(
                503,
                "draining",
                "process",
                "is shutting down",
                self.process,
                "Connect again; another process answers.",
                {"Retry-After": "0"},
            )
        if not self.reader.loaded:
            return Problem(
                503,
                "loading",
                "process",
                "has not loaded the log yet",
                self.process,
                "Connect again in a second.",
                {"Retry-After": "1"},
            )
        # With those on their way, or a crowd that waits for something would all get in.
        streams = len(self.hub) + len(self.opening)
        if streams >= self.settings.max_streams:
            return Problem(
                429,
                "process-full",
                "streams of this process",
                f"must be at most SSE_MAX_STREAMS ({self.settings.max_streams})",
                streams,
                "Connect again later, or run more processes.",
                {"Retry-After": "5"},
            )
        return None

    async def admitted(self) -> Problem | None:
        """Return when a stream may be opened, or why none can be."""
        problem = self.refusal()
        if problem is None and not await self.admission.enter():
            return Problem(
                429,
                "process-busy",
                "opens that wait",
                f"must begin within SSE_OPEN_WAIT_SECONDS ({self.settings.open_wait_seconds:g})",
                len(self.admission),
                "Connect again later, or run more processes.",
                {"Retry-After": "5"},
            )
        # What holds now, and not when the wait began.
        return problem or self.refusal()

    async def unready(self) -> str | None:
        """
        Return why this process should get no requests, or None.

        Only what is local counts: a Redis that is away for all must not make
        every process unready at once.
        """
        if self.draining:
            return "draining"
        if not self.reader.loaded:
            return "loading the log" if self.reader.connected else "waiting for the log"
        silent = time.monotonic() - self.reader.progress_at
        if silent > 4 * self.settings.redis_timeout_seconds + 2 and await self.log.ping():
            return f"reader stuck for {silent:.0f} s while the log answers others"
        return None

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled():
            self.logger.critical(
                "task_failed", task=task.get_name(), exc_info=task.exception(), cure="The process ends; start it again."
            )
            self.failed.set()

    def _ended(self, stream: Stream) -> None:
        # Another version of the kit, in a notice, may know other reasons.
        self.tally.ended[stream.reason] = self.tally.ended.get(stream.reason, 0) + 1
        self.tally.replays.observe(stream.replayed)
        self.logger.info(
            "stream_ended",
            # Not the context's: any task may be the one that ends a stream.
            request_id=stream.request_id,
            stream=stream.id,
            user=stream.user,
            reason=stream.reason,
            seconds=round(time.monotonic() - stream.opened_at, 3),
            events=stream.events,
            bytes=stream.bytes,
            replayed=stream.replayed,
        )


def _register(settings: Settings, process: str) -> Register:
    if settings.redis_url:
        return RedisRegister(
            settings.redis_url, process, prefix=settings.key_prefix, timeout_seconds=settings.redis_timeout_seconds
        )
    return MemoryRegister()


def _log(settings: Settings, history_seconds: float) -> Log:
    if settings.redis_url:
        return RedisLog(
            settings.redis_url,
            prefix=settings.key_prefix,
            history_seconds=history_seconds,
            max_events=settings.log_max_events,
            timeout_seconds=settings.redis_timeout_seconds,
            publish_timeout_seconds=settings.publish_timeout_seconds,
            wait_replicas=settings.publish_wait_replicas,
            idempotency_seconds=settings.idempotency_seconds,
            # A process that was cut off reads what it missed; streams of before
            # a longer absence have ended by their age.
            control_seconds=settings.max_age_seconds + 60,
            max_topics=settings.max_topics,
            max_event_bytes=settings.max_event_bytes,
        )
    return MemoryLog(
        history_seconds=history_seconds,
        max_events=settings.log_max_events,
        idempotency_seconds=settings.idempotency_seconds,
    )


def _leases(settings: Settings, process: str) -> Leases:
    store = None
    if settings.redis_url:
        store = RedisLeases(
            settings.redis_url,
            process,
            prefix=settings.key_prefix,
            limit=settings.limit_streams_per_user,
            lease_seconds=settings.lease_seconds,
            max_age_seconds=settings.max_age_seconds,
            timeout_seconds=settings.redis_timeout_seconds,
        )
    return Leases(
        process,
        limit=settings.limit_streams_per_user,
        evicts=settings.limit_policy == "evict",
        store=store,
        lease_seconds=settings.lease_seconds,
    )


def _tickets(settings: Settings) -> Tickets:
    use, longest = settings.ticket_use_seconds, settings.ticket_max_seconds
    if not settings.redis_url:
        return MemoryTickets(use, longest)
    return RedisTickets(
        settings.redis_url,
        prefix=settings.key_prefix,
        use_seconds=use,
        max_seconds=longest,
        timeout_seconds=settings.redis_timeout_seconds,
    )


def _access(settings: Settings, keys: Keys | None, tickets: Tickets) -> Access:
    tokens = keys and Tokens(
        keys,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        leeway=settings.jwt_leeway_seconds,
    )
    return Access(tokens.caller if tokens else None, tickets.find, settings.origins())
