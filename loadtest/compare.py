"""
Set two results side by side.
"""

from loadtest.result import FIGURES, Result

# Below this, a difference is the machine's mood.
NOTICEABLE_PERCENT = 10.0
# Of these more is better; of some, neither; of all others less is.
_MORE = {"opened_percent", "deliveries", "deliveries_per_second", "deliveries_per_second_max", "published", "opened",
         "runs", "runs_done", "tokens"}  # fmt: skip
_NEITHER = {
    "streams",
    "streams_most",
    "connects",
    "connects_per_second_max",
    "reconnects",
    "other_clock",
    "most_per_user",
}


def compare(a: Result, b: Result) -> str:
    """Return a table of all figures of *a* and *b*, and what is better or worse in *b*."""
    lines = [
        f"A  {a.scenario}, {a.target}, {a.began}, {a.verdict}",
        f"B  {b.scenario}, {b.target}, {b.began}, {b.verdict}",
    ]
    lines += [
        f"Not alike: {name} is {getattr(a, name)} in A and {getattr(b, name)} in B."
        for name in ("scenario", "workers", "machine")
        if getattr(a, name) != getattr(b, name)
    ]
    if a.figures["streams"] != b.figures["streams"]:
        lines.append(f"Not alike: streams is {a.figures['streams']:g} in A and {b.figures['streams']:g} in B.")
    if abs(a.seconds - b.seconds) > NOTICEABLE_PERCENT / 100 * max(a.seconds, b.seconds):
        lines.append(f"Not alike: seconds is {a.seconds:g} in A and {b.seconds:g} in B; so are all counts.")
    lines.append(f"{'':<28}{'A':>14}{'B':>14}{'change':>10}")
    for name in FIGURES:
        before, after = a.figures.get(name), b.figures.get(name)
        if before or after:
            lines.append(f"{name:<28}{_shown(before):>14}{_shown(after):>14}{_change(name, before, after)}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _change(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None or before == after:
        return f"{'':>10}"
    if not before:
        return f"{'new':>10}" + ("" if name in _NEITHER | _MORE else "  worse")
    percent = 100 * (after - before) / before
    word = ""
    if name not in _NEITHER and abs(percent) >= NOTICEABLE_PERCENT:
        word = "  better" if (percent > 0) == (name in _MORE) else "  worse"
    return f"{percent:>+9.1f}%{word}"
