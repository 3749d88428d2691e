"""What the README says is what the code does."""

import re
import sys
from pathlib import Path

import pytest

from app.problem import Problem
from app.settings import Settings, rules, variable
from app.stream import REASONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def settings_table() -> str:
    """Return the table of all settings, made from `app.settings`."""
    rows = ["| Variable | Default | Range | |", "|---|---|---|---|"]
    for name, rule in rules():
        default = getattr(Settings, name)
        if rule.kind == "switch":
            shown, span = ("on" if default else "off"), "on, off"
        elif rule.kind == "choice":
            shown, span = default, ", ".join(rule.choices)
        elif rule.kind == "text":
            shown, span = default, ""
        else:
            unit = " s" if rule.kind == "seconds" else ""
            shown, span = f"{default:.15g}", f"{rule.low:.15g} to {rule.high:.15g}{unit}"
        rows.append(f"| `{variable(name)}` | {f'`{shown}`' if shown else 'empty'} | {span} | {rule.about} |")
    return "\n".join(rows)


def measured_table() -> str:
    """Return the table of limits of the benchmark's kept run."""
    return (ROOT / "loadtest/bench/results/table.md").read_text().split("\n\n")[2].strip()


# What stands between two comments, by the first word of the first one.
TABLES = {"settings": settings_table, "measured": measured_table}


def kept(name: str, text: str) -> tuple[str, str, str]:
    """Return what stands before, in and behind the table *name*."""
    before, rest = text.split(f"<!-- {name}", 1)
    comment, rest = rest.split("-->\n", 1)
    table, after = rest.split(f"<!-- end of {name}", 1)
    return f"{before}<!-- {name}{comment}-->\n", table.strip("\n"), f"<!-- end of {name}{after}"


class TestReadme:
    @pytest.mark.parametrize("name", TABLES)
    def test_tables(self, name: str):
        """Tables are made, not written: `python -m tests.test_docs` writes them anew."""
        assert TABLES[name]() == kept(name, README)[1]

    def test_problem_types(self):
        """Every problem type of the code is explained, and no other."""
        used = set()
        for path in (ROOT / "app").glob("*.py"):
            used |= set(re.findall(r'(?:Problem|cls)\(\s*(\d{3}),\s*"([a-z-]+)"', path.read_text()))
        # And nginx's own, which never reach the application.
        nginx = (ROOT / "nginx/snippets/sse-problem.http.conf").read_text()
        used |= set(re.findall(r"(?m)^    (\d{3})\s+urn:sse-kit:([a-z-]+);", nginx))
        shown = {(status, slug) for slug, status in re.findall(r"`urn:sse-kit:([a-z-]+)` \| (\d{3})", README)}

        assert used == shown

    def test_type_of_a_problem(self):
        """The documented name is what stands in the document."""
        fields = Problem(400, "invalid", "topic", "must be one", 1, "Send one.").fields()

        assert "urn:sse-kit:invalid" == fields["type"]

    def test_reasons(self):
        """Every reason that is explained is one that a stream can have."""
        section = README.split("## How a stream ends", 1)[1].split("\n## ", 1)[0]

        assert set(re.findall(r"^\| `([a-z_]+)`", section, re.MULTILINE)) <= set(REASONS)

    def test_links(self):
        """Every relative link of every README leads somewhere."""
        for readme in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]:
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme.read_text()):
                assert (readme.parent / target).exists(), f"{readme.name}: {target}"

    def test_make_targets(self):
        """Every `make x` in the README is a target of the Makefile."""
        makefile = (ROOT / "Makefile").read_text()

        for target in set(re.findall(r"`make ([a-z-]+)", README)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


if __name__ == "__main__":
    text = README
    for name, table in TABLES.items():
        before, _, after = kept(name, text)
        text = f"{before}{table()}\n{after}"
    (ROOT / "README.md").write_text(text)
    sys.stdout.write("README.md has its tables anew.\n")
