"""
Draw a run as an SVG: four panels of bars, shorter is better but for throughput.

Written by hand, without a drawing library: four rows of rectangles need none, and
the file can be read and compared as text.
"""

from html import escape
from typing import TYPE_CHECKING

from .figures import KIT, Figure

if TYPE_CHECKING:
    from .report import Report

WIDTH = 920
COLUMN = 440
BAR = 16
STEP = 24
LABEL = 150
# Room for the number behind the longest bar.
VALUE = 84
HEAD = 64

PANELS = (
    ("sparse", "CPU per delivery, single events", "µs", 1),
    ("burst", "Deliveries per second, bursts of 10", "", 0),
    ("pss", "Memory per idle stream (PSS)", "KB", 1),
    ("connect", "CPU per connect", "µs", 0),
)

# Readers see it on white and on dark pages.
STYLE = """
text{font:12px system-ui,sans-serif;fill:#1f2328}
.title{font-size:15px;font-weight:600}
.panel{font-size:13px;font-weight:600}
.small{font-size:11px;fill:#59636e}
.other{fill:#b6bec8}
.floor{fill:#7d8590}
.kit{fill:#0969da}
.variant{fill:#80b4ee}
.spread{stroke:#1f2328;stroke-width:1.2}
.kitname{font-weight:600}
@media(prefers-color-scheme:dark){
text{fill:#f0f6fc}.small{fill:#9198a1}.other{fill:#4b535d}.floor{fill:#7d8590}
.kit{fill:#4493f8}.variant{fill:#2b5a94}.spread{stroke:#f0f6fc}}
"""


def draw(report: "Report") -> str:
    """
    Return the SVG of *report*.
    """
    panels = [panel for panel in PANELS if report.figures.get(panel[0])]
    labels = {peer.name: peer.label for peer in report.peers}
    parts: list[str] = []
    top = HEAD
    for start in range(0, len(panels), 2):
        row = panels[start : start + 2]
        tallest = 0
        for place, (key, title, unit, digits) in enumerate(row):
            bars = [(name, figure) for name, figure in report.figures[key].items() if figure.counts and name in labels]
            bars.sort(key=lambda bar: bar[1].median, reverse=key == "burst")
            parts.append(_panel(20 + place * (COLUMN + 10), top, title, unit, digits, bars, labels))
            tallest = max(tallest, len(bars))
        top += 34 + tallest * STEP + 14
    machine = report.machine
    foot = (
        f"{report.date:%Y-%m-%d}, {machine['cpu']}, {machine['cores']} cores, {machine['kernel']},"
        f" {report.size.name} run. Bar: median of the rounds, line: their range."
    )
    height = top + 22
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        f' viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Benchmark of event stream servers">'
        f"<style>{STYLE}</style>"
        f'<text class="title" x="20" y="28">Event streams side by side, one run on one machine</text>'
        f'<text class="small" x="20" y="46">CPU time of the servers, all their processes. The floor is a bare C loop:'
        f" what the kernel alone costs.</text>"
        f"{''.join(parts)}"
        f'<text class="small" x="20" y="{height - 10}">{escape(foot)}</text></svg>\n'
    )


def _panel(
    left: int,
    top: int,
    title: str,
    unit: str,
    digits: int,
    bars: list[tuple[str, Figure]],
    labels: dict[str, str],
) -> str:
    better = "more is better" if title.startswith("Deliveries") else "less is better"
    parts = [
        f'<text class="panel" x="{left}" y="{top + 14}">{escape(title)}</text>',
        f'<text class="small" x="{left + COLUMN - 20}" y="{top + 14}" text-anchor="end">{better}</text>',
    ]
    longest = max((figure.high for _, figure in bars), default=1.0) or 1.0
    room = COLUMN - LABEL - VALUE
    for place, (name, figure) in enumerate(bars):
        y = top + 28 + place * STEP
        kind = "kit" if name == KIT else "variant" if name.startswith(KIT) else "other"
        kind = "floor" if name == "floor" else kind
        length = max(1.0, figure.median / longest * room)
        low, high = (left + LABEL + value / longest * room for value in (figure.low, figure.high))
        weight = ' class="kitname"' if name == KIT else ""
        parts.append(
            f'<text{weight} x="{left + LABEL - 8}" y="{y + 12.5}" text-anchor="end">{escape(labels[name])}</text>'
            f'<rect class="{kind}" x="{left + LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>'
            f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{y + BAR / 2}" y2="{y + BAR / 2}"/>'
        )
        text = f"{figure.median:,.{digits}f} {unit}".strip()
        at = max(left + LABEL + length, high) + 6
        parts.append(f'<text x="{at:.1f}" y="{y + 12.5}">{escape(text)}</text>')
    return "".join(parts)
