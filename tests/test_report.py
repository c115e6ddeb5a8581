"""The page as a browser's parser sees it: what it says, that nothing in it runs or is loaded from
elsewhere.
"""

import io
import json
import re
import runpy
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from rich.console import Console

from eagle3.runs.disk import read_json
from eagle3.runs.logger import REDACTED
from eagle3.runs.report import Plot, summary, write_report

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags with their attributes, visible text by tag, table rows."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text, self.rows = [], [], {}, []
        self.feed(path.read_text())
        self.headline = " ".join("".join(self.text["p"]).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)
            if self.open[-1] in ("td", "th"):
                self.rows[-1][-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def result(length, speedup, lossless, **more):
    """A row as the built-in benchmark writes it."""
    row = {
        "config": [1, 3, 1, 4], "num_prompts": 80, "lossless": lossless, "first_round": 1.75,
        "acceptance_length": length, "interval95": [length - 0.1, length + 0.1],
        "acceptance_length_loop_free": 2.22, "loops": 3, "bigram": 1.18, "prompt_lookup": 1.31,
        "accepted_by_position": [0.7, 0.6, 0.5], "speedup": speedup,
        "speedup_interval95": [speedup - 0.2, speedup + 0.2],
        "tokens_per_second": 100 * speedup, "baseline_tokens_per_second": 100.0,
    }  # fmt: skip
    return row | more


def write(run_dir, **files):
    """A run folder; run.json is always there."""
    lines = "".join(json.dumps(row) + "\n" for row in files.pop("metrics", []))
    (run_dir / "metrics.jsonl").write_text(lines)
    for name, content in {"run": RUN, **files}.items():
        (run_dir / f"{name}.json").write_text(json.dumps(content))
    return run_dir


def page_of(run_dir, **files):
    return Page(write_report(write(run_dir, **files)))


def training(updates):
    """Lines of metrics.jsonl."""
    for step in range(1, updates + 1):
        row = {"step": step, "loss": 3 / step, "tokens_per_second": 1000.0 + step}
        row |= {"data_wait_fraction": 0.01, "peak_memory_bytes": 2**31}
        row |= {f"loss/step_{k}": 1 / step + k for k in range(7)}
        yield row | {f"accuracy/step_{k}": 0.5 for k in range(7)}


EVALUATED = {10: 1.5, 20: 2.25, 40: 2.0}
METRICS = [*training(40)]
METRICS += [{"step": step, "eval/acceptance_length": value} for step, value in EVALUATED.items()]
RUN = {
    "config": {"name": f"run {EVIL}", "train": {"tokens_per_step": 4096}, "hf_token": "SESAME"},
    "overrides": [f"name={EVIL}", "hub.token=SESAME"], "git": "abcdef+",
    "versions": {"torch": "2.13.0"}, "hardware": {"device": "cuda", "name": "H200 & co"},
    "inputs": {"prepared": {"documents": 12}, "generated": {"vocab_coverage": 0.9734}},
}  # fmt: skip
SUITES = {f"mt {EVIL}": [result(2.41, 1.52, True), result(3.02, 1.93, "tie", tie_gap=0.00123)]}
SUITES["$x_1$"] = [result(2.0, 1.2, True)]
PROTOCOL = {"temperature": 0.0, "system_prompt": EVIL, "max_new_tokens": 20000}
EVALUATION = {
    "draft_length": 2, "acceptance_length": {"1": 1.6, "2": 2.1, "10": 3.7}, "first_round": 1.95,
    "accepted_at": [0.6, 0.5], "loop_free": 2.05, "loops": 5, "answers": 64, "update": 20,
}  # fmt: skip
FULL = {"metrics": METRICS, "benchmark": {"suites": SUITES, "protocol": PROTOCOL}}
FULL["evaluation"] = EVALUATION


def printed(run_dir):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary(run_dir, ["train", "benchmark"]))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_page(tmp_path):
    """Nothing runs or is loaded, hostile names are text, secrets are gone; what is said where."""
    parsed, text = page_of(tmp_path, **FULL), (tmp_path / "report.html").read_text()
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name.startswith("on") for name in attributes), tag
        assert not attributes.keys() & {"src", "href", "xlink:href", "action"}, tag
    assert not re.findall(r"https?://|@import|url\(", text)
    (policy,) = [meta for meta in parsed.named("meta") if "http-equiv" in meta]
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert parsed.text["h1"] == parsed.text["title"] == [f"run {EVIL}"]
    assert {f"mt {EVIL}", "$x_1$"} <= set(parsed.text["li"])
    folded = " ".join(parsed.text["pre"])
    assert EVIL in folded and "tokens_per_step: 4096" in folded
    assert "SESAME" not in text and REDACTED in folded

    said = "Acceptance length 2.00–3.02 on 2 suites, 1.20–1.93 times the speed"
    assert parsed.headline.startswith(said) and "but for ties" in parsed.headline
    tiles = [words for words in parsed.text["b"] if words.strip()]
    assert tiles == ["2.00–3.02", "1.20–1.93×", "120–193", "100", "tie", "2.10", "97.3%"]
    header, first, second, third = [row for row in parsed.rows if len(row) > 5]
    assert len(header) == len(first) == 16
    assert [row[0] for row in (first, second, third)] == [f"mt {EVIL}", f"mt {EVIL}", "$x_1$"]
    expected = {"batch, steps, top-k, verify": "1, 3, 1, 4", "acceptance length": "2.41"}
    expected |= {"95 % interval": "2.31 – 2.51", "tokens/s with draft": "152"}
    expected |= {"speedup": "1.52×", "lossless": "yes", "widest tie": "–"}
    assert expected.items() <= dict(zip(header, first, strict=True)).items()
    assert second[9:11] == ["tie", "0.00123"]
    facts = {row[0]: row[1] for row in parsed.rows if len(row) == 2}
    expected = {"loop free": "2.05", "answers": "64", "temperature": "0.00", "step": "40"}
    expected |= {"system prompt": EVIL, "max new tokens": "20,000", "tokens per second": "1,040"}
    assert expected.items() <= facts.items() and "acceptance length" not in facts
    assert [svg["aria-label"] for svg in parsed.named("svg")] == [
        "Acceptance length by draft length", "Accepted by position",
        "Acceptance length while training", "Loss", "Loss by step", "Accuracy by step",
    ]  # fmt: skip
    assert {"best 2.25 at update 20", "1.60", "2.10", "3.70"} <= set(parsed.text["text"])
    assert parsed.text["li"].count("step 6") == 2
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_points_lie_inside_a_drawing_in_their_order():
    plot = Plot({"a": [(1, 0.5), (2, 0.25)], "b": [(4, 1.0)]}, floor=0)
    assert plot.left < plot.x(1) < plot.x(2) < plot.x(4) < plot.right
    assert plot.bottom == plot.y(0) > plot.y(0.25) > plot.y(1.0) > plot.top
    assert plot.x_ticks == [(1.0, "1"), (2.0, "2"), (3.0, "3"), (4.0, "4")]
    assert plot.y_ticks[:3] == [(0.0, "0.0"), (0.2, "0.2"), (0.4, "0.4")]


@pytest.mark.parametrize(
    "values", [[], [0.0], [2.5, 2.5], [1e-9, 2e-9], [1e12, 3e12], [-1.0, 1.0], [0.004, 0.0]]
)
def test_any_numbers_can_be_drawn(values):
    plot = Plot({"": list(enumerate(values, 1))})
    assert plot.x_ticks and plot.y_ticks
    assert all(plot.top <= plot.y(value) <= plot.bottom for value in values)


LOSSLESS = [
    ([True, True], "is lossless"), ([True, False], "is NOT lossless"), ([True, "tie"], "ties"),
    ([None], "at temperature 0 only"),
]  # fmt: skip


@pytest.mark.parametrize(("lossless", "said"), LOSSLESS)
def test_losslessness_is_that_of_the_worst_row(tmp_path, lossless, said):
    rows = [result(2.0, 1.5, value) for value in lossless]
    headline = page_of(tmp_path, benchmark={"suites": {"mtbench": rows}}).headline
    assert headline.startswith("Acceptance length 2.00 on mtbench, 1.50 times") and said in headline


def test_runs_that_measured_little(tmp_path):
    """Nothing; training alone; then values that are missing: the target alone has no rounds, a step
    without a pair no accuracy, and updates may be logged after others.
    """
    parsed = page_of(tmp_path)
    assert parsed.headline == "No acceptance length was measured." and not parsed.named("figure")
    assert printed(tmp_path) == []
    parsed = page_of(tmp_path, evaluation=EVALUATION)
    assert "2.10 on held-out prompts with 2 drafted tokens" in parsed.headline
    assert len(parsed.named("figure")) == 2 and "held-out prompts" in parsed.text["li"]
    (tmp_path / "evaluation.json").unlink()
    rows = [{"step": 1, "eval/acceptance_length": 1.5}, *training(2)]
    rows[1] |= {"loss": None, "accuracy/step_0": None}
    rows[2] |= {"accuracy/step_0": None}
    missing = ("acceptance_length", "interval95", "acceptance_length_loop_free", "first_round")
    alone = result(1.0, 1.0, True) | dict.fromkeys(missing)
    alone |= {"config": [1, 0, 0, 0], "accepted_by_position": []}
    suites = {"a": [alone, result(2.0, 1.5, True)]}
    parsed = page_of(tmp_path, metrics=rows, benchmark={"suites": suites, "protocol": {}})
    assert parsed.headline.startswith("Acceptance length 2.00 on a, 1.00–1.50 times")
    assert len(parsed.named("figure")) == 5 and "step 6" in parsed.text["li"]
    assert "–" in " ".join(printed(tmp_path))
    (tmp_path / "benchmark.json").write_text('{"a": NaN, "b": -Infinity}')
    assert read_json(tmp_path / "benchmark.json") == {"a": None, "b": None}


def test_a_long_run_makes_a_small_page_and_keeps_its_best(tmp_path):
    metrics = list(training(5000))
    metrics += [{"step": s, "eval/acceptance_length": 2 + (s == 777)} for s in range(1, 2000, 2)]
    path = write_report(write(tmp_path, metrics=metrics))
    assert path.stat().st_size < 200_000 and "best 3.00 at update 777" in path.read_text()


def test_summary_in_a_narrow_terminal(tmp_path):
    suites = {f"mt[bold]_with_a_name_{n}": [result(1.41 + n, 1.52, "tie")] for n in range(6)}
    lines = printed(write(tmp_path, benchmark={"suites": suites}, evaluation=EVALUATION))
    assert not summary(tmp_path, ["export"]).renderables, "a stage that ran before has shown it"
    assert all(len(line) <= 80 for line in lines) and any("mt[bold]" in line for line in lines)
    found = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines if "drafted" in line)
    assert [found[f"{length} drafted"] for length in (1, 2, 10)] == ["1.60", "2.10", "3.70"]
    text = " ".join(lines)
    assert all(f"{n}.41" in text for n in range(1, 7)) and text.count("1.52×") == 6


def test_scores_and_warnings_are_shown_where_there_are_any(tmp_path):
    """An engine's rows have no baselines without a model; what was not measured takes no column."""
    scores = {"score": 0.75, "baseline_score": 0.8, "num_scored": 80, "equal_answers": 0.5}
    more = scores | {"warning": "too bad", "first_round": None, "config": [4, 7, 10, 60]}
    row = result(1.0, 0.9, False, **more)
    del row["bigram"], row["prompt_lookup"]
    parsed = page_of(tmp_path, benchmark={"suites": {"gsm8k": [row]}, "protocol": {}})
    assert "score" in (text := " ".join(printed(tmp_path))) and "0.75" in text
    assert parsed.headline.endswith("gsm8k [4, 7, 10, 60]: too bad.")
    heads = parsed.rows[0]
    assert "answers equal to the target's own" in heads and "acceptance, bigram" not in heads


def test_the_readme_picture_is_well_formed(tmp_path):
    draw = runpy.run_path(str(ROOT / "dev/readme_picture.py"))["draw"]
    picture = draw(write(tmp_path, **FULL))
    assert len(list(ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g"))) == 13
