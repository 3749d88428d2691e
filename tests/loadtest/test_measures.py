"""Figures of several processes become one without losing a bit."""

import random

from hdrh.histogram import HdrHistogram

from loadtest.measures import Collected, Measures, milliseconds
from loadtest.parts import Watch, memory
from loadtest.result import figures


class TestCollected:
    def test_merged_is_as_measured_by_one(self):
        """Three processes' histograms make the percentiles of one that measured all."""
        picked = random.Random(7)
        apart, alone = [Measures() for _ in range(3)], Measures()
        for at in range(3000):
            # One process is slow: an average of percentiles would hide it.
            seconds = picked.uniform(0.001, 0.01) if at % 3 else picked.uniform(1, 2)
            for measures in (apart[at % 3], alone):
                measures.took("delivery", seconds)
                measures.tally["deliveries"] += 1
        collected, one = Collected(), Collected()
        for at, measures in enumerate(apart):
            collected.add(str(at), measures.hand_over())
        one.add("alone", alone.hand_over())
        collected.end()
        one.end()

        merged, whole = figures(collected, 1, 1), figures(one, 1, 1)

        names = [name for name in merged if name.startswith("delivery_")]
        assert 5 == len(names)
        assert {name: whole[name] for name in names} == {name: merged[name] for name in names}
        assert merged["delivery_p50_ms"] < 15 < 1000 < merged["delivery_p90_ms"]
        assert 3000 == merged["deliveries"]

    def test_a_process_that_stood_still(self):
        """It was late once, but a percentile must show it: what was due meanwhile was late, too."""
        measures = Measures()
        for _ in range(2900):
            measures.took_late("lag", 0.001, 0.02)
        measures.took_late("lag", 5.0, 0.02)

        assert 250 == measures.times["lag"].total_count - 2900
        assert milliseconds(measures.times["lag"], 99) > 3000

    def test_deliveries_without_a_latency(self):
        """Events that another machine published are in the charts all the same."""
        measures, collected = Measures(), Collected()
        measures.tally.update({"deliveries": 5, "other_clock": 5})
        collected.add("a", measures.hand_over())
        collected.end()

        assert 5 == collected.timeline[0]["deliveries"] == figures(collected, 1, 1)["deliveries_per_second_max"]

    def test_handed_over_once(self):
        """What was handed over is not handed over again."""
        measures, collected = Measures(), Collected()
        measures.counts.lost = 3
        measures.tally["connects"] = 2
        measures.took("open", 0.1)
        collected.add("a", measures.hand_over())
        measures.counts.lost = 1  # two came late
        collected.add("a", measures.hand_over())

        assert 1 == collected.counts.lost
        assert 2 == collected.tally["connects"]
        assert 1 == collected.times["open"].total_count

    def test_streams_of_all_processes(self):
        measures, collected = Measures(), Collected()
        for worker, count in (("a", 3), ("b", 4), ("a", 1)):
            measures.open = count
            collected.add(worker, measures.hand_over())

        assert (5, 7) == (collected.open, collected.most_open)

    def test_timeline(self):
        """One point for each second, with what all processes reported for it."""
        collected = Collected()
        for worker in ("a", "b"):
            for second in range(10):
                measures = Measures()
                measures.took("delivery", 0.010)
                measures.tally.update({"connects": 2, "deliveries": 1})
                measures.open = second
                report = measures.hand_over() | {"at": 1000.0 + second}
                collected.add(worker, report)
        collected.end()

        assert 20 == sum(point["deliveries"] for point in collected.timeline)
        assert 40 == sum(point["connects"] for point in collected.timeline)
        assert sorted({point["at"] for point in collected.timeline}) == [point["at"] for point in collected.timeline]

    def test_cpu_of_a_step(self):
        """The busiest process since the step began; what was before it says nothing of it."""
        collected = Collected()

        def report(**percents: float) -> None:
            for worker, percent in percents.items():
                collected.add(worker, Measures().hand_over() | {"seconds": 1.0, "cpu_percent": percent})

        report(a=10.0, b=99.0)
        collected.begin_step()
        report(a=90.0, b=50.0)
        report(a=95.0, b=50.0)

        assert 92.5 == collected.step()["cpu_percent"]

    def test_reports_that_are_no_whole_seconds(self):
        """A process reports every 1.05 s: no second looks empty or doubled, and no stream seems to have been away."""
        collected = Collected()
        for number in range(1, 60):
            for worker, count, phase in (("a", 100, 0.02), ("b", 50, 0.5)):
                measures = Measures()
                measures.open = count
                measures.tally["deliveries"] = round(count * 1.05)
                collected.add(worker, measures.hand_over() | {"at": 1000 + phase + number * 1.05, "seconds": 1.05})
        collected.add(
            "a", measures.hand_over() | {"at": 1062.3, "seconds": 0.33, "tally": {"deliveries": 33}, "open": 100}
        )
        collected.end()

        inner = collected.timeline[2:-2]
        assert {150} == {point["open"] for point in inner}
        assert all(145 <= point["deliveries"] <= 155 for point in inner), [point["deliveries"] for point in inner]
        assert collected.tally["deliveries"] == sum(point["deliveries"] for point in collected.timeline)
        assert 145 <= figures(collected, 1, 1)["deliveries_per_second_max"] <= 155

    def test_burst(self):
        """What all processes did in one moment was done in one second, wherever their reports begin and end."""
        collected = Collected()
        for at, worker, connects in ((1000.3, "a", 0), (1000.9, "b", 0), (1001.3, "a", 70), (1001.9, "b", 30), (1002.3, "a", 0)):
            report = Measures().hand_over() | {"at": at, "seconds": 1.0, "tally": {"connects": connects}}
            collected.add(worker, report)
        collected.end()

        assert 100 == figures(collected, 1, 1)["connects_per_second_max"]


class TestMilliseconds:
    def test_nothing(self):
        assert milliseconds(HdrHistogram(1, 3_600_000_000, 3), 50) is None

    def test_maximum_is_exact(self):
        """Three digits are for percentiles; the maximum is the value itself."""
        measures, collected = Measures(), Collected()
        measures.took("delivery", 1.234567)
        collected.add("a", measures.hand_over())

        assert 1234.567 == milliseconds(collected.times["delivery"], 100)


class TestWatch:
    def test_this_process(self, tmp_path):
        """The parts of a stack are the processes that its folder names."""
        import os

        (tmp_path / "app-1.pid").write_text(f"{os.getpid()} boot:1")
        watch = Watch(tmp_path)
        deadline = sum(range(3_000_000))
        assert deadline
        watch.sample(True)

        rows = {row["part"]: row for row in watch.end(10)}

        assert {"generator", "app-1", "kernel (TCP buffers)"} == set(rows)
        assert rows["app-1"]["cpu_percent"] > 0
        assert 0.5 * memory(os.getpid()) < rows["app-1"]["memory_mb"] * 1e6 < 2 * memory(os.getpid())
        assert watch.busiest().keys() == {"generator", "app-1", "machine"}
