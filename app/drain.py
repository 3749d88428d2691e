"""
How a process ends: the order, from the signal to the last byte.

1. Readiness is off and new streams get 503: nginx asks another process.
   Publishers are still served, on connections that close after their answer.
2. Every stream is told `stream.draining`, SSE_DRAIN_LEAD_SECONDS before its own
   end, so that a client can open its successor first.
3. The streams end, in random order, spread over SSE_DRAIN_SECONDS. Their clients
   come back at once: the ends are spread already.
4. The runs that this process makes come to their end meanwhile, or within
   SSE_RUN_FINISH_SECONDS; their readers go on elsewhere.
5. What slow clients have not taken is cut.
6. Requests are answered, then Hypercorn ends: `app.server`.
7. Reader and log are let go of last: `Kit.stop`.
"""

import asyncio

from app import handoff
from app.event import encode
from app.kit import Kit
from app.stream import ENDED, Stream

# Between two looks at the clock, where many streams are due at once.
_STRIDE = 32


async def drain(kit: Kit) -> None:
    """End all streams, spread over SSE_DRAIN_SECONDS; steps 1 to 5."""
    settings, hub = kit.settings, kit.hub
    clock = asyncio.get_running_loop().time
    began = clock()
    finishing = asyncio.ensure_future(kit.runs.finish(settings.drain_seconds + settings.run_finish_seconds))
    kit.draining = True  # from here on the door refuses streams, and /readyz says no
    streams = list(hub.streams.values())
    hub.random.shuffle(streams)
    kit.logger.info("draining", streams=len(streams), seconds=settings.drain_seconds)
    lead = min(settings.drain_lead_seconds, settings.drain_seconds)
    # Told one by one too: clients that open a successor would else all do so in
    # the same second.
    each = (settings.drain_seconds - lead) / max(1, len(streams))
    warning = encode(event="stream.draining", data=f'{{"seconds": {lead:g}}}')
    told = past = ended = in_flight = 0

    def end(stream: Stream) -> None:
        nonlocal ended, in_flight
        if stream.state is not ENDED:
            ended += 1
            in_flight += hub.owed(stream)
            hub.end(stream, "draining", hub.farewell(0, 250))

    while past < len(streams):
        now = clock() - began
        if told < len(streams) and now >= told * each:
            hub.tell(streams[told], warning)
            told += 1
        if past < told and now >= lead + past * each:
            end(streams[past])
            past += 1
            if past == len(streams):
                break  # nobody is left to spread
        due = min(lead + past * each, told * each if told < len(streams) else lead + settings.drain_seconds)
        wait = due - (clock() - began)
        if wait > 0.001:
            await asyncio.sleep(wait)
        elif (told + past) % _STRIDE == 0:
            await asyncio.sleep(0)
    # Streams that slipped in between the last check at the door and now.
    for stream in list(hub.streams.values()):
        end(stream)
    await finishing
    await handoff.all_closed()
    kit.logger.info(
        "drained",
        streams=ended,
        # Not written before the end; their clients read them elsewhere.
        events_in_flight=in_flight,
        seconds=round(clock() - began, 3),
    )
