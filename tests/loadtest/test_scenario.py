"""Scenarios and thresholds are data, and a mistake in them is told by name."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest.options import OPTIONS
from loadtest.result import FIGURES
from loadtest.scenario import ScenarioError, Threshold, load_scenarios, load_thresholds, parse_threshold

ROOT = Path(__file__).parents[2]
README = (ROOT / "loadtest/README.md").read_text()


class TestScenarios:
    def test_shipped(self):
        """All that the README lists, no other."""
        assert list(load_scenarios()) == re.findall(r"(?m)^\| `([a-z-]+)` \| [0-9,]+ \|", README)

    def test_streams_and_topics(self):
        """Ten thousand streams of an average load have 200 topics of 50."""
        scenarios = load_scenarios()

        assert 200 == scenarios["average-load"].topics(10_000)
        assert 1 == scenarios["fan-out"].topics(10_000)
        assert 10_000 == scenarios["per-user"].topics(10_000)

    def test_lasting(self):
        """SECONDS stretches all stages and what is done during them."""
        storm = load_scenarios()["reconnect-storm"].lasting(120)

        assert 120 == storm.seconds
        assert [30, 70] == [action.at for action in storm.actions]

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("strems = 5", "strems is no field; known are about, streams"),
            ("streams = '5'", "streams must be of type int"),
            ("streams = true", "streams must be of type int"),
            ("rate = -1", "rate must not be negative"),
            ("stages = []", "stages must be given"),
            ("stages = [{ streams = 2, seconds = 1 }]", "stages must have streams from 0 to 1"),
            ("stages = [{ streams = 1 }]", "stages must have streams (0 to 1) and seconds"),
            ("users = { subscribers = 1 }", "users must have weights for some of subscriber, slow"),
            ("actions = [{ at = 1, do = 'explode' }]", "actions must do one of disconnect"),
            ("actions = [{ at = 1, do = 'disconnect' }]", "actions must be within the last stage"),
        ],
    )
    def test_mistakes(self, tmp_path, text, sentence):
        whole = {"about": '"x"', "streams": "1", "stages": "[{ streams = 1, seconds = 1 }]"}
        name, _, value = text.partition(" = ")
        fields = whole | {name: value}
        (tmp_path / "s.toml").write_text("[mine]\n" + "\n".join(f"{key} = {each}" for key, each in fields.items()))

        with pytest.raises(ScenarioError, match=re.escape(f"scenario mine: {sentence}")):
            load_scenarios(tmp_path / "s.toml")


class TestThresholds:
    def test_shipped(self):
        """Each scenario's are of known figures, and every run is judged by losses and by itself."""
        for name in load_scenarios():
            thresholds = {threshold.figure: threshold for threshold in load_thresholds(name, [], FIGURES)}

            assert thresholds["lost"] == Threshold("lost", "==", 0.0)
            assert thresholds["lag_p99_ms"].void

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("[avrage-load]\nthresholds = ['lost == 0']", "[avrage-load] must be all, void or a scenario, smoke, average-load"),
            ("[smoke]\nthreshold = ['lost == 0']", "smoke must be a table with thresholds"),
            ("[smoke]\nthresholds = 'lost == 0'", "smoke must be a table with thresholds"),
        ],
    )
    def test_never_looked_at(self, tmp_path, text, sentence):
        """A threshold that a slip of the pen puts out of use could never fail."""
        (tmp_path / "t.toml").write_text(text)

        with pytest.raises(ScenarioError, match=re.escape(sentence)):
            load_thresholds("smoke", [], FIGURES, tmp_path / "t.toml", list(load_scenarios()))

    def test_own_file_without_void(self, tmp_path):
        """Whose file says nothing of the generator has the shipped thresholds on it."""
        (tmp_path / "t.toml").write_text("[all]\nthresholds = ['lost == 0']")

        found = load_thresholds("smoke", [], FIGURES, tmp_path / "t.toml")

        assert {"lag_p99_ms", "cpu_percent", "generator_errors"} == {each.figure for each in found if each.void}

    def test_limits(self):
        """The scenario that asks whether the limit is kept has a threshold on it, by default of the kit's own."""
        for overrides, bound in (([], 10), (["most_per_user <= 3"], 3)):
            assert Threshold("most_per_user", "<=", bound, needed=True) in load_thresholds("limits", overrides, FIGURES)

    def test_overrides(self):
        """Later ones replace earlier ones; `off` leaves those on the generator."""
        found = load_thresholds("smoke", ["delivery_p99_ms<=7", "lag_p99_ms <= 9"], FIGURES)
        off = load_thresholds("smoke", ["off", "lost<=5"], FIGURES)

        assert Threshold("delivery_p99_ms", "<=", 7.0, needed=True) in found
        assert Threshold("lag_p99_ms", "<=", 9.0, void=True, needed=True) in found
        assert {"lag_p99_ms", "cpu_percent", "generator_errors", "lost"} == {threshold.figure for threshold in off}

    @pytest.mark.parametrize("text", ["lost", "lost <= x", "lost = 0", "1 <= lost"])
    def test_mistakes(self, text):
        with pytest.raises(ScenarioError, match="a threshold must be a figure"):
            parse_threshold(text, FIGURES)

    @pytest.mark.parametrize(
        ("sign", "holds"), [("<=", (1, 1, 0)), (">=", (0, 1, 1)), ("<", (1, 0, 0)), (">", (0, 0, 1)), ("==", (0, 1, 0))]
    )
    def test_signs(self, sign, holds):
        threshold = Threshold("lost", sign, 5.0)

        assert holds == tuple(int(threshold.holds(value)) for value in (4, 5, 6))
        # Where there is no such figure: of [all], and of the scenario's own.
        assert threshold.holds(None)
        assert not replace(threshold, needed=True).holds(None)


class TestReadme:
    def test_figures(self):
        """Every figure is explained; percentiles are, by the name of what they are of."""
        explained = set(re.findall(r"(?m)^\| `([a-z_]+)` \|", README))
        names = {re.sub(r"_(p50|p90|p99|p99_9|max)_ms$", "_ms", name) for name in FIGURES}

        assert set() == names - explained

    def test_options(self):
        """Every option is in the README."""
        for option in OPTIONS:
            assert (
                f"`{option.flag}" in README or f"{option.flag.removeprefix('--').upper().replace('-', '_')}=" in README
            ), option.flag

    def test_every_field_of_a_scenario(self):
        """The comment on top of the fields says what a scenario can have; each is one."""
        for field in dataclasses.fields(next(iter(load_scenarios().values()))):
            if field.name not in ("name", "about", "stages", "actions"):
                assert f"`{field.name}`" in README, field.name
