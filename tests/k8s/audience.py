"""
Clients that audit: browsers' streams and a publisher, through a cluster's Services.

Every event is numbered. A client resumes as an EventSource does, and notes what
must not happen: a number that is missing, doubled or out of order, a connection
refused, any answer but a stream, a stream that was cut instead of ended.
"""

import http.client
import json
import threading
import time
from collections.abc import Callable

from app.parser import Parser
from tests.k8s.cluster import Cluster

SERVICE = "sse-nginx"


class Audience:
    """*size* clients and one publisher; `stop` ends them."""

    def __init__(self, cluster: Cluster, size: int = 16) -> None:
        self.cluster = cluster
        self.published = 0
        self.errors: list[str] = []
        self.cuts: list[str] = []
        self._stop = threading.Event()
        self._seen: list[list[int]] = [[] for _ in range(size)]
        self._opened = [0] * size
        self._threads = [threading.Thread(target=self._listen, args=(n,), daemon=True) for n in range(size)]
        for thread in self._threads:
            thread.start()
        self._wait(lambda: all(self._opened), "streams to open")
        self._threads.append(threading.Thread(target=self._publish, daemon=True))
        self._threads[-1].start()

    def stop(self) -> None:
        """End all clients."""
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    @property
    def opened(self) -> int:
        """How many streams were opened, reconnects included."""
        return sum(self._opened)

    def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until *condition* is true: what was to fail has failed."""
        self._wait(condition, "the failure", seconds)

    def checked(self) -> list[str]:
        """Wait until what is published now has had its time; return all that went wrong since the last call."""
        # More than is out: who was cut can have these only after it came back.
        until = self.published + 3
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all(seen and seen[-1] >= until for seen in self._seen):
            time.sleep(0.02)
        # Now: a client that was cut has read on since, and has noted it.
        self.errors, wrong = [], self.errors
        self.cuts, cuts = [], self.cuts
        for number, seen in enumerate(self._seen):
            numbers = [n for n in list(seen) if n <= until]
            if missing := set(range(numbers[0] if numbers else 0, until + 1)) - set(numbers):
                wrong.append(f"client {number} lost {sorted(missing)[:5]}")
            if len(numbers) != len(set(numbers)):
                wrong.append(f"client {number} read something twice")
            if numbers != sorted(numbers):
                wrong.append(f"client {number} read out of order")
            del seen[: max(0, len(numbers) - 1)]
        return wrong + [f"cut: {cut}" for cut in cuts]

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} took too long: {self.errors[-3:]}"
            time.sleep(0.02)

    # --- inside

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        address, port = self.cluster.connect_to(SERVICE)
        return http.client.HTTPConnection(address, port, timeout=seconds)

    def _listen(self, number: int) -> None:
        last = ""
        while not self._stop.is_set():
            try:
                last = self._stream(number, last)
            except OSError as error:
                self.errors.append(f"client {number}: {error!r}")
            time.sleep(0.05)

    def _stream(self, number: int, last: str) -> str:
        parser = Parser(last_event_id=last)
        connection = self._connection(seconds=10)
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"} | ({"Last-Event-ID": last} if last else {})
        try:
            connection.request("GET", f"/events?topic=audit&user=u{number}", headers=headers)
            response = connection.getresponse()
            if response.status != 200 or "X-Sse-Fallback" in response.headers:
                self.errors.append(f"client {number}: {response.status}, fallback {response.headers.get('X-Sse-Fallback')}")
                time.sleep(0.1)
                return last
            while not self._stop.is_set():
                data = response.read1(65536)
                if not data:
                    break
                for event in parser.feed(data):
                    if event.event == "stream.open":
                        self._opened[number] += 1
                    elif event.event == "stream.reset":
                        self.errors.append(f"client {number}: {event.data}")
                    elif event.event == "message" and event.data.isdigit():  # others broadcast, too
                        self._seen[number].append(int(event.data))
        except (http.client.IncompleteRead, ConnectionResetError, http.client.RemoteDisconnected) as error:
            self.cuts.append(f"client {number}: {error!r}")
        finally:
            connection.close()
        return parser.last_event_id

    def _publish(self) -> None:
        while not self._stop.wait(0.04):
            number = self.published + 1
            body = json.dumps({"topics": ["audit"], "data": str(number)})
            headers = {"Content-Type": "application/json", "Idempotency-Key": f"audit-{number}"}
            while not self._stop.is_set():
                try:
                    connection = self._connection(seconds=10)
                    connection.request("POST", "/publish", body, headers)
                    status = connection.getresponse().status
                    connection.close()
                    if status == 201:
                        break
                    self.errors.append(f"publisher: {status}")
                except (OSError, http.client.HTTPException) as error:
                    self.errors.append(f"publisher: {error!r}")
                time.sleep(0.05)
            self.published = number
