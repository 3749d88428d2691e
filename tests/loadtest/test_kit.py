"""The load test against the kit itself: nginx, two processes, a real Redis, tokens."""

import pytest

from app.stack import reserve_port
from tests.loadtest.runs import BUSY, PATIENT, Run, wrong_with_runs

SECRET = "a secret of 32 bytes, for tests!"


class TestTokens:
    @pytest.mark.parametrize("secret", [SECRET, "another secret of also 32 bytes!"], ids=["right", "wrong"])
    def test_secret(self, tmp_path, stack, secret):
        """Every connect has a token of its own user; a wrong secret is told before the run."""
        kit = stack(apps=2, env={"SSE_AUTH": "jwt", "SSE_JWT_SECRET": SECRET})

        run = Run(
            tmp_path, kit.url, PATIENT, f"--secret={secret}", f"--stack={kit.directory}", per=4, seconds=2,
            scenario="broadcast_rate = 2",
        )  # fmt: skip

        if secret == SECRET:
            assert 0 == run.end(), run.output
            assert (8, 1) == (run.figures["streams_most"], run.figures["most_per_user"])
            # Two topics of four streams, and what goes to all of them.
            assert run.figures["deliveries"] >= 4 * run.figures["published"] > 100
            assert 0 == run.figures["lost"]
        else:
            assert 2 == run.end(), run.output
            assert "The token was refused" in run.lines[-1]
            assert SECRET not in run.output


class TestRuns:
    def test_across_reconnects(self, tmp_path, stack):
        """Every stream breaks twice in the middle of a run, and no word is lost or doubled."""
        kit = stack(apps=2)

        run = Run(
            tmp_path, kit.url, f"{BUSY},opened_percent>=0,runs_done>=8", rate=0, seconds=4, scenario="""
            users = { run = 1 }
            run_every = 2.5
            actions = [{ at = 1, do = "disconnect", share = 1.0 }, { at = 2, do = "disconnect", share = 1.0 }]
            """,
        )  # fmt: skip

        assert 0 == run.end(), run.output
        figures = run.figures
        assert figures["runs"] == figures["runs_done"] >= 8
        assert figures["reconnects"] == run.result["ended"]["disconnected"] > 0
        assert figures["tokens"] > 70 * figures["runs"]
        assert {} == wrong_with_runs(run)


class TestStorm:
    def test_resumes(self, tmp_path, stack):
        """Every stream breaks in the same moment, and misses nothing; two generator processes."""
        kit = stack(apps=2)
        port, holder = reserve_port()

        run = Run(
            tmp_path, kit.url, PATIENT, "--processes=2", f"--master-port={port}", "--streams=40", seconds=4,
            per=10, scenario="actions = [{ at = 1, do = 'disconnect', share = 1.0 }]",
        )  # fmt: skip

        assert 0 == run.end(), run.output
        if holder is not None:
            holder.close()
        assert (40, 40) == (run.figures["reconnects"], run.result["ended"]["disconnected"])
        assert 10 * run.figures["published"] == run.figures["deliveries"]
