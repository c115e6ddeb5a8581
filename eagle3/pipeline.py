"""The stages of a run, top to bottom: each takes what it reads and returns what it made.

`stages` filters this list and nothing else. What a listed stage reads must be there, or be made by
a stage that is listed too; else the run ends with one sentence that names the stage to add. What is
made lies under the fingerprint of what it was made from, and is made once.
"""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

from hydra.utils import get_class
from rich.console import Console

from eagle3.benchmark.check import check
from eagle3.benchmark.compare import show as show_compared
from eagle3.benchmark.measure import benchmark, load_tasks
from eagle3.benchmark.request import Subject
from eagle3.checks import reads_data, reads_store_alone
from eagle3.config import RunConfig, flatten, instantiate
from eagle3.data.chat import load_chat
from eagle3.data.prepare import find_prepared, load_prepared, prepare
from eagle3.data.regenerate import regenerate
from eagle3.data.sources import find_sources, names_data
from eagle3.data.view import view
from eagle3.data.vocab import complete_section
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import cover, generate
from eagle3.export.card import push, write_card
from eagle3.export.read import locate, read_config
from eagle3.export.write import export_draft
from eagle3.hidden_states.capture import capture, locate_store
from eagle3.hidden_states.import_specforge import choose_dtype, import_specforge, is_specforge
from eagle3.hidden_states.store import announce_store, is_complete, open_store, store_inputs
from eagle3.parallel.launch import run_on_ranks, spawns_ranks
from eagle3.parallel.ranks import Ranks, choose_device, load_target
from eagle3.plan import plan, show
from eagle3.runs.artefact import read_facts
from eagle3.runs.disk import name_full_disk
from eagle3.runs.logger import follow_metrics
from eagle3.runs.report import write_report
from eagle3.runs.resume import command_to_resume
from eagle3.runs.tracking import read_acceptance, track_run
from eagle3.target.handle import TargetHandle
from eagle3.target.spec import read_spec
from eagle3.train import TrainingData, train

console = Console(markup=False, soft_wrap=True)


def run_pipeline(
    config: RunConfig, run_dir: Path, overrides: list[str], begin: Callable[[], None]
) -> float | None:
    """Run the listed stages and write the report; returns the acceptance length they measured.

    `begin` is called where a run begins, which a plan and a refused config never do. Raises
    ConfigError and RunError.
    """
    listed, cache_dir, data = set(config.stages), config.cache_dir, config.data
    if listed == {"compare"}:  # which reads folders of runs, no model and no data
        begin()
        return show_compared(config.runs, run_dir, console)
    # run.json has what was asked for, as a resumed run asks the same.
    asked, hidden = config, replace(config.hidden_states, dtype=choose_dtype(config.hidden_states))
    config, mode = replace(config, hidden_states=hidden), get_class(config.mode["_target_"])
    device, draft_length = choose_device(config.device), config.eval.draft_length
    processes = config.launch.nproc_per_node
    target = TargetHandle(read_spec(config.model), config.target, device, processes)
    config = replace(config, draft=complete_section(config.draft, target.spec))
    given = flatten({"draft": asdict(asked.draft)})
    used = flatten({"draft": asdict(config.draft)})
    derived = {key: value for key, value in used.items() if value != given[key]}
    counts = config.eval.num_prompts, target.spec.config.vocab_size, config.draft.vocab_size

    # What the listed stages read, beside what lies in the run's own folder.
    readers, store_alone = set(reads_data(config)), reads_store_alone(config)
    reads_rows, reads_prepared = config.plan or readers, readers - {"regenerate", "view"}
    sources = find_sources(data, cache_dir) if reads_rows else None
    chat = None
    if reads_rows or listed & {"check", "benchmark"}:
        required = reads_rows or "benchmark" in listed
        # `check` alone does without where the target has no tokenizer or template.
        with nullcontext() if required else suppress(ConfigError):
            chat = load_chat(config.model, data)
    prepared = answers = store = None
    if config.plan:
        if "regenerate" not in listed:
            prepared = find_prepared(data, *counts, sources, chat, cache_dir)
        show(plan(config, target.spec, sources, chat, prepared, device, run_dir), console)
        return None

    if "train" in listed:  # what cannot work would end a late stage
        instantiate(config.draft.kernels)
    if config.draft.init_from and "train" in listed:
        read_config(locate(config.draft.init_from, "draft.init_from"))
        unused = "draft.vocab_size, draft.config and draft.initial are not used"
        print(f"train: draft.init_from brings its shape and its vocabulary; {unused}")
    if derived and "train" in listed:
        drafted = f"has the target's vocabulary and drafts {config.draft.ttt_steps} tokens"
        unused = "draft.ttt_steps, draft.vocab_size, draft.fc_norm, draft.norm_output"
        print(f"train: a block drafter {drafted}; {unused} and draft/initial are not used")
    if listed & {"check", "benchmark"}:
        draft = find_draft(config, run_dir)
        subject = Subject(draft, target, chat, data, cache_dir, config.seed)
    if "benchmark" in listed:
        # Looked at before the first stage, for what cannot be asked would end the last one.
        request = instantiate(config.benchmark)
        tasks = load_tasks(request, subject)
        if config.draft_path and "check" not in listed:  # which says more of a bad one
            request.check_draft(draft, target.spec)
        if not reads_prepared and names_data(data):
            # The bigram is measured where a run has left what it is counted in.
            with suppress(ConfigError, RunError):
                named = find_sources(data, cache_dir)
                prepared = find_prepared(data, *counts, named, chat, cache_dir)
    folders = [run_dir, cache_dir, hidden.path or run_dir]
    with (
        name_full_disk(folders, lambda: command_to_resume(run_dir, overrides)),
        target,
        track_run(asked, run_dir, overrides, device, console) as tracking,
    ):
        tracking.content["derived"] = derived
        begin()
        if "import" in listed or (store_alone and "train" in listed):
            path = Path(hidden.path)
            if is_specforge(path):
                path = import_specforge(hidden, target, data.max_length, cache_dir)
                tracking.note("import", (path, read_facts(path)))
            store = open_store(hidden, path, store_inputs(target, hidden.dtype, None))
        if "regenerate" in listed:
            sources, paths = regenerate(config.regenerate, data, sources, chat, target, cache_dir)
            tracking.note("regenerate", *((path, read_facts(path)) for path in paths))
        if "view" in listed:
            view(data, config.view.num_samples, sources, chat, run_dir, console)
            tracking.finish("view")
        if reads_prepared:
            prepared = prepare(data, *counts, sources, chat, cache_dir, write="prepare" in listed)
            tracking.note("prepare", (prepared.path, prepared.facts))
        if readers & {"generate", "train"}:
            write = "generate" in listed
            answers = generate(config.eval, prepared.heldout, target, cache_dir, write)
            covered = cover(answers, prepared.vocab, config.draft, target.spec, draft_length)
            tracking.note("generate", (answers, read_facts(answers) | covered))
        if mode.captures and not store_alone and listed & {"capture", "train"}:
            folder, inputs = locate_store(hidden, prepared, target, cache_dir)
            complete = is_complete(folder)
            if complete or not folder.exists():
                announce_store("capture", folder, inputs)
            if "capture" in listed and not complete:
                free_target(config, target, keep=True)
                run_on_ranks(capture_on_rank, config, run_dir, target, prepared.path)
            store = open_store(hidden, folder, inputs)
            tracking.note("capture", (store.folder, store.facts))
        if "train" in listed:
            free_target(config, target, keep=mode.needs_target)
            folder = store.folder if mode.captures else None
            made_from = store.fingerprint if folder else prepared.path.name
            if store_alone:
                made = TrainingData(None, None, folder, {"the hidden states": made_from})
            else:
                prints = {"the data": made_from, "the target's answers": answers.name}
                made = TrainingData(prepared.path, answers, folder, prints)
            with follow_metrics(run_dir / "metrics.jsonl", tracking.tracker):
                damaged, pruned = run_on_ranks(train, config, run_dir, target, made)
            tracking.note_damage(damaged)
            tracking.finish("train")
            tracking.content["pruned"] = pruned
            if pruned:
                listed -= {"export", "check", "benchmark"}
        if "export" in listed:
            best = run_dir / "checkpoints" / "best"
            export_draft(best, config.export, target.spec, draft_length, run_dir)
            write_card(run_dir)
            tracking.finish("export")
        if "check" in listed:
            attention = instantiate(config.draft.attention)
            check(config.check, subject, attention, draft_length, run_dir)
            tracking.finish("check")
        if "benchmark" in listed:
            subject.prepared = prepared
            benchmark(request, tasks, subject, run_dir)
            tracking.finish("benchmark")
            if draft == run_dir / "draft":
                write_card(run_dir)  # with what was measured
        if "compare" in listed:
            own = [run_dir] if (run_dir / "metrics.jsonl").exists() else []
            show_compared([*config.runs, *own], run_dir, console)
            tracking.finish("compare")
        if "export" in listed and config.export.push_to_hub:
            again = command_to_resume(run_dir, overrides, ["export"])
            push(run_dir, write_report(run_dir), config.export.push_to_hub, again)
    return read_acceptance(run_dir)


def find_draft(config: RunConfig, run_dir: Path) -> Path:
    """Where the draft to measure lies, or will lie. Raises ConfigError where it never will."""
    folder = locate(config.draft_path) if config.draft_path else run_dir / "draft"
    if not folder.exists() and "export" not in config.stages:
        remedy = "set draft_path=<folder or hub id>, or add train and export to stages"
        raise ConfigError(f"no draft at {folder}; {remedy}")
    return folder


def free_target(config: RunConfig, target: TargetHandle, keep: bool) -> None:
    """Make room for ranks that load the target themselves, or do without it.

    An engine stays, and serves ranks of other processes too.
    """
    if not keep or (spawns_ranks(config) and target.in_process):
        target.close()


def capture_on_rank(
    ranks: Ranks, config: RunConfig, run_dir: Path, target: TargetHandle, prepared: Path
) -> None:
    """The stage `capture` as one of several ranks, which share the store's shards."""
    load_target(target, ranks)
    documents, hidden = load_prepared(prepared), config.hidden_states
    capture(hidden, documents, target, config.cache_dir, ranks.is_main)
