"""
What a browser's own EventSource sees through nginx, two processes and Redis.

Each promise is kept in Chromium and in Firefox.
"""

import time
import urllib.request

REPLAYED_EVENTS = 5000

# Larger than all buffers between the app and the page together, and far from
# the whole replay.
HELD_AFTER_BYTES = 300_000


def numbers(events):
    return [int(event["data"].split()[0]) for event in events]


def resets(site, topic, position):
    """Whether a client that comes back with *position* is told of a loss."""
    url = f"{site.url}/events?topic={topic}&last_event_id={position}"
    with urllib.request.urlopen(url, timeout=10) as stream:
        # A loss follows stream.open at once; otherwise a comment does.
        lines = (line for line in stream if line.startswith((b"event: ", b":")))
        return [b"event: stream.open\n", b"event: stream.reset\n"] == [next(lines), next(lines)]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not met within {seconds} s"
        time.sleep(0.2)


class TestFormat:
    def test_named_events_and_text_arrive_as_published(self, site, publish, browser, topic):
        """
        Names, text outside the BMP, every kind of line end and empty data.
        """
        cases = [
            ("message", "plain", "plain"),
            ("order.created", '{"order":1}', '{"order":1}'),
            ("order.created", {"order": 2, "note": "größer"}, '{"order":2,"note":"größer"}'),
            ("message", "😀 🏳️‍🌈 𝄞", "😀 🏳️‍🌈 𝄞"),
            ("message", "one\ntwo", "one\ntwo"),
            ("message", "one\r\ntwo", "one\ntwo"),
            ("message", "one\rtwo", "one\ntwo"),
            ("message", "\none\n\ntwo\n", "\none\n\ntwo\n"),
            ("message", "", ""),
            ("order.created", "", ""),
            ("message", " led by a space", " led by a space"),
            ("message", ": not a comment", ": not a comment"),
            ("message", "id: 7\nevent: forged\ndata: x", "id: 7\nevent: forged\ndata: x"),
        ]
        browser.aim(site.url)
        source = browser.open(f"/events?topic={topic}", ["order.created", "forged"])
        source.wait_open()

        ids = publish(
            site.url, *({"topics": [topic], "event": event, "data": data} for event, data, _ in cases)
        )
        events = source.wait_events(len(cases))

        assert [(event, shown) for event, _, shown in cases] == [
            (event["event"], event["data"]) for event in events
        ]
        assert ids == [event["id"] for event in events]


class TestKilledProcess:
    def test_every_event_arrives_once_and_in_order(
        self, site, publish, browser, topic, app_of
    ):
        """
        SIGKILL of the serving process loses and repeats nothing.
        """
        browser.aim(site.url)
        source = browser.open(f"/events?topic={topic}")
        killed = app_of(source.wait_open_by())
        publish(site.url, *({"topics": [topic], "data": f"{n}"} for n in range(100)))
        source.wait_events(100)

        killed.kill()
        publish(site.url, *({"topics": [topic], "data": f"{n}"} for n in range(100, 200)))
        successor = app_of(source.wait_open_by(2))
        publish(site.url, *({"topics": [topic], "data": f"{n}"} for n in range(200, 300)))
        events = source.wait_events(300)

        assert list(range(300)) == numbers(events)
        assert 300 == len({event["id"] for event in events})
        assert killed is not successor
        assert [] == source.events("stream.reset")

    def test_every_event_arrives_once_and_in_order_in_the_middle_of_a_replay(
        self, site, publish, browser, topic, app_of
    ):
        """
        SIGKILL half-way through 5,000 replayed events loses and repeats nothing.
        """
        [before] = publish(site.url, {"topics": [topic], "data": "before"})
        for first in range(0, REPLAYED_EVENTS, 1000):
            publish(
                site.url, *(
                    {"topics": [topic], "data": f"{n} {'.' * 1000}"}
                    for n in range(first, first + 1000)
                )
            )
        browser.aim(site.url)
        browser.gate.hold_after(HELD_AFTER_BYTES)

        source = browser.open(f"/events?topic={topic}&last_event_id={before}", characters=200)
        killed = app_of(source.wait_open_by())
        source.wait(lambda: source.streams()[0].received_bytes >= HELD_AFTER_BYTES)
        killed.kill()
        browser.gate.release()
        events = source.wait_events(REPLAYED_EVENTS)

        broken, resumed, *_ = source.streams()
        assert list(range(REPLAYED_EVENTS)) == numbers(events)
        assert [] == source.events("stream.reset")
        # It was the middle, and the browser said so itself.
        assert broken.received_bytes < REPLAYED_EVENTS * 1000 / 2
        assert resumed.last_event_id in {event["id"] for event in events}


class TestNoProcess:
    def test_the_browser_comes_back_when_a_process_does(
        self, site, publish, browser, topic
    ):
        """
        With every process killed, nginx says "later" in a way no EventSource gives up on.
        """
        browser.aim(site.url)
        source = browser.open(f"/events?topic={topic}")
        source.wait_open()
        publish(site.url, {"topics": [topic], "data": "0"})
        source.wait_events(1)

        for app in site.apps:
            app.kill()
        source.wait(lambda: len(source.streams()) > 1 and source.streams()[1].ended)
        for app in site.apps:
            app.start()
        site.apps[0].wait_ready()
        publish(site.url, {"topics": [topic], "data": "1"})
        source.wait_open(2)
        events = source.wait_events(2)

        assert [0, 1] == numbers(events)
        assert not any(said["closed"] for said in source.reports() if said["kind"] == "error")
        assert [] == source.events("stream.reset")


class TestQuietTopic:
    def test_a_client_quiet_for_longer_than_the_window_resumes_without_a_reset(
        self, forgetful_site, publish, browser, topic
    ):
        """
        `stream.position` keeps a silent stream's position inside the window.
        """
        site = forgetful_site
        browser.aim(site.url)
        source = browser.open(f"/events?topic={topic}")
        source.wait_open()
        [early] = publish(site.url, {"topics": [topic], "data": "0"})
        source.wait_events(1)

        # Quiet for longer than the window: with the id of its last event the
        # client would now be told of a loss.
        until(lambda: resets(site, topic, early))
        browser.gate.cut()
        source.wait(lambda: source.streams()[0].ended)
        publish(site.url, *({"topics": [topic], "data": f"{n}"} for n in range(1, 6)))
        source.wait_open(2)
        publish(site.url, *({"topics": [topic], "data": f"{n}"} for n in range(6, 11)))
        events = source.wait_events(11)

        assert list(range(11)) == numbers(events)
        assert [] == source.events("stream.reset")
        assert early != source.streams()[1].last_event_id
