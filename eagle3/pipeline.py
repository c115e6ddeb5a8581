"""The stages of a run, what each reads and what each leaves behind."""

import dataclasses
import json
import shlex
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from hydra.utils import instantiate
from rich.console import Console

from eagle3 import evaluate, plan
from eagle3.benchmark import check as diagnosis
from eagle3.config import RunConfig
from eagle3.data import view
from eagle3.data.sources import read_rows
from eagle3.draft.initial import draft_config, new_draft
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.export import write as export
from eagle3.hidden_states.import_specforge import is_specforge
from eagle3.job import Run
from eagle3.loader import Loader
from eagle3.loss import SoftTargetLoss
from eagle3.parallel.ranks import Ranks
from eagle3.parallel.sequence import Sequence
from eagle3.parallel.watch import Watch
from eagle3.runs import checkpoint
from eagle3.runs.artefact import read_facts
from eagle3.runs.logger import JsonLines
from eagle3.runs.report import benchmark_table, prepared_table, summary_table, write_report
from eagle3.train import Trainer, fit

console = Console(markup=False)
REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def view_stage(run: Run) -> None:
    config = run.config
    rows = chain.from_iterable(
        read_rows(found, None, config.data.preformatted) for _, found in run.sources
    )
    samples = view.collect(rows, run.chat, config.data, config.view.num_samples)
    view.show(samples, console)
    view.write_page(samples, run.run_dir / "view.html")
    console.print(f"view: {run.run_dir / 'view.html'}")


def regenerate_stage(run: Run) -> None:
    run.inputs["regenerated"] = []
    for path in run.regenerated_paths:
        learnt = read_facts(path)
        console.print(
            f"regenerate: {learnt['answered']:,} of {learnt['rows']:,} conversations answered again, "
            f"{path / 'conversations.jsonl'}",
            soft_wrap=True,
        )
        for reason, count in learnt["rejected"].items():
            console.print(f"regenerate: rejected {count:,} x {reason}")
        run.inputs["regenerated"].append(learnt | {"path": str(path)})


def prepare_stage(run: Run) -> None:
    learnt = read_facts(run.prepared_path)
    console.print(prepared_table(learnt))
    if learnt["rejected"] or learnt["heldout_rejected"]:
        console.print(
            f"prepare: rejected rows are listed in {run.prepared_path / 'rejects.jsonl'}",
            soft_wrap=True,
        )
    run.inputs["prepared"] = learnt | {"path": str(run.prepared_path)}


def generate_stage(run: Run) -> None:
    learnt = read_facts(run.answers_path)
    console.print(
        f"generate: {learnt['answers']} answers of the target, {learnt['answer_tokens']:,} tokens"
    )
    run.inputs["generated"] = learnt | {"path": str(run.answers_path)}


def import_stage(run: Run) -> None:
    if not run.config.hidden_states.path or not is_specforge(Path(run.config.hidden_states.path)):
        raise ConfigError(
            "stages=[import] needs hidden_states.path=<folder of SpecForge's rows_*/data_*.ckpt>"
        )
    learnt = read_facts(run.imported_path)
    console.print(
        f"import: {learnt['documents']:,} documents, {learnt['bytes'] / 1e9:,.2f} GB, {run.imported_path}"
    )
    for reason, count in learnt["rejected"].items():
        console.print(f"import: rejected {count:,} x {reason}")
    console.print(
        f"import: {learnt['padding']:,} rows of padding left out, {learnt['prenorm']:,} documents normed"
    )
    run.inputs["imported"] = learnt | {"path": str(run.imported_path)}


def capture_stage(run: Run) -> None:
    hidden = run.config.hidden_states
    if not run.reads_store or (hidden.path and is_specforge(Path(hidden.path))):
        return
    learnt = run.store.facts
    console.print(
        f"capture: {learnt['documents']:,} documents, {learnt['tokens']:,} tokens, {learnt['bytes'] / 1e9:,.2f} GB, "
        f"{learnt['bytes_per_token'] / 1e3:,.1f} KB a token, {run.store.folder}",
        soft_wrap=True,
    )
    run.inputs["hidden_states"] = learnt | {"path": str(run.store.folder)}


def draft_for(run: Run) -> Draft:
    torch.manual_seed(run.config.seed)
    attention, initial = (
        instantiate(run.config.draft.attention),
        instantiate(run.config.draft.initial),
    )
    vocab = run.vocab if run.config.draft.init_from is None else (None, None)
    return new_draft(run.config.draft, attention, initial, run.weights, *vocab).to(run.device)


def train_stage(run: Run) -> None:
    """Every process trains; the first one also evaluates and writes."""
    if run.reads_store:
        run.let_go_of_target()
    config, weights, ranks = run.config, run.weights, run.ranks
    shape, given = config.parallel, config.train
    loss = instantiate(config.loss)
    draft = draft_for(run)
    draft_head = weights.head[draft.target_ids]
    last = run.run_dir / "checkpoints" / "last"
    # the first rank decides: what another node sees of a shared disk may be old
    saved = checkpoint.load(last) if ranks.tell(last.exists()) else None
    group = shape.ulysses * shape.ring
    replicas, supply, deal = ranks.world_size // group, run.supply, {}
    tokens_per_update = given.tokens_per_step * given.grad_accum * replicas
    if group > 1:
        sequence = Sequence(shape.ulysses, shape.ring, ranks.rank, ranks.world_size, draft.config)
        supply, deal = sequence.spread(supply, weights.embedding), {"deal": sequence.deal}
    loader = Loader(
        supply.documents,
        draft.t2d.cpu(),
        loss.mask,
        config.draft.ttt_steps,
        epochs=given.epochs,
        max_steps=given.max_steps,
        tokens_per_step=given.tokens_per_step,
        # of a resumed run the one that it began with, however many ranks there are now
        tokens_per_update=saved.plain["tokens_per_update"] if saved else tokens_per_update,
        documents_per_update=given.documents_per_update,
        seed=config.seed,
        replica=ranks.rank // group,
        replicas=replicas,
        **deal,
    )
    optimizer = instantiate(config.optimizer)(draft.parameters())
    scheduler = instantiate(config.scheduler)(optimizer, loader.total_updates)
    trainer = Trainer(
        draft,
        weights.embedding,
        draft_head,
        supply,
        loss,
        loader,
        optimizer,
        scheduler,
        given.max_grad_norm,
        inputs=run.trained_on,
        ranks=ranks,
        reduce_dtype=REDUCE_DTYPES[shape.reduce_dtype],
    )
    resumed_at = None
    if saved:
        trainer.restore(saved)
        resumed_at, saved = trainer.update, None  # it holds a draft and its moments on the host
        console.print(f"train: resumed after update {trainer.update} of {loader.total_updates}")
    ranks.agree(list(draft.state_dict().values()))  # other processors may round other first weights
    measure = evaluation_of(run, draft, draft_head, loss) if run.evaluates else None
    try:
        with Watch(run.run_dir, ranks, config.launch.timeout):
            fit(
                trainer,
                measure,
                run.run_dir,
                metrics_log(run, resumed_at),
                save_every=given.save_every,
                eval_every=given.eval_every,
                log_every=given.log_every,
                keep_last=given.keep_last,
            )
    finally:
        run.supply.close()
    damaged = {
        key: why
        for each in ranks.collect(run.store.damaged if run.reads_store else {})
        for key, why in each.items()
    }
    conclude(run, trainer, measure, damaged)


def metrics_log(run: Run, resume_step: int | None) -> Callable[[dict[str, float], int], None]:
    """Where the loop's numbers go: the first process keeps them, and they are of all."""
    if not run.ranks.is_main:
        return lambda metrics, step: None
    lines = JsonLines(run.run_dir / "metrics.jsonl", resume_step=resume_step)

    def log(metrics: dict[str, float], step: int) -> None:
        lines.log(metrics, step)
        run.tracker.log(metrics, step)

    return log


def conclude(
    run: Run,
    trainer: Trainer,
    measure: Callable[[Draft], evaluate.Evaluation] | None,
    damaged: dict[int, str],
) -> None:
    """What is said and kept of a training that is over; every process measures, the first one
    writes.
    """
    if damaged:
        left_out = "; ".join(f"{key}: {reason}" for key, reason in sorted(damaged.items())[:5])
        console.print(
            f"train: {len(damaged)} damaged documents were left out ({left_out})", soft_wrap=True
        )
        run.inputs["damaged"] = {str(key): reason for key, reason in damaged.items()}
    if measure is None:
        console.print(
            "train: there are no held-out answers to measure on; the last checkpoint is kept as the best"
        )
        return
    if run.ranks.is_main:
        trainer.draft.load_state_dict(
            checkpoint.draft_weights(run.run_dir / "checkpoints" / "best")
        )
    best = measure(trainer.draft)
    if not run.ranks.is_main:
        return
    (run.run_dir / "evaluation.json").write_text(
        json.dumps(dataclasses.asdict(best) | {"update": trainer.best_update})
    )
    console.print(
        f"train: best acceptance length {best.acceptance_length[best.draft_length]:.2f} "
        f"at draft length {best.draft_length}, update {trainer.best_update}"
    )


def evaluation_of(
    run: Run, draft: Draft, draft_head: torch.Tensor, loss: SoftTargetLoss
) -> Callable[[Draft], evaluate.Evaluation]:
    """Exact acceptance on the target's held-out answers, which the first process measures for all."""
    if not run.ranks.is_main:
        return lambda draft: run.ranks.tell()
    config, embedding = run.config, run.weights.embedding
    steps = max(config.draft.ttt_steps, config.eval.draft_length)
    held_out = evaluate.batches(run.answers, draft.t2d, steps, config.train.tokens_per_step)

    def measure(draft: Draft) -> evaluate.Evaluation:
        return run.ranks.tell(
            evaluate.evaluate(
                draft, embedding, draft_head, loss, held_out, config.eval.draft_length
            )
        )

    return measure


def export_stage(run: Run) -> None:
    best = run.run_dir / "checkpoints" / "best"
    if not best.exists():
        raise RunError(
            f"nothing to export: {run.run_dir} has no checkpoint; put train before export in stages"
        )
    state = checkpoint.draft_weights(best)
    config = draft_config(run.config.draft, run.target_config)
    draft = Draft(config, instantiate(run.config.draft.attention), state["t2d"], state["d2t"])
    draft.load_state_dict(state)
    named = run.config.export.verifier or run.config.model.path
    made_for = export.MadeFor(
        str(Path(named).resolve()) if Path(named).is_dir() else named, run.config.eval.draft_length
    )
    written = {"draft": export.write_draft}
    if run.config.export.speculators:
        written["draft-speculators"] = export.write_speculators
    for name, write in written.items():
        write(draft, run.run_dir / name, run.target_config, run.aux_layer_ids, made_for)
        console.print(f"export: {run.run_dir / name}", soft_wrap=True)


def check_stage(run: Run) -> None:
    if not run.draft_folder.exists():
        raise ConfigError(
            f"stages=[check] finds no draft at {run.draft_folder}; set draft_path=<folder or hub id>"
        )
    diagnosis.check(run, console)


def benchmark_stage(run: Run) -> None:
    if not run.draft_folder.exists():
        raise ConfigError(
            "stages=[benchmark] needs a draft: set draft_path=<folder>, or list train and export before it"
        )
    instantiate(run.config.benchmark, run)


STAGES = {
    "import": import_stage,
    "view": view_stage,
    "check": check_stage,
    "regenerate": regenerate_stage,
    "prepare": prepare_stage,
    "generate": generate_stage,
    "capture": capture_stage,
    "train": train_stage,
    "export": export_stage,
    "benchmark": benchmark_stage,
}

TOGETHER = ("capture", "train")  # stages that every process takes part in


def result(run_dir: Path) -> float | None:
    """The acceptance length that `run.py` returns: the benchmark's first, else the evaluation's."""
    benchmark, evaluation = run_dir / "benchmark.json", run_dir / "evaluation.json"
    if benchmark.exists():
        rows = [
            row for rows in json.loads(benchmark.read_text())["suites"].values() for row in rows
        ]
        return next((row["acceptance_length"] for row in rows if row["config"][1] > 0), None)
    if evaluation.exists():
        values = json.loads(evaluation.read_text())
        return values["acceptance_length"][str(values["draft_length"])]
    return None


def execute(
    config: RunConfig, run_dir: Path, overrides: list[str], ranks: Ranks | None = None
) -> float | None:
    """Run the stages in order, then write the report; returns what `result` says. Only the first
    process writes.
    """
    run = Run(config, run_dir, overrides, ranks)
    console.quiet = not run.ranks.is_main
    if config.plan:
        plan.show(plan.make(run), console)
        return None
    try:
        return run_stages(run) if run.ranks.is_main else take_part(run)
    finally:
        run.let_go_of_target()


def run_stages(run: Run) -> float | None:
    """What the first process does."""
    config, run_dir = run.config, run.run_dir
    settings = dataclasses.asdict(config) | {"overrides": run.overrides}
    run.tracker_id = run.tracker.start(str(run_dir), config.name, settings, run.tracker_id)
    exit_code = 1
    try:
        run.write_info()
        for stage in config.stages:
            perform(run, stage)
            run.write_info()
        run.ranks.tell(None)
        report = write_report(run_dir)
        benchmark = run_dir / "benchmark.json"
        if benchmark.exists():
            run.tracker.table("benchmark", *benchmark_table(json.loads(benchmark.read_text())))
        run.tracker.file(report)
        exit_code = 0
    finally:
        run.tracker.finish(exit_code)
    show_results(run, report)
    return result(run_dir)


def perform(run: Run, stage: str) -> None:
    """A stage on the first process, and on the others as far as they take part."""
    if (
        stage == "train"
    ):  # what it reads is made first, while those who share the target still follow
        run.ranks.tell("what train reads")
        _ = run.trained_on
        run.ranks.tell(stage)
    STAGES[stage](run)


def take_part(run: Run) -> None:
    """What the other processes do while the first one runs the stages."""
    while (stage := run.ranks.tell()) is not None:
        if stage == "train":
            train_stage(run)
            run.let_go_of_target()
        else:
            if stage in TOGETHER:
                STAGES[stage](run)


def show_results(run: Run, report: Path) -> None:
    console.print(summary_table(run.run_dir))
    console.print(f"report: {report}")
    if run.draft_folder.exists():
        dropped = ("stages", "draft_path", "train.resume", "hydra.run.dir", "benchmark.temperature")
        dropped += ("launch.nproc_per_node", "parallel", "parallel.ulysses", "parallel.ring")
        again = [o for o in run.overrides if o.split("=")[0] not in dropped]
        stages = "regenerate,benchmark" if "regenerate" in run.config.stages else "benchmark"
        again = shlex.join(
            [
                *again,
                f"stages=[{stages}]",
                f"draft_path={run.draft_folder}",
                "benchmark.temperature=1",
            ]
        )
        console.print(f"next, the same draft when sampling: python run.py {again}", soft_wrap=True)
