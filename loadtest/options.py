"""
The options of a load test, for `python -m loadtest` and for Locust's own command line.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from loadtest.result import FIGURES
from loadtest.scenario import SCENARIOS, THRESHOLDS, Scenario, ScenarioError, Threshold, load_scenarios, load_thresholds


@dataclass(frozen=True, slots=True)
class Option:
    """One option: how it is written, what it means without it, and what it does."""

    flag: str
    default: object
    about: str
    kind: type | None = str
    environment: str | None = None


OPTIONS = (
    Option("--scenario", "smoke", "which scenario of the file (default: smoke)"),
    Option("--scenarios", str(SCENARIOS), "another file of scenarios"),
    Option("--thresholds", "", "thresholds beside the file's, separated by commas; `off`: of the file's only those on the generator"),
    Option("--thresholds-file", str(THRESHOLDS), "another file of thresholds"),
    Option("--streams", 0, "streams in all (default: the scenario's)", int),
    Option("--seconds", 0.0, "how long the stages last in all (default: the scenario's)", float),
    Option("--rate", 0.0, "connects per second (default: the scenario's)", float),
    Option(
        "--token",
        "",
        "bearer token of every stream and publish; all streams are then one user's",
        environment="SSE_LOADTEST_TOKEN",
    ),
    Option(
        "--secret",
        "",
        "HS256 secret to mint a token per user with; better in SSE_LOADTEST_SECRET",
        environment="SSE_LOADTEST_SECRET",
    ),
    Option("--claims", "", 'JSON object of claims that each minted token has besides, {"aud": "…"}'),
    Option("--user-limit", 0, "streams that one user may have: there must never be more; `limits` goes beyond it", int),
    Option("--sources", "auto", "source addresses: auto, or addresses separated by commas"),
    Option("--insecure", False, "take any TLS certificate", None),
    Option("--settle", 10.0, "seconds that streams have for their last events (default: 10)", float),
    Option("--patience", 15.0, "seconds without any open stream after which the target is gone (default: 15)", float),
    Option("--results", "", "folder for result.json and report.html (default: .run/loadtest/TIME-SCENARIO)"),
    Option("--stack", "", "folder of the local stack whose processes are watched (.run/8080)"),
)


def add_options(parser: argparse.ArgumentParser, *, locust: bool = False) -> None:
    """Add all options to *parser*; Locust's own reads the environment by itself."""
    # Locust's parser knows its own keywords; a group of it does not.
    group = parser if locust else parser.add_argument_group("streams")
    for option in OPTIONS:
        extra: dict[str, object] = {"help": option.about.replace("%", "%%"), "default": option.default}
        if option.kind is None:
            extra["action"] = "store_true"
        else:
            extra["type"] = option.kind
        if locust:
            if option.environment:
                extra |= {"env_var": option.environment, "is_secret": True}
            if option.flag in ("--stack", "--results", "--scenarios", "--thresholds-file"):
                extra["include_in_web_ui"] = False
        group.add_argument(option.flag, **extra)  # type: ignore[arg-type]


def as_arguments(options: argparse.Namespace) -> list[str]:
    """Return *options* as arguments for another command line, secrets left out."""
    arguments = []
    for option in OPTIONS:
        value = getattr(options, option.flag.removeprefix("--").replace("-", "_"))
        if option.environment or value == option.default:
            continue
        arguments += [option.flag] if option.kind is None else [f"{option.flag}={value}"]
    return arguments


def results_folder(options: argparse.Namespace, now: str) -> Path:
    """Return where results go."""
    return Path(options.results) if options.results else Path(".run/loadtest") / now


def chosen(options: argparse.Namespace) -> Scenario:
    """
    Return the scenario that *options* ask for.

    Raises:
        ScenarioError: there is none of that name, or a value is out of its range.
    """
    scenarios = load_scenarios(Path(options.scenarios))
    if options.scenario not in scenarios:
        raise ScenarioError(f"SCENARIO must be one of {', '.join(scenarios)}, got {options.scenario!r}.")
    for name, value, high in (
        ("STREAMS", options.streams, 10_000_000), ("SECONDS", options.seconds, 604_800), ("RATE", options.rate, 1_000_000),
    ):  # fmt: skip
        if not 0 <= value <= high:
            raise ScenarioError(
                f"{name} must be from 1 to {high:,}, got {value:g}. Leave it out for the scenario's own."
            )
    for name, value in (
        ("--settle", options.settle),
        ("--patience", options.patience),
        ("--user-limit", options.user_limit),
    ):
        if not 0 <= value <= 1_000_000:
            raise ScenarioError(f"{name} must be from 0 to 1,000,000, got {value:g}.")
    scenario = scenarios[options.scenario]
    return scenario.lasting(options.seconds) if options.seconds else scenario


def chosen_thresholds(options: argparse.Namespace) -> list[Threshold]:
    """
    Return the thresholds that *options* ask for.

    Raises:
        ScenarioError: one is of no figure, or a file is wrong.
    """
    overrides = options.thresholds.split(",")
    if options.user_limit:
        overrides.insert(0, f"most_per_user <= {options.user_limit}")
    scenarios = load_scenarios() | load_scenarios(Path(options.scenarios))
    return load_thresholds(options.scenario, overrides, FIGURES, Path(options.thresholds_file), list(scenarios))


def source_addresses(options: argparse.Namespace, host: str) -> list[str]:
    """
    Return the source addresses of streams: for a target on this machine, many of 127.0.0.0/8.

    One address holds about 28,000 streams to one port, and what is hashed or limited by
    address would see one client.
    """
    if options.sources != "auto":
        return [address.strip() for address in options.sources.split(",") if address.strip()]
    if sys.platform == "linux" and any(name in host for name in ("://127.", "://localhost")):
        return [f"127.0.{1 + number // 250}.{2 + number % 250}" for number in range(64)]
    return []
