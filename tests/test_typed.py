"""Events with types: what a type checker believes of an event is what arrives, or is refused by name."""

import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from app.client import StreamReset, listen, run
from app.event import encode
from app.parser import Parser
from app.typed import RUN_EVENTS, Done, Events, Progress, Token, Typed, WrongData
from tests.scripted_server import serving, stream

ROOT = Path(__file__).parent.parent


class Size(Enum):
    SMALL = "s"
    LARGE = "l"


@dataclass
class Item:
    name: str
    price: float
    size: Size = Size.SMALL


@dataclass(frozen=True, slots=True)
class Created:
    id: int
    items: list[Item] = field(default_factory=list)
    state: Literal["new", "paid"] = "new"
    note: str | None = None
    more: dict[str, int] = field(default_factory=dict)


@dataclass
class Tree:
    children: list["Tree"]


class Renamed(TypedDict):
    name: str
    before: NotRequired[str]


def sent(data: Any, name: str = "created") -> Any:
    """Return an event as it comes."""
    return stream_of(encode(id="e:1", event=name, data=data if isinstance(data, str) else json.dumps(data)))[0]


def stream_of(*blocks: bytes) -> list[Any]:
    return Parser().feed(b"".join(blocks))


class TestDecode:
    @pytest.mark.parametrize(
        ("kind", "data", "made"),
        [
            (str, "7", "7"),
            (str, {"a": 1}, '{"a": 1}'),
            (int, 7, 7),
            (float, 7, 7),
            (float, 0.5, 0.5),
            (bool, True, True),
            (list, [1, "a"], [1, "a"]),
            (dict, {"a": [1]}, {"a": [1]}),
            (Created, {"id": 7}, Created(7)),
            (
                Created,
                {"id": 7, "items": [{"name": "a", "price": 2, "size": "l"}], "state": "paid", "note": "x", "more": {"b": 1}},
                Created(7, [Item("a", 2, Size.LARGE)], "paid", "x", {"b": 1}),
            ),
            (Created, {"id": 7, "note": None, "of a later version": True}, Created(7)),
            (Tree, {"children": [{"children": []}]}, Tree([Tree([])])),
            (Renamed, {"name": "a"}, {"name": "a"}),
            (Renamed, {"name": "a", "before": "b", "other": 1}, {"name": "a", "before": "b", "other": 1}),
            (lambda data: data["id"] + 1, {"id": 7}, 8),
            (lambda data: data, "no JSON", "no JSON"),
            (Created | None, None, None),
        ],
    )
    def test_made(self, kind, data, made):
        """Data becomes what its name promises, under the name and the id that it came with."""
        assert Typed("created", made, "e:1") == Events().on("created", kind).decode(sent(data))

    @pytest.mark.parametrize(
        ("kind", "data", "name", "rule"),
        [
            (int, "7 apples", "created", "must be JSON"),
            (int, 7.5, "created", "must be a whole number"),
            (int, True, "created", "must be a whole number"),
            (float, True, "created", "must be a number"),
            (bool, 1, "created", "must be true or false"),
            (Created, [7], "created", "must be an object"),
            (Created, {}, "created.id", "must be there"),
            (Created, {"id": "7"}, "created.id", "must be a whole number"),
            (Created, {"id": 7, "items": {}}, "created.items", "must be a list"),
            (Created, {"id": 7, "items": [{"name": "a", "price": 1}, {"name": 1}]}, "created.items[1].price", "must be there"),
            (Created, {"id": 7, "items": [{"name": "a", "price": 1, "size": "xl"}]}, "created.items[0].size", "must be one of"),
            (Created, {"id": 7, "state": "gone"}, "created.state", "must be one of 'new', 'paid'"),
            (Created, {"id": 7, "note": 1}, "created.note", "must be str | None"),
            (Created, {"id": 7, "more": {"a": "b"}}, "created.more.a", "must be a whole number"),
            (Renamed, {}, "created.name", "must be there"),
            (Renamed, {"name": "a", "before": None}, "created.before", "must be a string"),
            (Tree, {"children": [{"children": [1]}]}, "created.children[0].children[0]", "must be an object"),
            (lambda data: Item(**data), {"b": 1}, "created", "must be what its type takes"),
        ],
    )
    def test_wrong(self, kind, data, name, rule):
        """What it does not promise is refused, with the field, the rule, the value, and the event itself."""
        event = sent(data)

        with pytest.raises(WrongData) as wrong:
            Events().on("created", kind).decode(event)

        assert name == wrong.value.name
        assert wrong.value.rule.startswith(rule)
        assert event is wrong.value.event
        assert wrong.value.cure in str(wrong.value)

    def test_name_that_was_not_given(self):
        """An event of another name comes as it was: nothing is hidden."""
        event = sent("text", "other")

        assert event is Events().on("created", Created).decode(event)

    def test_each_is_a_new_one(self):
        """What is made from common events does not change them."""
        common = Events().on("created", Created)
        common.on("note", str)

        assert sent("a", "note") == common.decode(sent("a", "note"))

    @pytest.mark.parametrize("kind", [set, bytes, tuple[int, ...], dict[int, str], list[set[int]]])
    def test_type_that_json_does_not_give(self, kind):
        """It is said when the program starts, not when the first event comes."""
        with pytest.raises(TypeError, match="Give `on` a function"):
            Events().on("created", kind)


OPEN = encode(id="e:0", event="stream.open", data='{"topics": ["run:r"], "heartbeat_seconds": 15}', retry=1)
RESET = encode(id="e:2", event="stream.reset", data='{"reason": "history_lost"}')
ORDERS = Events().on("created", Created)


def created(number: int, data: str) -> bytes:
    return encode(id=f"e:{number}", event="created", data=data)


class TestRead:
    async def test_stream(self):
        """A stream is read typed; a loss stays visible, and wrong data is told and left out."""
        wrongs: list[WrongData] = []
        blocks = [created(1, '{"id": 1}'), RESET, created(3, "{}"), created(4, '{"id": 4}')]
        async with serving(stream(OPEN, *blocks)) as server:
            got = []
            async with aclosing(ORDERS.read(listen(server.url, "orders"), on_wrong=wrongs.append)) as events:
                async for event in events:
                    got.append(event)
                    if event.id == "e:4":
                        break

        assert [Typed("created", Created(1), "e:1"), Typed("created", Created(4), "e:4")] == [got[0], got[2]]
        assert isinstance(got[1], StreamReset)
        assert ["e:3"] == [wrong.event.id for wrong in wrongs]

    async def test_wrong_data_ends_it(self):
        """Where nobody wants to be told, wrong data is raised, and the stream is closed."""
        async with serving(stream(OPEN, created(1, "{}"), then="hold")) as server:
            with pytest.raises(WrongData):
                async for _ in ORDERS.read(listen(server.url, "orders")):
                    pass
            await server.left.wait()

    async def test_leaving(self):
        """Leaving the typed events closes the stream below them."""
        async with serving(stream(OPEN, created(1, '{"id": 1}'), then="hold")) as server:
            listening = listen(server.url, "orders")
            async with aclosing(ORDERS.read(listening)) as events:
                await anext(events)
            # Not left to whoever collects garbage.
            assert listening.ag_frame is None
            await server.left.wait()

    async def test_run(self):
        """What a run tells has its types, too."""
        told = [("run.progress", '{"percent": null, "stage": "a"}'), ("run.token", '{"text": "b"}'), ("run.done", '{"c": 1}')]
        blocks = [encode(id=f"e:{at}", event=name, data=data) for at, (name, data) in enumerate(told, 1)]
        async with serving(stream(OPEN, *blocks)) as server:
            events: AsyncGenerator[Any] = RUN_EVENTS.read(run(server.url, {"kind": "chat"}))
            assert [Progress(None, "a"), Token("b"), Done({"c": 1})] == [event.data async for event in events]


PROGRAM = """
from dataclasses import dataclass
from typing import TypedDict

from app.parser import ServerSentEvent
from app.typed import RUN_EVENTS, Events

@dataclass
class Created:
    id: int

class Renamed(TypedDict):
    name: str

def length(data: object) -> int:
    return len(str(data))

EVENTS = Events().on("created", Created).on("renamed", Renamed).on("note", str).on("length", length)
reveal_type(EVENTS)

def show(event: ServerSentEvent) -> None:
    typed = EVENTS.decode(event)
    reveal_type(typed.data)
    match typed.data:
        case Created(id=number):
            reveal_type(number)
            print(typed.data.number)  # no such field
        case str(text):
            print(text + 1)  # no number
    run = RUN_EVENTS.decode(event)
    reveal_type(run.data)
"""


def test_what_mypy_believes(tmp_path):
    """A type checker knows the data of every name, and finds what is wrong with their use."""
    (tmp_path / "program.py").write_text(PROGRAM)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--hide-error-context", "--no-pretty", str(tmp_path / "program.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    said = [line.split(": ", 1)[1] for line in checked.stdout.splitlines() if "program.py:" in line]
    renamed = "TypedDict(program.Renamed, {'name': str})"
    assert [
        f'note: Revealed type is "app.typed.Events[program.Created | {renamed} | str | int]"',
        f'note: Revealed type is "program.Created | {renamed} | str | int"',
        'note: Revealed type is "int"',
        'error: "Created" has no attribute "number"  [attr-defined]',
        'error: Unsupported operand types for + ("str" and "int")  [operator]',
        'note: Revealed type is "app.typed.Token | app.typed.Progress | app.typed.Done | str"',
    ] == said
