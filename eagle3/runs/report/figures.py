"""The drawings of report.html: inline SVG in the page's own colours."""

import io
import re

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 400
MAX_SUITES = 6
# Placeholders that become CSS variables in the SVG, so that one drawing serves the light and the
# dark page.
INK, MUTED, GRID, ACCENT, PAGE = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = [f"#0701{suite:02x}" for suite in range(MAX_SUITES)]
CSS_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    PAGE: "var(--page)",
    **{colour: f"var(--series-{suite})" for suite, colour in enumerate(SERIES)},
}
RC = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "eagle3",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
}


def figures(rows: list[dict], evaluation: dict, metrics: list[dict]) -> dict[str, list[dict]]:
    """The figures of each section of the page, each with `title`, `note`, `alt` and `svg`, as far
    as there is data.
    """
    acceptance, training, accepted = [], [], {}
    for row in rows:
        if row["accepted_by_position"]:
            accepted.setdefault(row["suite"], row["accepted_by_position"])
    if not accepted and evaluation:
        accepted = {"held-out prompts": evaluation["accepted_at"]}
    evaluated = series(metrics, "eval/acceptance_length")
    trained = [row for row in metrics if "loss" in row]
    with matplotlib.rc_context(RC):
        if evaluation:
            acceptance.append(draft_length_figure(evaluation["acceptance_length"]))
        if accepted:
            acceptance.append(position_figure(accepted))
        if evaluated:
            acceptance.append(evaluation_figure(evaluated))
        if trained:
            training.append(loss_figure(trained))
            training.append(
                steps_figure(trained, "loss", "Unweighted, for each step of the unroll.")
            )
            note = "Share of supervised tokens whose best drafted token is the target's best."
            training.append(steps_figure(trained, "accuracy", note))
    return {"Acceptance": acceptance, "Training": training}


def series(metrics: list[dict], key: str) -> list[tuple[int, float]]:
    """(update, value) where a line has the key, averaged in groups when there are too many to draw."""
    points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    group = -(-len(points) // MAX_POINTS)
    if group <= 1 or key.startswith("eval/"):
        return points
    groups = (points[start : start + group] for start in range(0, len(points), group))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def new_axes(x_label: str) -> Axes:
    axes = Figure(figsize=(4.2, 2.9), layout="constrained").add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel(x_label)
    return axes


def finished(axes: Axes, title: str, note: str, alt: str) -> dict:
    """A drawn figure for the page: its legend added, as inline SVG in CSS colours."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        axes.figure.legend(
            loc="outside upper left", ncols=max(1, 32 // max(map(len, labels))), fontsize=8
        )
    buffer = io.StringIO()
    axes.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = (
        re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
        .replace("xlink:href", "href")
        .replace("<svg", '<svg role="img"', 1)
    )
    for placeholder, colour in CSS_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return {"title": title, "note": note, "alt": alt, "svg": Markup(svg)}


def draft_length_figure(acceptance_length: dict[str, float]) -> dict:
    """Acceptance length for every number of drafted tokens."""
    axes, points = (
        new_axes("drafted tokens a round"),
        [(int(k), value) for k, value in acceptance_length.items()],
    )
    axes.plot(*zip(*points), color=ACCENT, marker="o", markersize=5)
    for point in points:
        axes.annotate(
            f"{point[1]:.2f}", point, (-3, 5), textcoords="offset points", ha="right", fontsize=8
        )
    axes.set_ylim(bottom=1)
    axes.margins(x=0.1, y=0.15)
    note = "Tokens that each pass of the target yields, its own included; 1 is decoding without a draft."
    return finished(
        axes, "Acceptance length by draft length", note, "Acceptance length by draft length"
    )


def position_figure(accepted: dict[str, list[float]]) -> dict:
    """Share accepted at every position of the draft, one line a suite, for as many suites as there
    are colours.
    """
    axes = new_axes("position in the draft")
    for (suite, shares), colour in zip(accepted.items(), SERIES, strict=False):
        axes.plot(
            range(1, len(shares) + 1),
            shares,
            color=colour,
            marker="o",
            markersize=4,
            label=suite[:24],
        )
    axes.set_ylim(bottom=0)
    note = "Share of rounds in which the drafted token at each position was accepted."
    return finished(axes, "Accepted by position", note, "Share accepted by position in the draft")


def evaluation_figure(points: list[tuple[int, float]]) -> dict:
    """Acceptance length over updates, the best one marked, of equal ones the first."""
    axes, best = new_axes("update"), max(points, key=lambda point: point[1])
    axes.plot(*zip(*points), color=ACCENT, marker="o", markersize=3.5)
    axes.plot(
        *best, color=ACCENT, marker="o", markersize=9, markerfacecolor=PAGE, markeredgewidth=2
    )
    side = "right" if best[0] > (points[0][0] + points[-1][0]) / 2 else "left"
    text = f"best {best[1]:.2f} at update {best[0]:,}"
    axes.annotate(text, best, (0, 9), textcoords="offset points", ha=side, fontweight="bold")
    axes.margins(y=0.18)
    note = "On held-out prompts that the target answered; the checkpoint marked here is the one exported."
    return finished(
        axes, "Acceptance length while training", note, f"Best {best[1]:.2f} at update {best[0]}"
    )


def loss_figure(metrics: list[dict]) -> dict:
    """Loss over updates."""
    axes = new_axes("update")
    axes.plot(*zip(*series(metrics, "loss")), color=ACCENT)
    note = "The weighted sum over the steps of the unroll, as it is minimised."
    return finished(axes, "Loss", note, "Loss over updates")


def steps_figure(metrics: list[dict], what: str, note: str) -> dict:
    """`what`/step_k over updates, one line a step, paler from step to step."""
    axes = new_axes("update")
    steps = sum(key.startswith(f"{what}/step_") for key in metrics[0])
    for k in range(steps):
        points, alpha = series(metrics, f"{what}/step_{k}"), 1 - 0.8 * k / steps
        axes.plot(*zip(*points), color=ACCENT, alpha=alpha, linewidth=1.2, label=f"step {k}")
    if what == "accuracy":
        axes.set_ylim(bottom=0)
    return finished(axes, f"{what.capitalize()} by step", note, f"{what} of each step over updates")
