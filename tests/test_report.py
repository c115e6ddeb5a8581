"""The page as a browser's parser sees it: what it says, that nothing in it runs or is loaded from
elsewhere.
"""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from eagle3.runs.logger import REDACTED
from eagle3.runs.report import benchmark_table, summary_table, write_report
from eagle3.runs.report.summary import read_json

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags with their attributes, visible text by tag, table rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.rows = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "path", "use"):
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


def result(acceptance_length, speedup, lossless, **more):
    """A row as the built-in benchmark writes it."""
    return {
        "config": [1, 3, 1, 4],
        "num_prompts": 80,
        "acceptance_length": acceptance_length,
        "interval95": [acceptance_length - 0.1, acceptance_length + 0.1],
        "acceptance_length_loop_free": 2.22,
        "loops": 3,
        "first_round": 1.75,
        "accepted_by_position": [0.7, 0.6, 0.5],
        "tokens_per_second": 100 * speedup,
        "baseline_tokens_per_second": 100.0,
        "speedup": speedup,
        "speedup_interval95": [speedup - 0.2, speedup + 0.2],
        "bigram": 1.18,
        "prompt_lookup": 1.31,
        "lossless": lossless,
        **more,
    }


def write(run_dir, **files):
    """A run folder; run.json is always there."""
    run_dir.mkdir(exist_ok=True)
    for name, content in {"run": RUN, **files}.items():
        if name == "metrics":
            (run_dir / "metrics.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in content)
            )
        else:
            (run_dir / f"{name}.json").write_text(json.dumps(content))
    return run_dir


def training(updates):
    for step in range(1, updates + 1):
        row = {
            "step": step,
            "loss": 3 / step,
            "tokens_per_second": 1000.0 + step,
            "data_wait_fraction": 0.01,
        }
        row |= {"peak_memory_bytes": 2**31}
        yield (
            row
            | {f"loss/step_{k}": 1 / step + k for k in range(7)}
            | {f"accuracy/step_{k}": 0.5 for k in range(7)}
        )


METRICS = [
    *training(40),
    *(
        {"step": s, "eval/acceptance_length": a, "eval/loss": 3.0}
        for s, a in ((10, 1.5), (20, 2.25), (40, 2.0))
    ),
]
RUN = {
    "config": {
        "name": f"run {EVIL}",
        "train": {"tokens_per_step": 4096},
        "hub": {"token": "SESAME"},
    },
    "overrides": [f"name={EVIL}", "hub.token=SESAME"],
    "versions": {"torch": "2.13.0"},
    "tracker_id": None,
    "git": "abcdef+",
    "hardware": {"device": "cuda", "name": "H200 & co"},
    "seeds": {"seed": 0},
    "inputs": {"prepared": {"vocab_coverage": 0.9734, "documents": 12}},
}
BENCHMARK = {
    "suites": {
        f"mt {EVIL}": [result(2.41, 1.52, True), result(3.02, 1.93, "tie", tie_gap=0.00123)],
        "$x_1$": [result(2.0, 1.2, True)],
    },
    "protocol": {
        "suites": ["mt:80", "x:80"],
        "temperature": 0.0,
        "system_prompt": EVIL,
        "max_new_tokens": 20000,
    },
}
EVALUATION = {
    "draft_length": 2,
    "acceptance_length": {"1": 1.6, "2": 2.1, "10": 3.7},
    "accepted_at": [0.6, 0.5],
    "first_round": 1.95,
    "loop_free": 2.05,
    "loops": 5,
    "answers": 64,
    "loss": 1.5,
    "update": 20,
}


def printed(run_dir):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(run_dir))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("report") / "run"
    write(run_dir, metrics=METRICS, benchmark=BENCHMARK, evaluation=EVALUATION)
    return write_report(run_dir).read_text()


def test_nothing_runs_and_nothing_is_loaded(page):
    parsed = Page(page)
    assert not parsed.named("script") and "<script" not in page.lower()
    assert not parsed.named("link") and not parsed.named("img") and not parsed.named("iframe")
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith("#"), (tag, value)
    assert not re.findall(r"https?://|@import|url\((?!#)", page)
    policy = [
        meta["content"]
        for meta in parsed.named("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_names_are_shown_as_text(page):
    parsed = Page(page)
    assert parsed.text["h1"] == [f"run {EVIL}"] and parsed.text["title"] == [f"run {EVIL}"]
    assert [row[0] for row in parsed.rows if len(row) > 5][1:] == [f"mt {EVIL}"] * 2 + ["$x_1$"]
    assert f"mt {EVIL}"[:23] in "".join(parsed.text["text"]) and "$x_1$" in parsed.text["text"]
    assert any(EVIL in text for text in parsed.text["pre"])


def test_headline_and_tiles(page):
    parsed = Page(page)
    (headline,) = parsed.text["p"]
    assert headline.startswith("Acceptance length 2.00–3.02 on 2 suites, 1.20–1.93 times the speed")
    assert "but for ties" in headline
    assert [text for text in parsed.text["b"] if text.strip()] == [
        "2.00–3.02", "1.20–1.93×", "120–193", "100", "tie", "2.10", "97.3%",
    ]  # fmt: skip


def test_benchmark_table(page):
    header, first, second, _ = [row for row in Page(page).rows if len(row) > 5]
    assert header == [
        "suite", "batch, steps, top-k, verify", "prompts", "acceptance length", "95 % interval", "tokens/s with draft",
        "tokens/s without draft", "speedup", "95 % interval of speedup", "lossless", "widest tie",
        "acceptance, first round", "acceptance, loops left out", "answers that loop", "acceptance, bigram",
        "acceptance, prompt look-up",
    ]  # fmt: skip
    assert first == [
        f"mt {EVIL}", "1, 3, 1, 4", "80", "2.41", "2.31 – 2.51", "152", "100", "1.52×", "1.32 – 1.72", "yes", "–",
        "1.75", "2.22", "3", "1.18", "1.31",
    ]  # fmt: skip
    assert second[9:11] == ["tie", "0.00123"]


def test_facts(page):
    facts = {row[0]: row[1] for row in Page(page).rows if len(row) == 2}
    assert (
        facts["loop free"] == "2.05"
        and facts["answers"] == "64"
        and "acceptance length" not in facts
    )
    assert (
        facts["temperature"] == "0.00"
        and facts["system prompt"] == EVIL
        and facts["max new tokens"] == "20,000"
    )
    assert (
        facts["updates"] == "40" and facts["update"] == "20" and facts["peak memory"] == "2.00 GiB"
    )
    assert facts["median tokens per second"] == "1,021"


def test_figures(page):
    parsed = Page(page)
    assert [figure["aria-label"] for figure in parsed.named("figure")] == [
        "Acceptance length by draft length",
        "Share accepted by position in the draft",
        "Best 2.25 at update 20",
        "Loss over updates",
        "loss of each step over updates",
        "accuracy of each step over updates",
    ]
    texts = parsed.text["text"]
    assert "best 2.25 at update 20" in texts
    assert {"1.60", "2.10", "3.70"} <= set(texts)
    assert texts.count("step 6") == 2
    assert not re.search(r"#0[1-7]0[1-7][0-9a-f]{2}\b", page), "a colour placeholder was left"
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_secrets_are_not_shown(page):
    assert "SESAME" not in page and REDACTED in " ".join(Page(page).text["pre"])
    assert "tokens_per_step: 4096" in page


def test_training_without_a_benchmark(tmp_path):
    parsed = Page(write_report(write(tmp_path, evaluation=EVALUATION)).read_text())
    (headline,) = parsed.text["p"]
    assert (
        headline
        == "Acceptance length 2.10 on held-out prompts with 2 drafted tokens; no benchmark was run."
    )
    assert len(parsed.named("figure")) == 2 and "held-out prompts" in parsed.text["text"]


@pytest.mark.parametrize(
    ("lossless", "said"),
    [
        ([True, True], "is lossless"),
        ([True, False], "is NOT lossless"),
        ([True, "tie"], "ties"),
        ([None], "at temperature 0 only"),
    ],
)
def test_losslessness_is_that_of_the_worst_row(tmp_path, lossless, said):
    write(
        tmp_path, benchmark={"suites": {"mtbench": [result(2.0, 1.5, value) for value in lossless]}}
    )
    (headline,) = Page(write_report(tmp_path).read_text()).text["p"]
    assert headline.startswith("Acceptance length 2.00 on mtbench, 1.50 times") and said in headline


def test_a_run_that_measured_nothing(tmp_path):
    parsed = Page(write_report(write(tmp_path)).read_text())
    assert parsed.text["p"] == ["No acceptance length was measured."] and not parsed.named("figure")
    assert printed(tmp_path) == []


def test_values_that_could_not_be_measured(tmp_path):
    """The target alone has no rounds, a step without a pair no accuracy, and updates may be logged
    after others.
    """
    rows = [{"step": 1, "eval/acceptance_length": 1.5}, *training(2)]
    rows[1] |= {"loss": None, "accuracy/step_0": None}
    rows[2] |= {"accuracy/step_0": None}
    alone = dict.fromkeys(
        ["acceptance_length", "interval95", "acceptance_length_loop_free", "first_round"]
    )
    alone = result(1.0, 1.0, True) | alone | {"config": [1, 0, 0, 0], "accepted_by_position": []}
    write(
        tmp_path,
        metrics=rows,
        benchmark={"suites": {"a": [alone, result(2.0, 1.5, True)]}, "protocol": {}},
    )
    parsed = Page(write_report(tmp_path).read_text())
    assert parsed.text["p"][0].startswith("Acceptance length 2.00 on a, 1.00–1.50 times")
    assert len(parsed.named("figure")) == 5 and "step 6" in parsed.text["text"]
    assert "–" in " ".join(printed(tmp_path))


def test_a_long_run_makes_a_small_page_and_keeps_its_best(tmp_path):
    metrics = list(training(5000))
    for row in metrics:
        row.update({f"loss/step_{k}": math.sin(row["step"] ** 2 + k) for k in range(7)})
    metrics += [{"step": s, "eval/acceptance_length": 2 + (s == 777)} for s in range(1, 2000, 2)]
    path = write_report(write(tmp_path, metrics=metrics))
    assert path.stat().st_size < 300_000
    assert "best 3.00 at update 777" in path.read_text()


def test_the_same_files_give_the_same_page(tmp_path):
    write(tmp_path, metrics=METRICS[:5], benchmark=BENCHMARK)
    assert write_report(tmp_path).read_text() == write_report(tmp_path).read_text()


def test_summary_in_a_narrow_terminal(tmp_path):
    write(
        tmp_path,
        benchmark={"suites": {"mt[bold]": [result(2.41, 1.52, True)]}},
        evaluation=EVALUATION,
    )
    lines = printed(tmp_path)
    assert all(len(line) <= 80 for line in lines) and any("mt[bold]" in line for line in lines)
    found = dict(re.split(r"  +", line.strip()) for line in lines if re.search(r"\S  +\S", line))
    assert list(found.items()) == [
        ("1 drafted", "1.60"), ("2 drafted", "2.10"), ("10 drafted", "3.70"),
        ("2 drafted, first round", "1.95"), ("2 drafted, loops left out", "2.05"),
        ("prompts", "80"), ("acceptance length", "2.41"), ("tokens/s with draft", "152"),
        ("tokens/s without draft", "100"), ("speedup", "1.52×"), ("lossless", "yes"),
        ("acceptance, first round", "1.75"), ("acceptance, loops left out", "2.22"),
        ("acceptance, bigram", "1.18"), ("acceptance, prompt look-up", "1.31"),
    ]  # fmt: skip


def test_scores_and_warnings_are_shown_where_there_are_any(tmp_path):
    """An engine's rows have no baselines without a model; what was not measured takes no line."""
    row = result(
        1.0,
        0.9,
        False,
        score=0.75,
        baseline_score=0.8,
        num_scored=80,
        equal_answers=0.5,
        warning="too bad",
    )
    row = {key: value for key, value in row.items() if key not in ("bigram", "prompt_lookup")}
    row |= {"config": [4, 7, 10, 60], "first_round": None}
    text = "\n".join(
        printed(write(tmp_path, benchmark={"suites": {"gsm8k": [row]}, "protocol": {}}))
    )
    assert "4, 7, 10, 60" in text and re.search(r"score +0.75\n *score without draft +0.8", text)
    assert "bigram " not in text and "first round" not in text
    parsed = Page(write_report(tmp_path).read_text())
    assert parsed.text["p"][0].endswith("gsm8k [4, 7, 10, 60]: too bad.")
    assert "answers equal to the target's own" in " ".join(parsed.rows[0])


def test_summary_of_many_suites_stays_narrow(tmp_path):
    suites = {f"a_suite_with_a_long_name_{n}": [result(1.0 + n, 1.5, "tie")] for n in range(6)}
    lines = printed(write(tmp_path, benchmark={"suites": suites}))
    assert all(len(line) <= 80 for line in lines)
    shown = [line.split()[2:] for line in lines if line.strip().startswith("acceptance length")]
    assert shown == [["1.00", "2.00", "3.00", "4.00"], ["5.00", "6.00"]]


def test_table_for_a_tracker_is_plain(tmp_path):
    columns, rows = benchmark_table(BENCHMARK)
    assert len(rows) == 3 and all(len(row) == len(columns) for row in rows)
    first = dict(zip(columns, rows[0], strict=True))
    assert (
        first["config"] == "1, 3, 1, 4"
        and first["acceptance_length"] == 2.41
        and first["lossless"] is True
    )
    assert all(
        value is None or isinstance(value, bool | int | float | str)
        for row in rows
        for value in row
    )


def test_nan_in_a_file_reads_as_none(tmp_path):
    (tmp_path / "benchmark.json").write_text('{"a": NaN, "b": -Infinity}')
    assert read_json(tmp_path / "benchmark.json") == {"a": None, "b": None}
