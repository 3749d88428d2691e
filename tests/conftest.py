"""
What every test may use: whole stacks, a Redis of its own, and no silent skips.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from app.stack import Redis, Stack, StackError, find_tool, reserve_port

CI = os.environ.get("CI") == "true"

# A shell without job control has Ctrl-C ignored in what it starts in the
# background, and all children would inherit that: tests end programs by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two busy cores make any single example slow at times; that is no defect. In
# CI the examples are always the same, so that a red run can be repeated.
hypothesis.settings.register_profile("kit", deadline=None, derandomize=CI, print_blob=True)
hypothesis.settings.load_profile("kit")


def require(*names: str) -> str:
    """
    Return the path of the first of *names* that is installed, else skip the test by that name.
    """
    try:
        return find_tool(*names)
    except StackError:
        pytest.skip(f"{' or '.join(names)} is not installed")


@pytest.fixture(name="require", scope="session")
def _require() -> Callable[..., str]:
    """Look a tool up by name, or skip the test."""
    return require


@pytest.fixture
def stack(request: pytest.FixtureRequest, require: Callable[..., str]) -> Iterator[Callable[..., Stack]]:
    """
    Start a `Stack` with keywords of its class, ready and closed at the end of the test.

    A test may have several. Their logs are in the report if it fails.
    """
    stacks: list[Stack] = []

    def start(**keywords: Any) -> Stack:
        if keywords.get("redis", True):
            require("redis-server", "valkey-server")
        if keywords.get("nginx", True) and "nginx_binary" not in keywords:
            require("nginx")
        stacks.append(Stack(**keywords))
        return stacks[-1].start()

    yield start
    for each in stacks:
        if request.node.stash.get(_FAILED, False):
            request.node.add_report_section("teardown", f"stack {each.url}", each.logs())
        each.close()


@pytest.fixture
def redis_factory(require: Callable[..., str]) -> Iterator[Callable[..., Redis]]:
    """
    Start a fresh Redis with extra arguments (`"--replicaof", "127.0.0.1 6400"`), as often as called.
    """
    yield from _redis_factory(require)


@pytest.fixture
def redis_server(redis_factory: Callable[..., Redis]) -> Redis:
    """Give the test a fresh Redis of its own: `.url`, `.port`, `.kill()`, `.restart()`."""
    return redis_factory()


@pytest.fixture(scope="module")
def module_redis_server(require: Callable[..., str]) -> Iterator[Redis]:
    """Give all tests of one module the same Redis; each uses its own keys or FLUSHALL."""
    for factory in _redis_factory(require):
        yield factory()


@pytest.fixture
def free_port() -> Iterator[int]:
    """Give a port where nobody listens, kept from all but a server of the test's own."""
    port, holder = reserve_port()
    yield port
    if holder:
        holder.close()


def _redis_factory(require: Callable[..., str]) -> Iterator[Callable[..., Redis]]:
    binary = require("redis-server", "valkey-server")
    folder = Path(tempfile.mkdtemp(prefix="sse-redis-"))
    servers: list[Redis] = []

    def start(*arguments: str) -> Redis:
        servers.append(Redis(folder, *arguments, name=f"redis-{len(servers)}", binary=binary))
        servers[-1].start()
        servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.close()
    shutil.rmtree(folder, ignore_errors=True)


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let fixtures know, while they close, that their test failed."""
    report = yield
    if report.when != "teardown" and report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """
    Under CI=true a skip fails the run: what was not run is not known to work.
    """
    if CI and _skipped(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say why the run is red."""
    if CI and (count := _skipped(config)):
        terminalreporter.write_line(
            f"CI=true allows no skips, got {count}: install what they name (make test does on Debian).", red=True
        )


def _skipped(config: pytest.Config) -> int:
    # With xdist the workers have no reporter; the process that counts has.
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", [])) if reporter else 0
