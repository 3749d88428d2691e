"""
Give the data of events their types, by name: `listen` and `run` yield texts, this what they say.

    @dataclass
    class Created:
        id: int
        customer: str = "nobody"

    ORDERS = Events().on("created", Created).on("note", str)

    async for event in ORDERS.read(listen(url, "orders")):
        match event.data:  # for a type checker: Created | str
            case Created(id=number): ...

What arrives is checked against the type, so that what the checker believes is true.
Standard library only.
"""

import dataclasses
import enum
import json
import types
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Never, Union, get_args, get_origin, get_type_hints, is_typeddict, overload

from app.parser import ServerSentEvent

__all__ = ["RUN_EVENTS", "Done", "Events", "Progress", "Token", "Typed", "WrongData"]

# Takes a value out of JSON, and its name for errors.
_Reader = Callable[[Any, str], Any]


@dataclass(frozen=True, slots=True)
class Typed[T]:
    """An event whose data is what its name promises; `id` as in `ServerSentEvent`."""

    event: str
    data: T
    id: str


class WrongData(ValueError):
    """
    An event's data is not what its name promises.

    Attributes:
        event: the event as it came; `listen` goes on behind its `id`.
        name: the field, such as `created.items[0].price`.
    """

    def __init__(self, name: str, rule: str, value: object, cure: str = "") -> None:
        self.event = ServerSentEvent("", "", "")
        self.name = name
        self.rule = rule
        self.value = value
        self.cure = cure or "Correct its publisher, or the type that `on` was given."
        shown = repr(value)
        super().__init__(f"{name} {rule}, got {shown[:100]}{'…' * (len(shown) > 100)}. {self.cure}")


class Events[T = Never]:
    """
    What the data of events are, by name. Each `on` returns a new one that knows one name more.
    """

    def __init__(self, readers: Mapping[str, Callable[[str], Any]] | None = None) -> None:
        self._readers = dict(readers or {})

    @overload
    def on[U](self, name: str, kind: type[U]) -> "Events[T | U]": ...
    @overload
    def on[U](self, name: str, kind: Callable[[Any], U]) -> "Events[T | U]": ...
    def on(self, name: str, kind: Any) -> "Events[Any]":
        """
        Let the data of events called *name* be a *kind*.

        Args:
            name: The event's name; `message` for those without one.
            kind: `str` for the text as it was sent. A dataclass or a TypedDict for a JSON
                object: what it does not know is left out, or kept as it came. `int`,
                `float`, `bool`, `list` or `dict` for such JSON. Or any function of one
                argument, which gets the data read as JSON, or the text where it is none,
                and raises ValueError or TypeError where it is wrong:
                `Created.model_validate` of Pydantic, or your own.

        Raises:
            TypeError: *kind* has a field of a type that JSON does not give.
        """
        return Events({**self._readers, name: _text_reader(name, kind)})

    def decode(self, event: ServerSentEvent) -> Typed[T] | ServerSentEvent:
        """
        Return *event* with its data as `on` said; as it came where its name was never given.

        Raises:
            WrongData: the data is no such thing.
        """
        read = self._readers.get(event.event)
        if read is None:
            return event
        try:
            return Typed(event.event, read(event.data), event.id)
        except WrongData as wrong:
            wrong.event = event
            raise
        except (TypeError, ValueError) as error:
            refused = WrongData(event.event, f"must be what its type takes ({error})", event.data)
            refused.event = event
            raise refused from error

    async def read(
        self, events: AsyncGenerator[ServerSentEvent], *, on_wrong: Callable[[WrongData], None] | None = None
    ) -> AsyncGenerator[Typed[T] | ServerSentEvent]:
        """
        Yield what *events* yields, decoded; leaving this generator closes that one.

        Events whose names `on` was not given come as they are, a `StreamReset` too.
        With *on_wrong* it is told of wrong data, and the next event comes; without it
        WrongData is raised, and reading ends.
        """
        async with aclosing(events):
            async for event in events:
                try:
                    decoded = self.decode(event)
                except WrongData as wrong:
                    if on_wrong is None:
                        raise
                    on_wrong(wrong)
                    continue
                yield decoded


def _text_reader(name: str, kind: Any) -> Callable[[str], Any]:
    """Return what makes a *kind* of an event's text."""
    if kind is str:
        return lambda text: text
    # A class may be called, too; what can be checked is checked.
    if not isinstance(kind, type) and get_origin(kind) is None and callable(kind):
        return lambda text: kind(_json(text))
    read = _reader(kind, {})

    def reader(text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError:
            raise WrongData(name, "must be JSON", text) from None
        return read(value, name)

    return reader


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _reader(kind: Any, known: dict[Any, _Reader]) -> _Reader:
    """Return what checks a value of JSON against *kind*, and makes it one."""
    if kind is Any or kind is object:
        return lambda value, name: value
    if kind is None or kind is types.NoneType:
        return _exactly(types.NoneType, "null")
    if kind in (bool, str):
        return _exactly(kind, "a string" if kind is str else "true or false")
    if kind is int:
        return _number(int, "a whole number")
    if kind is float:
        return _number((int, float), "a number")
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _union([_reader(each, known) for each in arguments], kind)
    if origin is list:
        return _list(_reader(arguments[0] if arguments else Any, known))
    if origin is dict and (not arguments or arguments[0] in (str, Any)):
        return _dict(_reader(arguments[1] if arguments else Any, known))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _enum(kind)
    if is_typeddict(kind) or (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        if kind not in known:
            # For one that holds itself, such as a tree: it is looked up when it is needed.
            known[kind] = lambda value, name: known[kind](value, name)  # noqa: PLW0108
            known[kind] = _object(kind, known)
        return known[kind]
    raise TypeError(
        f"the type must be a dataclass, a TypedDict, or what JSON gives (str, int, float, bool, None, list, dict, "
        f"Literal, an Enum, or a union of them), got {kind!r}. Give `on` a function that makes it."
    )


def _exactly(kind: type, words: str) -> _Reader:
    def read(value: Any, name: str) -> Any:
        if type(value) is not kind:
            raise WrongData(name, f"must be {words}", value)
        return value

    return read


def _number(kinds: Any, words: str) -> _Reader:
    def read(value: Any, name: str) -> Any:
        # For Python, True is a number.
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise WrongData(name, f"must be {words}", value)
        return value

    return read


def _literal(values: tuple[Any, ...]) -> _Reader:
    def read(value: Any, name: str) -> Any:
        if not any(type(value) is type(each) and value == each for each in values):
            raise WrongData(name, f"must be one of {', '.join(map(repr, values))}", value)
        return value

    return read


def _union(readers: list[_Reader], kind: Any) -> _Reader:
    def read(value: Any, name: str) -> Any:
        for each in readers:
            try:
                return each(value, name)
            except WrongData:
                pass
        raise WrongData(name, f"must be {kind}", value)

    return read


def _list(item: _Reader) -> _Reader:
    def read(value: Any, name: str) -> Any:
        if not isinstance(value, list):
            raise WrongData(name, "must be a list", value)
        return [item(each, f"{name}[{at}]") for at, each in enumerate(value)]

    return read


def _dict(item: _Reader) -> _Reader:
    def read(value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            raise WrongData(name, "must be an object", value)
        return {key: item(each, f"{name}.{key}") for key, each in value.items()}

    return read


def _enum(kind: type[enum.Enum]) -> _Reader:
    def read(value: Any, name: str) -> Any:
        try:
            return kind(value)
        except ValueError:
            raise WrongData(name, f"must be one of {', '.join(repr(each.value) for each in kind)}", value) from None

    return read


def _object(kind: Any, known: dict[Any, _Reader]) -> _Reader:
    """Return what makes a dataclass or a TypedDict of an object."""
    hints = get_type_hints(kind)
    if is_typeddict(kind):
        needed, fields = set(kind.__required_keys__), list(hints)
    else:
        given = [field for field in dataclasses.fields(kind) if field.init]
        fields = [field.name for field in given]
        needed = {
            field.name
            for field in given
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
    readers = {field: _reader(hints[field], known) for field in fields}

    def read(value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            raise WrongData(name, "must be an object", value)
        for field in fields:
            if field in needed and field not in value:
                raise WrongData(f"{name}.{field}", "must be there", value)
        made = {field: read(value[field], f"{name}.{field}") for field, read in readers.items() if field in value}
        return {**value, **made} if is_typeddict(kind) else kind(**made)

    return read


# --- What runs tell, see README.md


@dataclass(frozen=True, slots=True)
class Token:
    """`run.token`: more of a model's answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """`run.progress`: how far a task is, 0 to 100, None where it does not know."""

    percent: float | None
    stage: str


@dataclass(frozen=True, slots=True)
class Done:
    """`run.done`: what the run has made."""

    result: dict[str, Any]


def _done(data: Any) -> Done:
    if not isinstance(data, dict):
        raise TypeError("an object")
    return Done(data)


# For `run` of `app.client`, which raises `run.failed`.
RUN_EVENTS = Events().on("run.token", Token).on("run.progress", Progress).on("run.done", _done)
