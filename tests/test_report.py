"""The page as a browser's parser sees it: what it says, that nothing in it runs or is loaded from
elsewhere, or is cut off.
"""

import html
import io
import json
import re
import runpy
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf
from rich.console import Console

from eagle3.runs.disk import read_json
from eagle3.runs.logger import REDACTED
from eagle3.runs.report import Plot, summary, write_report

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The tree of the page's elements; `table`: rows of cells by the first of them."""

    def __init__(self, path):
        super().__init__()
        self.builder = ElementTree.TreeBuilder()
        self.feed(path.read_text())
        self.root = self.builder.close()
        self.headline = self.said("p[@class='headline']")[0]
        rows = [[words(cell) for cell in row] for row in self.root.iter("tr")]
        self.table = {first: rest for first, *rest in reversed(rows)}

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, {name: value or "" for name, value in attributes})
        if tag == "meta":
            self.builder.end(tag)

    def handle_endtag(self, tag):
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)

    def said(self, path):
        return [words(element) for element in self.root.iterfind(f".//{path}")]

    def named(self, tag):
        return [element.attrib for element in self.root.iter(tag)]


def words(element):
    return " ".join("".join(element.itertext()).split())


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
    "inputs": {
        "prepared": {"documents": 12, "tokens": 34567}, "generated": {"vocab_coverage": 0.9734},
    },
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
    for element in parsed.root.iter():
        assert element.tag not in ("script", "link", "img", "iframe")
        assert not any(name.startswith("on") for name in element.attrib), element.tag
        assert not element.attrib.keys() & {"src", "href", "xlink:href", "action"}, element.tag
    assert not re.findall(r"https?://|@import|url\(", text)
    (policy,) = [meta for meta in parsed.named("meta") if "http-equiv" in meta]
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert parsed.said("h1") == parsed.said("title") == [f"run {EVIL}"]
    assert {f"mt {EVIL}", "$x_1$"} <= set(parsed.said("li"))
    folded = " ".join(parsed.said("pre"))
    assert EVIL in folded and "tokens_per_step: 4096" in folded
    assert "SESAME" not in text and REDACTED in folded

    said = "Acceptance length 2.00–3.02 on 2 suites, 1.20–1.93 times the speed"
    assert parsed.headline.startswith(said) and "but for ties" in parsed.headline
    assert parsed.said("b") == ["2.00–3.02", "1.20–1.93×", "1.31", "tie", "2.10", "97.3%"]
    expected = {"suite": [f"mt {EVIL}", f"mt {EVIL}", "$x_1$"]}
    expected |= {"batch, steps, top-k, verify": ["1, 3, 1, 4"] * 3}
    expected |= {"acceptance length": ["2.41", "3.02", "2.00"], "widest tie": ["–", "0.00123", "–"]}
    expected |= {"tokens/s with draft": ["152", "193", "120"], "lossless": ["yes", "tie", "yes"]}
    expected |= {"speedup": ["1.52×", "1.93×", "1.20×"], "acceptance, bigram": ["1.18"] * 3}
    expected |= {"acceptance, loops left out": ["2.22"] * 3, "answers": ["64"], "update": ["40"]}
    expected |= {"system prompt": [EVIL], "max new tokens": ["20,000"], "documents": ["12"]}
    expected |= {"tokens per second": ["1,040"], "peak memory": ["2.15 GB"]}
    expected |= {"temperature": ["0.00"], "tokens": ["34,567"]}
    assert expected.items() <= parsed.table.items()
    assert parsed.table["95 % interval"][0] == "2.31 – 2.51"
    assert [svg["aria-label"] for svg in parsed.named("svg")] == [
        "Acceptance length by draft length", "Accepted by position",
        "Acceptance length while training", "Loss", "Loss by step", "Accuracy by step",
    ]  # fmt: skip
    assert {"best 2.25 at update 20", "1.60", "2.10", "3.70"} <= set(parsed.said("text"))
    assert parsed.said("li").count("step 6") == 2
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_words_have_their_meaning_on_hover_and_at_the_end(tmp_path):
    parsed = page_of(tmp_path, **FULL)
    meanings = {each["title"] for each in parsed.named("abbr")}
    assert meanings == set(parsed.said("dd")) and len(parsed.said("dt")) == len(meanings) > 20
    unknown = set(parsed.said("tr[@class]/th")) - set(parsed.said("abbr"))
    assert not unknown, "every row of the benchmark has a meaning"
    assert parsed.said("dt") == sorted(parsed.said("dt")) and "bigram" in parsed.said("dt")
    assert "bigram" not in page_of(tmp_path, benchmark={}).said("dt"), "only words that are used"


LOOK_UPS = [
    ({}, "1.31 and a bigram 1.18.", "1.31", ""),
    ({"bigram": None}, "1.31. The output", "1.31", ""),
    ({"bigram": 3.1, "prompt_lookup": 3}, "3.00 and", "3.10", "a bigram (3.10 against 2.00)"),
    ({"prompt_lookup": 2.5}, "2.50 and", "2.50", "prompt look-up (2.50 against 2.00)"),
    ({"prompt_lookup": 2.004}, "2.00 and a bigram 1.18", "2.00", ""),
]


@pytest.mark.parametrize(("changed", "said", "tile", "where"), LOOK_UPS)
def test_what_no_draft_would_give_comes_first(tmp_path, changed, said, tile, where):
    """In the headline, in a large number, and plainly where the draft isn't worth its training."""
    rows = [result(2.0, speedup, True, truncated=7, **changed) for speedup in (1.5, 1.9)]
    rows.append(result(1.0, 1.0, True, config=[1, 0, 0, 0]))  # the target alone
    parsed = page_of(tmp_path, benchmark={"suites": {"a": rows}})
    beaten = f"What needs no draft beats this one: on a by {where}." if where else ""
    assert parsed.headline.startswith(f"{beaten} Acceptance length 2.00".strip())
    assert f"Without any draft, prompt look-up would reach {said}" in parsed.headline
    large = parsed.root.find(".//div[@class='tiles large']")
    numbers = [words(number) for number in large.iter("b")]
    assert numbers == ["2.00", "1.50–1.90×", tile], "three large numbers"
    lines = printed(tmp_path)
    assert lines[0] == beaten and lines[-1].endswith("not scored: 7 of a.")


def test_acceptance_by_the_length_of_prompts(tmp_path):
    """A table and a drawing of all suites together; neither where all prompts are as long."""

    def about(**lengths):
        sizes = {int(size.strip("_")): value for size, value in lengths.items()}
        parts = [
            {"prompt_tokens": n, "acceptance_length": a, "rounds": r, "answers": 4}
            for n, (a, r) in sizes.items()
        ]
        return result(2.0, 1.5, True, by_prompt_length=parts)

    rows = {"a": [about(_1024=(3.0, 10), _2048=(2.5, 10))], "b": [about(_1024=(2.0, 30))]}
    parsed = page_of(tmp_path, benchmark={"suites": rows})
    assert parsed.table["1,024"] == ["2.25 of 8 answers"]
    assert parsed.table["2,048"] == ["2.50 of 4 answers"]
    assert "Acceptance length by prompt length" in [s["aria-label"] for s in parsed.named("svg")]
    assert {"1,024", "2,048"} <= set(parsed.said("text"))
    parsed = page_of(tmp_path, benchmark={"suites": {"b": rows["b"]}})
    assert "1,024" not in parsed.table
    assert "by prompt length" not in words(parsed.root)


def test_the_loss_says_of_which_mask_it_is(tmp_path):
    config = RUN["config"] | {"loss": {"mask": {"_target_": "eagle3.batch.shifted"}}}
    parsed = page_of(tmp_path, metrics=METRICS, run=RUN | {"config": config})
    note = "of loss/mask=shifted: not comparable with losses of another mask."
    assert any(words.endswith(note) for words in parsed.said("figcaption"))


RATES = [
    (214.6, 171.4, "214.6", "171.4"), (152.0, 100.0, "152", "100"), (1.274, 1.0, "1.27", "1.00"),
    (12652.0, 12596.0, "12,652", "12,596"), (0.4, 0.3, "0.4", "0.3"),
]  # fmt: skip


@pytest.mark.parametrize(("fast", "slow", "shown_fast", "shown_slow"), RATES)
def test_rates_do_not_contradict_the_speedup(tmp_path, fast, slow, shown_fast, shown_slow):
    rates = {"tokens_per_second": fast, "baseline_tokens_per_second": slow}
    row = result(2.0, fast / slow, True, **rates)
    parsed = page_of(tmp_path, benchmark={"suites": {"a": [row]}})
    (with_draft,), (without,) = (parsed.table[f"tokens/s {w} draft"] for w in ("with", "without"))
    assert (with_draft, without) == (shown_fast, shown_slow)
    (speedup,) = parsed.table["speedup"]
    quotient = float(with_draft.replace(",", "")) / float(without.replace(",", ""))
    assert f"{quotient:.2f}×" == speedup
    assert f"{with_draft} tokens/s with the draft, {without} without" in words(parsed.root)
    assert with_draft in " ".join(printed(tmp_path))


def test_answers_token_by_token(tmp_path):
    """Each token says where it came from, as text whatever it holds; no answer, no section."""
    rounds = [
        {"accepted": [], "target": "Hi"},
        {"accepted": [EVIL, "\n"], "target": "<b>"},
        {"accepted": [" &amp;"], "target": None},
    ]
    shown = [{"config": [1, 3, 1, 4], "prompt": f"ask {EVIL}", "num_tokens": 9, "rounds": rounds}]
    results = {"suites": SUITES, "samples": {f"mt {EVIL}": shown, "none": []}}
    parsed = page_of(tmp_path, benchmark=results)
    (answer,) = parsed.root.iterfind(".//div[@class='answer']")
    tokens = [(token.get("class"), token.text) for round_ in answer for token in round_]
    drafted = [("drafted", EVIL), ("drafted", "↵\n"), ("own", "<b>"), ("drafted", " &amp;")]
    assert tokens == [("own", "Hi"), *drafted]
    assert [round_.get("title") for round_ in answer] == [
        "before the first round: from reading the question",
        "round 1: 2 drafted tokens accepted, then the target's own",
        "round 2: 1 drafted token accepted",
    ]
    assert parsed.said("blockquote") == [f"ask {EVIL}"]
    said = "question 1 the first 5 of 9 tokens, 4 tokens in 2 rounds: 2.00 a round"
    assert parsed.said("summary")[0] == f"mt {EVIL}, {said}"
    legend = parsed.said("p[@class='note']")[0]
    assert "green tokens" in legend and "the target's own" in legend
    assert "Answers, as they were drafted" not in page_of(tmp_path, **FULL).said("h2")


def test_nothing_is_wider_than_the_page(tmp_path):
    """Tables have boxes that scroll, long words and commands wrap, drawings scale."""
    parsed, text = page_of(tmp_path, **FULL), (tmp_path / "report.html").read_text()
    boxed = list(parsed.root.iterfind(".//div[@class='scroll']/table"))
    assert len(boxed) == len(parsed.named("table")) > 3
    assert all("viewbox" in svg and "width" not in svg for svg in parsed.named("svg"))
    styles = parsed.said("style")[0]
    assert ".scroll { overflow-x: auto; }" in styles and "@media print" in styles
    assert "pre, .answer, blockquote { white-space: pre-wrap; overflow-wrap: anywhere; }" in styles
    assert re.search(r"figure svg {[^}]*width: 100%", styles)
    assert re.search(r"main {[^}]*overflow-wrap: anywhere", styles)
    assert "nowrap" not in styles.replace(".measures td { white-space: nowrap; }", "")
    assert text.count("<details") == text.count("</details") == 4


SPENT = {"prepare": 10.0, "capture": 20.0, "train": 100.0, "benchmark": 30.0, "export": 5.0}
PASSED = {"data": 1.0, "target": 9.0, "draft": 50.0, "checkpoint": 5.0}


def test_where_the_time_went_is_one_bar(tmp_path):
    metrics = [row | {f"seconds/{k}": s / 2 for k, s in PASSED.items()} for row in training(2)]
    metrics.append({"step": 2, "eval/acceptance_length": 2.0, "seconds/evaluation": 15.0})
    parsed = page_of(tmp_path, run=RUN | {"seconds": SPENT}, metrics=metrics)
    (bar,) = parsed.root.iterfind(".//div[@class='bar']")
    shares = [float(part.get("style").rpartition(" ")[2].rstrip("%")) for part in bar]
    parts = [11.0, 29.0, 50.0, 45.0, 10.0, 20.0]
    assert shares == pytest.approx([100 * part / 165 for part in parts], abs=0.01)
    legend = parsed.said("ul[@class='legend']/li")[-6:]
    assert legend[0] == "data 0:11, 7 %" and legend[-1] == "loading and the rest 0:20, 12 %"
    assert "2:45 in all" in words(parsed.root)
    assert "Where the time went" not in page_of(tmp_path).said("h2"), "of an older run"


def test_what_differs_how_to_repeat_it_and_how_to_serve_it(tmp_path):
    config = OmegaConf.to_container(compose_config("model=llama3-8b", "optimizer.lr=3e-4"))
    (tmp_path / "draft").mkdir()
    run = RUN | {"config": config, "overrides": ["optimizer.lr=3e-4", "data.path=a b"]}
    parsed = page_of(tmp_path, run=run)
    assert not parsed.said("pre[@class='copied']")[1:], "no draft was exported"
    (tmp_path / "draft" / "config.json").touch()
    parsed = page_of(tmp_path, run=run)
    serve, command = parsed.said("pre[@class='copied']")
    assert command == "python run.py optimizer.lr=3e-4 'data.path=a b'"
    folder = tmp_path / "draft"
    engines = ("sglang", "vllm", "trtllm")
    assert serve == " ".join(f"bash launch/serve.sh {folder} {engine}" for engine in engines)
    assert len(parsed.said("table[@class='changed']/tr")) == 1
    assert parsed.table["optimizer.lr"] == ["0.0003", "0.0001"]


WIDTHS = (320, 360, 400, 800, 1280, 2560)
FRAME = '<iframe width={} height=600 style="border:0" srcdoc="{}"></iframe>'
MEASURE = """<pre id=widths></pre><script>
onload = () => { widths.textContent = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, right = frame.clientWidth
  const wide = [...page.querySelectorAll("body *")].filter(element =>
    element.getBoundingClientRect().right > right + 1 && !element.closest(".scroll > *"))
  return page.documentElement.scrollWidth - page.documentElement.clientWidth + wide.length
}) }</script>"""


@pytest.mark.runs
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_a_browser_finds_nothing_wider_than_the_page(tmp_path):
    long, row = "path_without_a_space/" * 12, result(2.41, 1.52, True)
    rounds = [{"accepted": [long], "target": long}] * 2
    shown = {"config": [1, 3, 1, 4], "prompt": long, "num_tokens": 4, "rounds": rounds}
    results = {"suites": {f"{n}{long}": [row, row] for n in range(4)}, "protocol": {"stop": long}}
    results["samples"] = {long: [shown]}
    run = RUN | {"overrides": [f"data.path={long}"], "config": {"name": long}}
    path = write_report(write(tmp_path, run=run, **FULL | {"benchmark": results}))
    # What may run nothing could not be measured; all is shown that can be opened.
    page = re.sub("<meta http-equiv.*?>", "", path.read_text()).replace("<details", "<details open")
    frames = "".join(FRAME.format(width, html.escape(page)) for width in WIDTHS)
    (tmp_path / "frames.html").write_text(f"<!doctype html><meta charset=utf-8>{frames}{MEASURE}")
    command = ["chromium", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--disable-gpu", "--dump-dom", f"file://{tmp_path / 'frames.html'}"]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    assert '<pre id="widths">0,0,0,0,0,0</pre>' in dump
    command[-2:] = ["--enable-logging=stderr", "--window-size=400,900", f"file://{path}"]
    shot = f"--screenshot={tmp_path / 'page.png'}"
    said = subprocess.run([*command, shot], capture_output=True, text=True, timeout=300).stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000 and "CONSOLE" not in said, said


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
    assert not parsed.said("p[@class='warning']")
    assert printed(tmp_path) == []
    parsed = page_of(tmp_path, evaluation=EVALUATION)
    assert "2.10 on held-out prompts with 2 drafted tokens" in parsed.headline
    assert len(parsed.named("figure")) == 2 and "held-out prompts" in parsed.said("li")
    (tmp_path / "evaluation.json").unlink()
    rows = [{"step": 1, "eval/acceptance_length": 1.5}, *training(2)]
    rows[1] |= {"loss": None, "accuracy/step_0": None}
    rows[2] |= {"accuracy/step_0": None}
    missing = ("acceptance_length", "interval95", "acceptance_length_loop_free", "first_round")
    alone = result(1.0, 1.0, True) | dict.fromkeys(missing)
    alone |= {"config": [1, 0, 0, 0], "accepted_by_position": []}
    suites = {"a": [alone, result(2.0, 1.5, True)]}
    parsed = page_of(tmp_path, metrics=rows, benchmark={"suites": suites, "protocol": {}})
    assert parsed.headline.startswith("Acceptance length 2.00 on a, 1.50 times")
    assert len(parsed.named("figure")) == 5 and "step 6" in parsed.said("li")
    assert "–" in " ".join(printed(tmp_path))
    (tmp_path / "benchmark.json").write_text('{"a": NaN, "b": -Infinity}')
    assert read_json(tmp_path / "benchmark.json") == {"a": None, "b": None}


def test_what_was_measured_at_several_temperatures(tmp_path):
    """A line and a column each, the exported update marked; one of it alone needs no name."""
    sampled = EVALUATION | {"acceptance_length": {"1": 1.4, "2": 1.8, "10": 2.9}, "loops": 7}
    del sampled["update"]
    evaluation = EVALUATION | {"sampled": {"1": sampled}, "tokens": [91] * 64, "update": 40}
    rows = [{**row, "eval/acceptance_length_t1": 1.25 + row["step"] / 100} for row in METRICS[-3:]]
    parsed = page_of(tmp_path, metrics=[*METRICS[:-3], *rows], evaluation=evaluation)
    text = words(parsed.root)
    assert parsed.said("li").count("temperature 1") == 2
    assert text.count("best 2.00 at update 40") == 1 and "91, 91" not in text
    assert "Held-out evaluation, temperature 1" in parsed.said("h3")
    lines = printed(tmp_path)
    assert any(re.fullmatch(r" *10 drafted +3.70 +2.90", line) for line in lines)
    assert all(len(line) <= 80 for line in lines)


CAPTURED = {"prepared": {"documents": 12}, "generated": {"vocab_coverage": 0.5}}
CAPTURED |= {"hidden_states": {"documents": 7}, "regenerated": [{"answers": 3}, {"answers": 4}]}
TRAINED = {"evaluation": EVALUATION, "metrics": METRICS}
STAGES = [
    (["prepare", "capture"], {}, "measured by the stages prepare, capture.", []),
    (["train", "benchmark"], {}, "measured by", ["stage train", "stage benchmark"]),
    (["train", "benchmark"], TRAINED, "no benchmark was measured.", ["stage benchmark"]),
    (["train"], TRAINED, "no benchmark was measured.", []),
    (["benchmark"], {"benchmark": {"suites": SUITES | {"b": []}}}, "2 suites", ["suite b"]),
]


@pytest.mark.parametrize(("stages", "files", "said", "missing"), STAGES)
def test_runs_of_some_stages_and_those_that_failed(tmp_path, stages, files, said, missing):
    run = RUN | {"config": {"name": "x", "stages": stages}, "inputs": CAPTURED}
    parsed = page_of(tmp_path, run=run, **files)
    assert said in parsed.headline
    sentences = [f"The {name} left no result: it failed or was stopped." for name in missing]
    assert parsed.said("p[@class='warning']") == sentences
    assert {"Hidden states", "Prepared", "Regenerated, 2"} <= set(parsed.said("h3"))


def test_a_pruned_trial_has_not_failed(tmp_path):
    stages = {"name": "x", "stages": ["train", "benchmark"]}
    parsed = page_of(tmp_path, run=RUN | {"config": stages, "pruned": True}, **TRAINED)
    (sentence,) = parsed.said("p[@class='warning']")
    assert sentence.startswith("Optuna ended this run before its last update")


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
    assert all(word in text for word in ("acceptance", "tokens/s", "without", "lossless"))


def test_scores_and_warnings_are_shown_where_there_are_any(tmp_path):
    """An engine's rows have no baselines without a model; what was not measured takes no column."""
    scores = {"score": 0.75, "baseline_score": 0.8, "num_scored": 80, "equal_answers": 0.5}
    more = scores | {"warning": "too bad", "first_round": None, "config": [4, 7, 10, 60]}
    row = result(1.0, 0.9, False, **more)
    del row["bigram"], row["prompt_lookup"]
    parsed = page_of(tmp_path, benchmark={"suites": {"gsm8k": [row]}, "protocol": {}})
    assert "score" in (text := " ".join(printed(tmp_path))) and "0.75" in text
    assert parsed.said("p[@class='warning']") == ["gsm8k [4, 7, 10, 60]: too bad."]
    assert "Without any draft" not in parsed.headline and len(parsed.said("b")) == 4
    assert parsed.table["answers equal to the target's own"] == ["0.5"]
    assert "acceptance, bigram" not in parsed.table


def test_the_readme_picture_is_well_formed(tmp_path):
    draw = runpy.run_path(str(ROOT / "dev/readme_picture.py"))["draw"]
    picture = draw(write(tmp_path, **FULL))
    assert len(list(ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g"))) == 13
