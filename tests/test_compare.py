"""Runs side by side: what differs, paired intervals, notes, the page, folders that are no runs."""

import io
import json
from html.parser import HTMLParser

import pytest
from conftest import run
from rich.console import Console

from eagle3.benchmark.compare import cells, compare, compare_sweep, find_runs, show
from eagle3.errors import ConfigError, RunError

EVIL = "<script>alert(1)</script>"
CONFIG = {
    "name": "x", "cache_dir": "c", "optimizer": {"lr": 1e-4}, "draft": {"ttt_steps": 5},
    "loss": {"gamma": 0.8, "mask": {"_target_": "eagle3.batch.serving"}},
    "launch": {"nproc_per_node": 2, "nnodes": 1},
}  # fmt: skip
PROMPTS = [f"{number:x}" for number in range(40)]
TOKENS = [20 + 3 * number for number in range(40)]


def rounds_at(acceptance, temperature=0):
    """Those of prompts of which some are much harder, which all drafts find."""
    return [tokens / acceptance * (0.5 + n % 7 / 6) for n, tokens in enumerate(TOKENS)]


def make(folder, acceptance, sampled=None, older=False, evaluation=None, pruned=False, **config):
    """A run's folder, as this version or an older one left it."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": CONFIG | config, "pruned": pruned}))
    lines = [{"step": step, "loss": 4 / step, "tokens_per_second": 500.0} for step in (1, 2, 3)]
    if not older:
        lines = [line | {"tokens": 1000, "seconds": 1800.0} for line in lines]
    lines.append({"step": 3, "eval/acceptance_length": acceptance})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"draft_length": 2, "acceptance_length": {"1": 1.5, "2": acceptance}}
    values |= {"accepted_at": [0.6, 0.4], "loss": 2.0}
    if not older:
        values |= {"prompts": PROMPTS, "tokens": TOKENS, "rounds": rounds_at(acceptance)}
    if sampled:
        at = {"acceptance_length": {"1": 1.4, "2": sampled}, "accepted_at": [0.5, 0.3]}
        values["sampled"] = {"1": at | {"tokens": TOKENS, "rounds": rounds_at(sampled)}}
    (folder / "evaluation.json").write_text(json.dumps(values | (evaluation or {})))
    return folder


def test_what_the_target_decides_is_compared_as_it_was(tmp_path):
    for name, derived in (("1", {}), ("2", {"draft.ttt_steps": 15})):
        path = make(tmp_path / name, 2.5) / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"derived": derived}))
    runs, notes = compare([tmp_path])
    assert [run.settings for run in runs] == [{"draft.ttt_steps": "5"}, {"draft.ttt_steps": "15"}]
    assert "runs differ in draft.ttt_steps" in notes[0]


def test_only_what_differs_is_shown_and_intervals_are_paired(tmp_path):
    """A run alone is uncertain by what its prompts differ in; not so a difference."""
    changed = {
        "optimizer": {"lr": 3e-4},
        "mode": {"_target_": "eagle3.hidden_states.supply.Hybrid"},
    }
    make(tmp_path / "10", 2.6, sampled=2.0, name="y", cache_dir="d", logger={"tags": []}, **changed)
    make(tmp_path / "9", 2.5, mode={"_target_": "eagle3.hidden_states.supply.Online"})
    runs, notes = compare([tmp_path])
    assert [run.name for run in runs] == ["9", "10"] and notes == []
    assert [run.settings for run in runs] == [
        {"optimizer.lr": "0.0001", "mode": "Online"},
        {"optimizer.lr": "0.0003", "mode": "Hybrid"},
    ]
    labels = ["9, lr=0.0001, mode=Online", "10, lr=0.0003, mode=Hybrid"]
    assert [run.label for run in runs] == labels
    worse, best = (run.acceptance["0"] for run in runs)
    factor = sum(TOKENS) / sum(rounds_at(1.0))
    assert best.length == pytest.approx(2.6 * factor)
    assert worse.difference == pytest.approx(-0.1 * factor) and best.difference is None
    low, high = worse.difference_interval
    assert low < worse.difference < high < 0 and best.difference_interval is None
    assert high - low < (worse.interval[1] - worse.interval[0]) / 10
    assert runs[0].acceptance.keys() == {"0"} and runs[1].acceptance.keys() == {"0", "1"}
    assert runs[1].acceptance["1"].length == pytest.approx(2.0 * factor)
    numbers = {"loss": pytest.approx((4 + 2 + 4 / 3) / 3), "tokens": 3000}
    assert runs[0].numbers == numbers | {"tokens/s": 3000 / 5400, "device hours": 3.0}


def test_more_settings_than_runs_stand_below_each_other(tmp_path):
    for number in (1, 2):
        make(tmp_path / f"{number}", 2.5, data={f"setting_{key}": number for key in range(20)})
    console = Console(width=80, record=True, file=io.StringIO())
    show([tmp_path], tmp_path, console)
    printed = [line.split() for line in console.export_text().splitlines()]
    assert ["setting", "1", "2"] in printed and ["data.setting_19", "1", "2"] in printed


NOTES = {
    "another mask": (
        {"loss": {"gamma": 0.8, "mask": {"_target_": "eagle3.batch.shifted"}}},
        "losses are not comparable, because runs differ in loss.mask", True,
    ),
    "another draft length": (
        {"evaluation": {"draft_length": 1}},
        "held-out prompts: no intervals, because their draft lengths differ", False,
    ),
    "an older version": (
        {"older": True},
        "held-out prompts: no intervals, because too few prompts are in all", False,
    ),
    "a pruned trial": ({"pruned": True}, "ended by Optuna before their last update: b", True),
    "fewer prompts": (
        {"evaluation": {"prompts": [*PROMPTS[:30], *"xyzuvwrstq"]}},
        "held-out prompts: over the 30 prompts that all runs have", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTES)
def test_what_cannot_be_compared_is_said(tmp_path, case):
    changes, note, has_intervals = NOTES[case]
    make(tmp_path / "a", 2.5)
    make(tmp_path / "b", 2.6, **changes)
    runs, notes = compare([tmp_path / "a", tmp_path / "b"])
    assert notes == [note]
    assert all((run.acceptance["0"].interval is not None) == has_intervals for run in runs)
    if case == "another draft length":
        assert [run.acceptance["0"].length for run in runs] == [1.5, 1.5]
    if case == "an older version":
        assert runs[1].numbers["tokens/s"] == 500 and runs[1].numbers["device hours"] is None


def test_runs_without_held_out_answers(tmp_path):
    for name in "ab":
        make(tmp_path / name, 2.5)
    (tmp_path / "a" / "evaluation.json").unlink()
    columns = cells(*compare([tmp_path]))
    assert columns["acceptance"][0] == "–" and columns["acceptance"][1].startswith("2.")
    (tmp_path / "b" / "evaluation.json").unlink()
    assert "acceptance" not in cells(*compare([tmp_path]))
    show([tmp_path], tmp_path, Console(file=io.StringIO()))
    assert "2 runs compared" in (tmp_path / "compare.html").read_text()


def test_a_run_as_good_as_the_best_is_not_it(tmp_path):
    make(tmp_path / "a", 2.5)
    make(tmp_path / "b", 2.5)
    assert cells(*compare([tmp_path]))["from the best"] == ["best", "+0.00 [0.00, 0.00]"]


BAD = {
    "run.json": ("{", "run.json is damaged"),
    "no config": ("{}", "is no folder of a run: it has no run.json with a config"),
    "evaluation.json": ("[]", "evaluation.json is damaged (no JSON object)"),
    "old evaluation": ('{"loss": 1}', "evaluation.json is damaged or of an older version"),
    "not trained": ("", "was not trained: it has no metrics.jsonl and no evaluation.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_are_no_runs_get_a_sentence(tmp_path, case):
    """The others are compared; without any the command ends."""
    good, bad = make(tmp_path / "a", 2.5), make(tmp_path / "b", 2.6)
    text, sentence = BAD[case]
    if text:
        name = "run.json" if case in ("run.json", "no config") else "evaluation.json"
        (bad / name).write_text(text)
    else:
        (bad / "metrics.jsonl").unlink()
        (bad / "evaluation.json").unlink()
    runs, (refused,) = find_runs([tmp_path / "*"])
    assert [run.path for run in runs] == [good] and sentence in refused and "\n" not in refused
    with pytest.raises(RunError, match="none can be compared: "):
        find_runs([bad])


def test_what_names_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="names no folder; give runs, sweeps or patterns"):
        find_runs([tmp_path / "x*"])


class Parser(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data.strip())


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_page_and_the_table(tmp_path, count):
    """Curves of all runs laid over each other; hostile values are text; nothing is loaded."""
    for number in range(count):
        config = {"optimizer": {"lr": f"{EVIL}{number}"}}
        make(tmp_path / f"{number}", 2.5 + number / 10, sampled=2.0, **config)
    console = Console(width=80, record=True, file=io.StringIO(), markup=False)
    show([tmp_path], tmp_path, console)
    printed, text = console.export_text(), (tmp_path / "compare.html").read_text()
    assert "best" in printed and f"compare: {tmp_path / 'compare.html'}" in printed.replace(
        "\n", ""
    )
    assert max(map(len, printed.splitlines()[:-3])) <= 80
    page = Parser(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img"}
    pictures = [named["aria-label"] for tag, named in page.tags if tag == "svg"]
    assert pictures == [
        "Acceptance length while training", "Acceptance length by draft length",
        "Accepted by position", "Acceptance length at T 1 by draft length",
        "Accepted at T 1 by position", "Loss",
    ]  # fmt: skip
    assert sum(tag == "polyline" for tag, _ in page.tags) == count * len(pictures)
    assert sum(named.get("class") == "best" for tag, named in page.tags if tag == "tr") == 1
    assert (f"{EVIL}0" in page.words) == (count > 1), "what all have in common is not shown"
    colours = {named["style"] for tag, named in page.tags if tag == "i"}
    assert len(colours) == count


def test_how_much_data_is_drawn(tmp_path):
    """As of sweep=data: where runs were trained on other numbers of tokens."""
    make(tmp_path / "0", 2.0)
    more = make(tmp_path / "1", 2.5)
    lines = (more / "metrics.jsonl").read_text()
    (more / "metrics.jsonl").write_text(lines.replace("1000", "2000"))
    compare_sweep(tmp_path)
    text = (tmp_path / "compare.html").read_text()
    assert "Best acceptance length by tokens" in text and "thousand tokens trained on" in text


def test_a_sweep_without_training_has_no_comparison(tmp_path, capsys):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "run.json").write_text(json.dumps({"config": CONFIG}))
    compare_sweep(tmp_path)
    assert capsys.readouterr().out == "" and not (tmp_path / "compare.html").exists()


def test_a_full_disk_hides_no_failed_jobs(tmp_path, capsys):
    make(tmp_path / "0", 2.0)
    (tmp_path / "compare.html").mkdir()
    compare_sweep(tmp_path)
    assert "compare: [Errno" in capsys.readouterr().out


def test_the_stage_needs_no_model_and_no_data(tmp_path, capsys):
    make(tmp_path / "a", 2.5)
    given = ["stages=[compare]", "model=hf", "model.path=no/where", "data=none"]
    run([*given, f"runs=[{tmp_path / 'a'}]"], tmp_path / "run")
    assert "compare: " in capsys.readouterr().out and (tmp_path / "run" / "compare.html").exists()
    with pytest.raises(ConfigError, match=r"stages=\[compare\] needs runs=\["):
        run(given, tmp_path / "other")
