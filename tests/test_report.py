"""The page as a browser's parser sees it: what it says, that nothing in it runs or is loaded from elsewhere."""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from eagle3.logger import REDACTED
from eagle3.report import benchmark_table, read_json, summary_table, write_report

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
    return {
        "config": [4, 3, 1, 4],
        "acceptance_length": acceptance_length,
        "interval95": [acceptance_length - 0.1, acceptance_length + 0.1],
        "accepted_by_position": [0.7, 0.6, 0.5],
        "tokens_per_second": 100 * speedup,
        "baseline_tokens_per_second": 100.0,
        "speedup": speedup,
        "lossless": lossless,
        "bigram": 1.18,
        "prompt_lookup": 1.31,
        "num_prompts": 80,
        **more,
    }


def write(run_dir, **files):
    run_dir.mkdir(exist_ok=True)
    for name, content in files.items():
        if name == "metrics":
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            (run_dir / f"{name}.json").write_text(json.dumps(content))
    return run_dir


def training(updates):
    for step in range(1, updates + 1):
        row = {"step": step, "loss": 3 / step, "tokens_per_second": 1000.0, "peak_memory_bytes": 2**31}
        yield (row | {f"loss/step_{k}": 1 / step + k for k in range(7)} | {f"accuracy/step_{k}": 0.5 for k in range(7)})


METRICS = [
    *training(40),
    *({"step": s, "eval/acceptance_length": a} for s, a in ((10, 1.5), (20, 2.25), (40, 2.0))),
]
RUN = {
    "config": {"name": f"run {EVIL}", "train": {"tokens_per_step": 4096}, "hub": {"token": "SESAME"}},
    "overrides": [f"name={EVIL}", "hub.token=SESAME"],
    "versions": {"torch": "2.13.0"},
    "hardware": {"gpu": "H200 & co"},
    "inputs": {"vocabulary": {"coverage": 0.9734}},
}
BENCHMARK = {
    "suites": {
        f"mt {EVIL}": [result(2.41, 1.52, True), result(3.02, 1.93, True, drafter_version="v<2>")],
        "$x_1$": [result(2.0, 1.2, "tie")],
    },
    "protocol": {"temperature": 0.0, "system_prompt": EVIL},
}
EVALUATION = {
    "acceptance_length": {"10": 3.7, "2": 2.1, "1": 1.6},
    "loop_free": 2.05,
    "extra": {"prompts": 64},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run_dir = write(
        tmp_path_factory.mktemp("report") / "run",
        run=RUN,
        metrics=METRICS,
        benchmark=BENCHMARK,
        evaluation=EVALUATION,
    )
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
    policy = [meta["content"] for meta in parsed.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
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
        "2.00–3.02", "1.20–1.93×", "120–193", "100", "tie", "3.70", "97.3%",
    ]  # fmt: skip


def test_benchmark_table_has_baselines_and_unknown_columns(page):
    header, first, second, _ = [row for row in Page(page).rows if len(row) > 5]
    values = dict(zip(header, first, strict=True))
    assert values["acceptance length"] == "2.41" and values["95 % interval"] == "2.31 – 2.51"
    assert values["bigram"] == "1.18" and values["prompt look-up"] == "1.31"
    assert values["speedup"] == "1.52×" and values["lossless"] == "yes"
    assert values["batch, steps, top-k, verify"] == "4, 3, 1, 4"
    assert values["drafter version"] == "–" and dict(zip(header, second, strict=True))["drafter version"] == "v<2>"
    assert "accepted by position" not in header and "without loops" not in header


def test_facts_of_evaluation_and_protocol(page):
    facts = {row[0]: row[1] for row in Page(page).rows if len(row) == 2}
    assert facts["loop_free"] == "2.05" and facts["extra.prompts"] == "64"
    assert facts["temperature"] == "0" and facts["system_prompt"] == EVIL
    assert facts["updates"] == "40" and facts["best update"] == "20" and facts["peak memory"] == "2.00 GiB"


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


def test_the_draft_length_of_the_evaluation_is_the_headline(tmp_path):
    run_dir = write(tmp_path, evaluation={**EVALUATION, "draft_length": 2, "accepted_at": [0.6, 0.5]})
    parsed = Page(write_report(run_dir).read_text())
    assert parsed.text["p"][0].startswith("Acceptance length 2.10 on held-out prompts with 2 drafted tokens")
    assert len(parsed.named("figure")) == 2


def test_draft_lengths_are_in_numeric_order(tmp_path):
    run_dir = write(tmp_path, evaluation=EVALUATION)
    assert Page(write_report(run_dir).read_text()).text["p"] == [
        "Acceptance length 3.70 on held-out prompts with 10 drafted tokens; no benchmark was run."
    ]


@pytest.mark.parametrize(
    ("lossless", "said"),
    [
        ([True, True], "is lossless"),
        ([True, False], "is NOT lossless"),
        ([True, "tie"], "ties"),
        ([None], "not checked"),
    ],
)
def test_losslessness_is_that_of_the_worst_row(tmp_path, lossless, said):
    write(tmp_path, benchmark={"suites": {"mtbench": [result(2.0, 1.5, value) for value in lossless]}})
    (headline,) = Page(write_report(tmp_path).read_text()).text["p"]
    assert headline.startswith("Acceptance length 2.00 on mtbench, 1.50 times") and said in headline


def test_a_run_folder_with_nothing_in_it(tmp_path):
    parsed = Page(write_report(write(tmp_path / "empty")).read_text())
    assert parsed.text["h1"] == ["empty"] and parsed.text["p"] == ["No acceptance length was measured."]
    assert not parsed.named("figure")


def test_missing_keys_and_null_values(tmp_path):
    rows = [
        {"step": 1, "loss": None, "accuracy/step_0": None},
        {"step": 2, "loss": 2.0, "accuracy/step_0": 0.1},
    ]
    rows.append({"step": 2, "eval/acceptance_length": None})
    suites = {"a": [{}], "b": {"acceptance_length": 2.0, "interval95": None, "speedup": math.nan}}
    write(tmp_path, metrics=rows, benchmark={"suites": suites}, evaluation={"acceptance_length": 2.0}, run={})
    (headline,) = Page(write_report(tmp_path).read_text()).text["p"]
    assert headline.startswith("Acceptance length 2.00 on 2 suites. ")
    assert summary_table(tmp_path).row_count == 2


def test_accepted_by_position_without_a_benchmark(tmp_path):
    write(tmp_path, metrics=[{"step": 5, "eval/accepted_at_1": 0.6, "eval/accepted_at_2": 0.5}])
    (figure,) = Page(write_report(tmp_path).read_text()).named("figure")
    assert figure["aria-label"] == "Share accepted by position in the draft"


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


def test_summary_table_in_a_narrow_terminal(tmp_path):
    write(tmp_path, benchmark={"suites": {"mt[bold]": [result(2.41, 1.52, True)]}}, evaluation=EVALUATION)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(tmp_path))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["1", "drafted", "1.60"] in lines and ["10", "drafted", "3.70"] in lines
    assert ["mt[bold]", "2.41", "152", "100", "1.52×", "yes", "1.18", "1.31"] in lines


def test_summary_table_without_a_benchmark_has_no_empty_columns(tmp_path):
    assert len(summary_table(write(tmp_path, evaluation=EVALUATION)).columns) == 2


def test_table_for_a_tracker_is_plain(tmp_path):
    columns, rows = benchmark_table(BENCHMARK)
    assert len(rows) == 3 and all(len(row) == len(columns) for row in rows)
    first = dict(zip(columns, rows[0], strict=True))
    assert first["config"] == "4, 3, 1, 4" and first["acceptance_length"] == 2.41 and first["lossless"] is True
    assert all(value is None or isinstance(value, bool | int | float | str) for row in rows for value in row)


def test_nan_in_a_file_reads_as_none(tmp_path):
    (tmp_path / "benchmark.json").write_text('{"a": NaN, "b": -Infinity}')
    assert read_json(tmp_path / "benchmark.json") == {"a": None, "b": None}
