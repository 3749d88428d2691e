"""
Tabs beyond a user's limit: they do not throw each other out for ever, and come back when there is room.

A minute is three seconds here: SSE_EVICTED_RETRY_SECONDS is scaled.
"""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.stack import Stack

MINUTE = 3.0
LIMIT = 2
# The newest that runs on Node 18, which Debian 12 has.
EVENTSOURCE = "eventsource@3.0.7"

# Tabs as both kinds of clients run them; what happens to each is in `happened`.
OPEN = """
(name, address) => {
  globalThis.tabs ??= {};
  const tab = globalThis.tabs[name] = {happened: [], source: new EventSource(address)};
  for (const kind of ["open", "error", "stream.open", "stream.evicted"])
    tab.source.addEventListener(kind, () => tab.happened.push(kind));
}
"""


@pytest.fixture(scope="module")
def site(require: Callable[..., str]) -> Iterator[Stack]:
    require("redis-server", "valkey-server")
    require("nginx")
    env = {
        "SSE_RETRY_MS": "100",
        "SSE_LIMIT_STREAMS_PER_USER": str(LIMIT),
        "SSE_EVICTED_RETRY_SECONDS": str(MINUTE),
    }
    with Stack(env=env) as stack:
        yield stack


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


class Tabs:
    """Four tabs of one user, each in whatever client there is."""

    def open(self, name: str, address: str) -> None:
        raise NotImplementedError

    def happened(self, name: str) -> list[str]:
        raise NotImplementedError

    def close(self, name: str) -> None:
        raise NotImplementedError


class Chromium(Tabs):
    """A page for each tab, in one profile."""

    def __init__(self, browser: Any, site: Stack) -> None:
        self._context = browser.new_context()
        self._site = site
        self._pages: dict[str, Any] = {}

    def open(self, name: str, address: str) -> None:
        page = self._pages[name] = self._context.new_page()
        page.goto(f"{self._site.url}/healthz")
        page.evaluate(f"([name, address]) => ({OPEN})(name, address)", [name, address])

    def happened(self, name: str) -> list[str]:
        return list(self._pages[name].evaluate(f"tabs[{name!r}].happened"))

    def close(self, name: str) -> None:
        self._pages.pop(name).close()

    def end(self) -> None:
        self._context.close()


class Node(Tabs):
    """npm's client, driven line by line."""

    SCRIPT = f"""
import {{EventSource}} from "eventsource";
import {{createInterface}} from "node:readline";
const open = {OPEN};
globalThis.EventSource = EventSource;
for await (const line of createInterface({{input: process.stdin}})) {{
  const [verb, name, address] = JSON.parse(line);
  if (verb === "open") open(name, address);
  if (verb === "close") tabs[name].source.close();
  console.log(JSON.stringify(tabs[name].happened));
}}
"""

    def __init__(self, folder: Path, node: str) -> None:
        (folder / "tabs.mjs").write_text(self.SCRIPT)
        self._process = subprocess.Popen(
            [node, "tabs.mjs"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, *words: str) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))

    def open(self, name: str, address: str) -> None:
        self._ask("open", name, address)

    def happened(self, name: str) -> list[str]:
        return self._ask("look", name)

    def close(self, name: str) -> None:
        self._ask("close", name)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def packages(require: Callable[..., str]) -> Iterator[Path]:
    npm = require("npm")
    folder = Path(tempfile.mkdtemp(prefix="sse-npm-"))
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    command = [npm, "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", EVENTSOURCE]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=200)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=["chromium", "eventsource"])
def tabs(request: pytest.FixtureRequest, site: Stack, require: Callable[..., str]) -> Iterator[Tabs]:
    made: Any
    if request.param == "chromium":
        made = Chromium(request.getfixturevalue("driven_chromium"), site)
    else:
        made = Node(request.getfixturevalue("packages"), require("node"))
    yield made
    made.end()


def test_two_tabs_beyond_the_limit(site, tabs, request):
    """
    Fewer than three reconnects each in a minute; after one tab closes, an evicted one comes back.
    """
    user = request.node.callspec.params["tabs"]
    address = f"{site.url}/events?topic=t&user={user}"
    for number in range(LIMIT + 2):
        tabs.open(f"tab-{number}", address)
        until(lambda n=number: "stream.open" in tabs.happened(f"tab-{n}"), "a new tab reads its stream")
    beyond = ["tab-0", "tab-1"]
    for name in beyond:
        until(lambda name=name: "stream.evicted" in tabs.happened(name), "the oldest have to leave")

    before = {name: tabs.happened(name).count("open") for name in beyond}
    deadline = time.monotonic() + MINUTE
    until(lambda: time.monotonic() > deadline, "a minute")
    after = {name: tabs.happened(name) for name in beyond}
    # The soft fail is a 200 that ends: an EventSource opens, and tries again.
    reconnects = {name: after[name].count("open") - before[name] for name in beyond}
    assert all(count < 3 for count in reconnects.values()), reconnects
    for name in beyond:
        until(lambda name=name: tabs.happened(name).count("open") >= 2, "it comes back by itself")
        assert 1 == tabs.happened(name).count("stream.open")
    # Who came later was not harmed: one open, no end.
    for number in range(2, LIMIT + 2):
        assert ["open", "stream.open"] == tabs.happened(f"tab-{number}")

    tabs.close(f"tab-{LIMIT + 1}")
    until(lambda: any(tabs.happened(name).count("stream.open") == 2 for name in beyond), "one comes back")
    assert ["open", "stream.open"] == tabs.happened(f"tab-{LIMIT}")
