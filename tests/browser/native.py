"""
Real browsers without a driver, each showing the gate's probe page.

A browser is started once for many tests; each test opens an EventSource in it.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.stack import Part
from tests.browser.gate import Gate, Stream

START_SECONDS = 90
STOP_SECONDS = 5
WAIT_SECONDS = 60

# The kit's own names. A page hears only the names it listens to.
KIT_NAMES = (
    "stream.open",
    "stream.position",
    "stream.reset",
    "stream.draining",
    "stream.evicted",
)

CHROMIUM_FLAGS = (
    "--headless",
    # Chromium's sandbox refuses to run as root, as in a container.
    "--no-sandbox",
    "--disable-gpu",
    # /dev/shm is 64 MB in many containers.
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-breakpad",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    # No traffic but to this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

FIREFOX_PREFERENCES = {
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.aboutwelcome.enabled": False,
    "browser.safebrowsing.downloads.enabled": False,
    "browser.safebrowsing.malware.enabled": False,
    "browser.safebrowsing.phishing.enabled": False,
    "browser.search.update": False,
    "browser.sessionstore.resume_from_crash": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.homepage_override.mstone": "ignore",
    "browser.tabs.warnOnClose": False,
    "datareporting.healthreport.uploadEnabled": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "dom.ipc.processPrelaunch.enabled": False,
    "extensions.systemAddon.update.enabled": False,
    "extensions.update.enabled": False,
    "media.gmp-manager.updateEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    # No traffic but to this machine: the rest meets a closed port. Firefox
    # leaves loopback addresses out of its proxy settings by itself.
    "network.proxy.type": 1,
    "network.proxy.http": "127.0.0.1",
    "network.proxy.http_port": 9,
    "network.proxy.ssl": "127.0.0.1",
    "network.proxy.ssl_port": 9,
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
    "toolkit.telemetry.unified": False,
}


@dataclass(eq=False)
class Source:
    """One EventSource of the probe page."""

    gate: Gate
    number: int
    first_stream: int

    def reports(self) -> list[dict[str, Any]]:
        """What the page said about this source, oldest first."""
        return [said for said in self.gate.reports() if said.get("source") == self.number]

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names; without names, all but `stream.*`."""
        return [
            said
            for said in self.reports()
            if said["kind"] == "event"
            and (said["event"] in names if names else not said["event"].startswith("stream."))
        ]

    def streams(self) -> list[Stream]:
        """The requests the browser made for this source, oldest first."""
        return self.gate.streams[self.first_stream :]

    def wait[T](self, condition: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
        """
        Wait until *condition* is true, and return what it gave.

        It is asked whenever the page reports or the browser connects.
        """
        deadline = time.monotonic() + seconds
        with self.gate.changed:
            while not (met := condition()):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(self._story(seconds))
                self.gate.changed.wait(min(left, 1))
        return met

    def wait_open(self, times: int = 1) -> dict[str, Any]:
        """Wait for the *times*-th `stream.open`."""
        return self.wait(lambda: self.events("stream.open")[times - 1 :])[0]

    def wait_open_by(self, times: int = 1) -> str:
        """Wait for the *times*-th `stream.open`; returns the name of its process."""
        process: str = json.loads(self.wait_open(times)["data"])["process"]
        return process

    def wait_events(self, count: int, seconds: float = WAIT_SECONDS) -> list[dict[str, Any]]:
        """Wait for *count* events that are not the kit's own; returns all there are."""
        return self.wait(lambda: len(found := self.events()) >= count and found, seconds)

    def _story(self, seconds: float) -> str:
        reports = self.reports()
        streams = [
            (stream.target, stream.last_event_id, stream.received_bytes, stream.ended)
            for stream in self.streams()
        ]
        return (
            f"not met within {seconds} s: {len(self.events())} events, "
            f"last reports {reports[-5:]}, requests {streams}"
        )


@dataclass(eq=False)
class Browser:
    """A running browser that shows the probe page."""

    name: str
    gate: Gate

    def aim(self, url: str) -> None:
        """Put the server at *url* behind the gate."""
        address = urlsplit(url)
        self.gate.target = (address.hostname or "", address.port or 80)

    def rest(self) -> None:
        """Close the page's EventSource and undo what a test did to the gate."""
        self.gate.command(do="close")
        self.gate.release()
        self.gate.cut()

    def open(self, url: str, names: Iterable[str] = (), characters: int = 1 << 20) -> Source:
        """
        Open an EventSource; the one before it is closed.

        Args:
            names: event names to listen to besides `message` and `stream.*`.
            characters: how much of an event's data the page reports.
        """
        first_stream = len(self.gate.streams)
        number = self.gate.command(
            do="open", url=url, names=[*KIT_NAMES, *names], characters=characters
        )
        return Source(self.gate, number, first_stream)


class _Process(Part):
    """The browser's first process; the others are of its group."""

    def __init__(self, name: str, profile: Path, gate: Gate, command: list[str]) -> None:
        super().__init__(name, profile)
        self._gate = gate
        self._command = [*command, f"{gate.url}/gate/"]

    def command(self) -> list[str]:
        return self._command

    def environment(self) -> dict[str, str]:
        # Home and temporary files in the profile: nothing is left behind.
        folder = str(self.directory)
        return super().environment() | {
            "HOME": folder,
            "TMPDIR": folder,
            "MOZ_CRASHREPORTER_DISABLE": "1",
        }

    def probe(self) -> bool:
        return bool(self._gate.reports())


@contextlib.contextmanager
def started(name: str, binary: str) -> Iterator[Browser]:
    """Start Debian's `chromium` or `firefox-esr`, with a profile of its own."""
    with _profile() as profile, _gate() as gate:
        if name == "chromium":
            command = [binary, *CHROMIUM_FLAGS, f"--user-data-dir={profile}"]
        else:
            lines = (
                f"user_pref({json.dumps(key)}, {json.dumps(value)});\n"
                for key, value in FIREFOX_PREFERENCES.items()
            )
            (profile / "user.js").write_text("".join(lines))
            command = [binary, "--headless", "--no-remote", "--profile", str(profile)]
        process = _Process(name, profile, gate, command)
        try:
            process.start()
            process.wait_ready(START_SECONDS)
            yield Browser(name, gate)
        finally:
            process.stop(STOP_SECONDS)
            process.release()


@contextlib.contextmanager
def _profile() -> Iterator[Path]:
    # A browser's last process may still write while this one deletes.
    with tempfile.TemporaryDirectory(prefix="sse-browser-", ignore_cleanup_errors=True) as profile:
        yield Path(profile)


@contextlib.contextmanager
def _gate() -> Iterator[Gate]:
    gate = Gate()
    try:
        yield gate
    finally:
        gate.close()
