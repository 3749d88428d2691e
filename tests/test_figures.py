"""The operator's view: for administrators alone, and as true as `/metrics`."""

import asyncio
import json
from collections.abc import Iterator
from typing import cast

import pytest

from app.figures import Figures
from app.log import Log
from app.metrics import Metrics
from tests.live import Site, ask, metrics
from tests.signing import SECRET, bearer, token
from tests.test_hub import Bench
from tests.test_runs import reading

JWT = {"auth": "jwt", "jwt_secret": SECRET}


@pytest.fixture(scope="module")
def pair(require) -> Iterator[list]:
    require("redis-server", "valkey-server")
    with Site() as site:
        server = site.redis()
        yield [site.app(server, **JWT), site.app(server, **JWT, handoff="off")]


@pytest.mark.parametrize("who", [0, 1], ids=["handoff", "generator"])
async def test_all_processes_as_in_their_metrics(pair, who):
    """
    Whichever process is asked, the figures of all come, each as that process's own `/metrics` has it.
    """
    headers = bearer(token(admin=True))
    async with reading(pair[who], path="/operator/events", headers=headers) as stream:
        await stream.until(lambda s: len({json.loads(event.data)["process"] for event in s.events}) == len(pair))
        count = len(stream.events)
        await stream.until(lambda s: len(s.events) >= count + 4)
        told = {json.loads(event.data)["process"]: json.loads(event.data)["samples"] for event in stream.events}
        for app in pair:
            said = await metrics(app)
            process = (await ask(app.port, "GET", "/healthz")).json["process"]
            for name in ("sse_streams_open", "sse_streams_opened_total", 'sse_streams_ended_total{reason="max_age"}'):
                assert said[name] == told[process][name], name


def test_slow_watcher():
    """
    Figures do not gather in memory for one that does not read; it is given those of the moment, when it does.
    """
    bench = Bench()
    figures = Figures("p", cast(Metrics, None), bench.hub, cast(Log, None))
    stream, sink = bench.open()
    figures.watch(stream)
    figures.heed_figures({"figures": "1"})
    sink.room = 0
    for number in range(2, 100):
        figures.heed_figures({"figures": str(number)})
    sink.room, sink.rest = None, 0
    bench.hub.writable(stream)
    bench.hub.pump()
    figures.heed_figures({"figures": "100"})

    assert ["1", "2", "100"] == [event.data for event in sink.told if event.event == "operator.figures"]


async def test_administrators_alone(pair):
    """
    A token without `admin` sees no figures.
    """
    answers = await asyncio.gather(
        *(
            ask(pair[0].port, "GET", "/operator/events", headers=headers)
            for headers in ({}, bearer(token(subscribe=["*"], publish=["*"])))
        )
    )

    assert [401, 403] == [answer.status for answer in answers]


async def test_runs_need_rights(pair):
    """
    To start a run needs a right to its kind; to read one, to have started it or a right to its topic.
    """
    body = {"kind": "chat", "prompt": "Hello", "max_tokens": 1}
    statuses = {}
    for pattern in ("orders/*", "*", "run:task"):
        async with reading(pair[0], body=body, headers=bearer(token("alice", publish=[pattern]))) as refused:
            statuses[pattern] = refused.status
    assert {"orders/*": 403, "*": 403, "run:task": 403} == statuses
    async with reading(pair[0], body=body, headers=bearer(token("alice", publish=["run:chat"]))) as made:
        await made.until_ended()
    run = made.run
    statuses = {}
    for name, who in {
        "its maker": token("alice"),
        "another": token("bob"),
        "one with the right to all that is not private": token("bob", subscribe=["*"]),
        "one with the right": token("bob", subscribe=["run:*"]),
    }.items():
        statuses[name] = (await ask(pair[1].port, "HEAD", f"/runs/{run}/events", headers=bearer(who))).status
    cancel = await ask(pair[1].port, "DELETE", f"/runs/{run}", headers=bearer(token("bob", subscribe=["run:*"])))

    assert 200 == made.status
    assert {
        "its maker": 200,
        "another": 403,
        "one with the right to all that is not private": 403,
        "one with the right": 200,
    } == statuses
    assert 403 == cancel.status


@pytest.mark.parametrize("who", [0, 1], ids=["handoff", "generator"])
async def test_runs_are_private(pair, who):
    """
    No prefix carries what somebody asked a model for, live or replayed, unless it begins with `run:`.
    """
    app = pair[who]
    all_of_it, named = bearer(token("bob", subscribe=["*"])), bearer(token("bob", subscribe=["run:*"]))
    body = {"kind": "chat", "prompt": "Hello", "max_tokens": 1}
    assert 403 == (await ask(app.port, "HEAD", "/events?topic=run:*", headers=all_of_it)).status
    async with (
        reading(app, path="/events?topic=*&topic=r*&topic=run*", headers=all_of_it) as live,
        reading(app, path="/events?topic=run:*", headers=named) as allowed,
    ):
        await asyncio.gather(live.until_open(), allowed.until_open())
        position = live.position
        async with reading(app, body=body, headers=bearer(token("alice", publish=["run:chat"]))) as made:
            await made.until_ended()
        await allowed.until(lambda s: s.told("run.done"))
        last = await ask(
            app.port,
            "POST",
            "/publish",
            headers={"Content-Type": "application/json"} | bearer(token(publish=["*"])),
            body=b'{"topics": ["running"], "data": "last"}',
        )
        assert 201 == last.status
        await live.until(lambda s: "last" in s.data)
    async with reading(
        app, path="/events?topic=*&topic=r*&topic=run*", headers=all_of_it, last_event_id=position
    ) as replayed:
        await replayed.until(lambda s: "last" in s.data)

    assert ["last"] == live.data == replayed.data
    assert ["run.token", "run.done"] == [event.event for event in allowed.events]


@pytest.mark.parametrize("by", [0, 1], ids=["here", "by another process"])
async def test_renewed_by_who_may_see_it(pair, by):
    """
    A token without `admin` does not let the operator's view go on; one with it does.
    """
    async with reading(pair[0], path="/operator/events", headers=bearer(token(admin=True))) as stream:
        await stream.until_open()
        path = f"/streams/{stream.opened['stream']}/token"
        answers = [
            (await ask(pair[by].port, "POST", path, headers=bearer(token(admin=admin)))).status for admin in (False, True)
        ]

    assert [403, 200] == answers


@pytest.mark.parametrize("by", [0, 1], ids=["here", "by another process"])
async def test_runs_renewed_by_their_makers(pair, by):
    """
    Whoever started a run renews its stream with a token that names no run, as they read it with one.
    """
    body = {"kind": "chat", "prompt": "Hello " * 200}
    async with reading(pair[0], body=body, headers=bearer(token("alice", publish=["run:chat"]))) as own:
        await own.until_open()
        headers = bearer(token("bob", subscribe=["run:*"]))
        async with reading(pair[0], path=f"/runs/{own.run}/events", headers=headers) as other:
            await other.until_open()
            answers = [
                (await ask(pair[by].port, "POST", path, headers=bearer(token(who)))).status
                for who, path in (
                    ("alice", f"/streams/{own.opened['stream']}/token"),
                    ("bob", f"/streams/{other.opened['stream']}/token"),
                )
            ]
        await ask(pair[0].port, "DELETE", f"/runs/{own.run}", headers=bearer(token("alice")))

    assert [200, 403] == answers
