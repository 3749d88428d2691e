"""
Read scenarios and thresholds, which are data: scenarios.toml and thresholds.toml.

A mistake in them is told by name, with what would be right.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCENARIOS = HERE / "scenarios.toml"
THRESHOLDS = HERE / "thresholds.toml"

USERS = ("subscriber", "slow", "limit", "churner", "run")
ACTIONS = ("disconnect",)


class ScenarioError(Exception):
    """A scenario, a threshold or an option is wrong; the text says which, why and the cure."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Go to this share of the streams, then stay for so many seconds."""

    streams: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Action:
    """After so many seconds of the last stage, do something to this share of the streams."""

    at: float
    do: str
    share: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """
    One way to load a server.

    Attributes:
        streams: How many at most, where STREAMS says nothing.
        streams_per_topic: How many share a topic; 0: one topic for all.
        rate: Events per second and topic.
        broadcast_rate: Events per second to every stream.
        event_bytes: Least size of an event's data.
        connects_per_second: How fast streams are opened.
        publish_when_open: Publish from the moment that the first stage is reached, not before.
        own_topic: Each stream has its user's own topic, and no other.
        run_every: Seconds between two starts of one reader of runs.
        run_words: Words of a run's prompt, each of which is repeated as a token.
        users: Kind of user to its weight.
        stages: What happens, in order.
        actions: What is done during the last stage.
        stop_at_limit: End as soon as a stage breaks a threshold, and say what gave way.
    """

    name: str
    about: str
    streams: int
    stages: tuple[Stage, ...]
    streams_per_topic: int = 50
    rate: float = 1.0
    broadcast_rate: float = 0.0
    event_bytes: int = 200
    connects_per_second: float = 250.0
    publish_when_open: bool = False
    own_topic: bool = False
    run_every: float = 5.0
    run_words: int = 40
    users: Mapping[str, int] = field(default_factory=lambda: {"subscriber": 1})
    actions: tuple[Action, ...] = ()
    stop_at_limit: bool = False

    @property
    def seconds(self) -> float:
        """How long all stages are held, without the time to get there."""
        return sum(stage.seconds for stage in self.stages)

    def topics(self, streams: int) -> int:
        """Return how many topics *streams* streams have."""
        if self.own_topic:
            return streams
        return max(1, -(-streams // self.streams_per_topic)) if self.streams_per_topic else 1

    def lasting(self, seconds: float) -> "Scenario":
        """Return the same with all stages stretched or shrunk to *seconds* in all."""
        factor = seconds / self.seconds
        return replace(
            self,
            stages=tuple(replace(stage, seconds=stage.seconds * factor) for stage in self.stages),
            actions=tuple(replace(action, at=action.at * factor) for action in self.actions),
        )


def load_scenarios(path: Path = SCENARIOS) -> dict[str, Scenario]:
    """
    Return the scenarios of a file, in its order.

    Raises:
        ScenarioError: something in it is wrong.
    """
    return {name: _scenario(name, fields) for name, fields in _tables(path).items()}


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ScenarioError(f"{path} must be a file that can be read: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path} must be TOML: {error}.") from None


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _scenario(name: str, fields: dict[str, Any]) -> Scenario:
    def wrong(what: str, rule: str, value: object) -> ScenarioError:
        return ScenarioError(f"scenario {name}: {what} {rule}, got {value!r}.")

    known = Scenario.__dataclass_fields__
    for key, value in fields.items():
        if key not in known or key == "name":
            raise wrong(key, f"is no field; known are {', '.join(k for k in known if k != 'name')}", value)
        kinds = _KINDS.get(str(getattr(known[key].type, "__name__", known[key].type)))
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise wrong(key, f"must be of type {known[key].type.__name__}", value)
        if isinstance(value, int | float) and value < 0:
            raise wrong(key, "must not be negative", value)
    for key in ("about", "streams", "stages"):
        if not fields.get(key):
            raise wrong(key, "must be given", fields.get(key))
    for key in ("connects_per_second", "run_every", "run_words"):
        if not fields.get(key, 1):
            raise wrong(key, "must be above 0", 0)
    users = fields.get("users", {"subscriber": 1})
    if not users or any(kind not in USERS for kind in users):
        raise wrong("users", f"must have weights for some of {', '.join(USERS)}", users)
    try:
        stages = tuple(Stage(float(stage["streams"]), float(stage["seconds"])) for stage in fields["stages"])
        actions = tuple(
            Action(float(action["at"]), action["do"], float(action.get("share", 1)))
            for action in fields.get("actions", ())
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ScenarioError(
            f"scenario {name}: stages must have streams (0 to 1) and seconds, actions at, do and share; {error!r}."
        ) from None
    for stage in stages:
        if not 0 <= stage.streams <= 1 or stage.seconds <= 0:
            raise wrong("stages", "must have streams from 0 to 1 and seconds above 0", stage)
    for action in actions:
        if action.do not in ACTIONS or not 0 < action.share <= 1:
            raise wrong("actions", f"must do one of {', '.join(ACTIONS)} to a share up to 1", action)
        if not 0 <= action.at < stages[-1].seconds:
            raise wrong("actions", "must be within the last stage, or they are never done", action)
    return Scenario(name, **{**fields, "stages": stages, "actions": actions})


# --- Thresholds

_BOUND = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|==|<|>)\s*(-?[0-9]+(?:\.[0-9]+)?)\s*")


@dataclass(frozen=True, slots=True)
class Threshold:
    """
    A figure and its bound.

    Attributes:
        void: A run whose generator broke it proves nothing.
        needed: It is broken where the figure was not measured: a storm in which no stream
            had to resume has shown nothing. Those of [all] are for scenarios without it, too.
    """

    figure: str
    sign: str
    bound: float
    void: bool = False
    needed: bool = False

    def holds(self, value: float | None) -> bool:
        """Tell whether *value* keeps the bound."""
        if value is None:
            return not self.needed
        match self.sign:
            case "<=":
                return value <= self.bound
            case ">=":
                return value >= self.bound
            case "<":
                return value < self.bound
            case ">":
                return value > self.bound
        return value == self.bound

    def __str__(self) -> str:
        return f"{self.figure} {self.sign} {self.bound:g}"


def parse_threshold(text: str, known: Iterable[str], *, void: bool = False, needed: bool = False) -> Threshold:
    """
    Return the threshold that *text* writes, `delivery_p99_ms <= 250`.

    Raises:
        ScenarioError: it is none, or of a figure that there is not.
    """
    found = _BOUND.fullmatch(text)
    if not found:
        raise ScenarioError(f"a threshold must be a figure, one of <= >= == < >, and a number, got {text!r}.")
    figure, sign, bound = found.groups()
    if figure not in known:
        raise ScenarioError(
            f"a threshold must be of a known figure, got {figure!r}. Known: {', '.join(sorted(known))}."
        )
    return Threshold(figure, sign, float(bound), void, needed)


def load_thresholds(
    scenario: str,
    overrides: Iterable[str],
    known: Iterable[str],
    path: Path = THRESHOLDS,
    scenarios: Iterable[str] = (),
) -> list[Threshold]:
    """
    Return the thresholds of *scenario*: the file's [all], then its own, then *overrides*.

    A later one replaces earlier ones of the same figure; `off` among the overrides
    drops all but those on the generator, which are the shipped ones where the file has none.

    Raises:
        ScenarioError: a table is of none of *scenarios*, or says something else: it would never be looked at.
    """
    tables = _tables(path)
    for name, table in tables.items():
        if scenarios and name not in ("all", "void", *scenarios):
            raise ScenarioError(f"{path}: [{name}] must be all, void or a scenario, {', '.join(scenarios)}.")
        if not isinstance(table, dict) or table.keys() != {"thresholds"} or not isinstance(table["thresholds"], list):
            raise ScenarioError(f'{path}: {name} must be a table with thresholds = ["lost == 0"], got {table!r}.')
    tables.setdefault("void", _tables(THRESHOLDS)["void"])
    chosen: dict[str, Threshold] = {}
    overrides = [text for text in overrides if text.strip()]
    if "off" not in [text.strip() for text in overrides]:
        for table, needed in (("all", False), (scenario, True)):
            for text in tables.get(table, {}).get("thresholds", ()):
                threshold = parse_threshold(text, known, needed=needed)
                chosen[threshold.figure] = threshold
    for text in tables.get("void", {}).get("thresholds", ()):
        threshold = parse_threshold(text, known, void=True, needed=True)
        chosen[threshold.figure] = threshold
    for text in overrides:
        if text.strip() != "off":
            threshold = parse_threshold(text, known, needed=True)
            before = chosen.get(threshold.figure)
            chosen[threshold.figure] = replace(threshold, void=before is not None and before.void)
    return list(chosen.values())
