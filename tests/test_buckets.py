"""A bucket bounds how often one caller does one thing, and never for ever."""

import pytest

from app.buckets import Buckets


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


class TestBuckets:
    def test_a_burst_and_then_the_rate(self, clock):
        """A full bucket is had at once; afterwards one has to wait, and is told how long."""
        buckets = Buckets(2, 5, clock)
        assert [0.0] * 5 == [buckets.take("a") for _ in range(5)]
        assert buckets.take("a") == pytest.approx(0.5)
        assert buckets.take("a") == pytest.approx(0.5)
        clock.now += 0.5
        assert 0.0 == buckets.take("a")
        assert buckets.take("a") > 0

    def test_each_key_has_its_own(self, clock):
        buckets = Buckets(1, 1, clock)
        assert (0.0, 0.0) == (buckets.take("a"), buckets.take("b"))
        assert buckets.take("a") == buckets.take("b") == pytest.approx(1.0)

    def test_many_at_once(self, clock):
        """As many as a bucket holds, and where it is full even more; they have to be made up for."""
        buckets = Buckets(10, 20, clock)
        assert 0.0 == buckets.take("a", 15)
        assert buckets.take("a", 15) == pytest.approx(1.0)
        assert 0.0 == buckets.take("b", 100)
        assert buckets.take("b") == pytest.approx(8.1)
        clock.now += 8.2
        assert 0.0 == buckets.take("b")

    def test_no_bound(self, clock):
        assert {0.0} == {Buckets(0, 0, clock).take("a", 10**9) for _ in range(3)}

    def test_full_ones_are_forgotten(self, clock):
        """Memory is bounded by those in use."""
        buckets = Buckets(1, 1, clock)
        for n in range(5_000):
            buckets.take(str(n))
            clock.now += 0.01
        assert len(buckets) <= 1_024
