"""Draw the README's picture of a run: how it trained, and what the target accepts of the draft.

    python dev/readme_picture.py RUN_DIR docs/default_run.svg

The file brings its colours and its ground, so that it can be read on a light and on a dark page.
"""

import sys
from pathlib import Path

from eagle3.runs.report import Plot, read_plots, templates

WIDTH, HEIGHT, GAP = 860, 300, 20
LABELLED = {"points": True, "values": True}
PICTURE = """{% from "figures.html" import drawing, styles %}
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}">
<title>Loss, acceptance length and acceptance by position of a run</title>
<style>{{ styles() }}
.title { font: 600 13px system-ui, sans-serif; fill: var(--ink); }
</style>
<rect width="{{ width }}" height="{{ height }}" rx="8" style="fill: var(--page)"/>
{% for title, plot, x_label, marks in panels %}
<g transform="translate({{ gap + loop.index0 * (plot.width + gap) }} 20)">
<text class="title" x="4" y="12">{{ title }}</text>
<g transform="translate(0 22)">{{ drawing(plot, x_label, **marks) }}</g>
</g>
{% endfor %}
</svg>
"""


def draw(run_dir: Path) -> str:
    plots, names = read_plots(run_dir), ("loss", "evaluations", "position")
    missing = [name for name in names if name not in plots]
    if missing:
        sys.exit(f"{run_dir} has no numbers for {', '.join(missing)}")
    width = (WIDTH - 4 * GAP) / 3
    loss, evaluations, position = (
        Plot(plots[name].lines, plots[name].floor, width, HEIGHT - 52) for name in names
    )
    panels = [
        ("Loss", loss, "update", {}),
        ("Acceptance length, held-out", evaluations, "update", LABELLED),
        ("Accepted by position", position, "position", LABELLED),
    ]
    template = templates().from_string(PICTURE)
    return template.render(width=WIDTH, height=HEIGHT, gap=GAP, panels=panels)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(Path(sys.argv[1])), encoding="utf-8")
