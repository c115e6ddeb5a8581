"""The stages of a run, what each reads and what each leaves behind."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from rich.console import Console
from transformers import PretrainedConfig

from eagle3 import checkpoint, evaluate, export, generate
from eagle3.artefact import artefact, facts
from eagle3.config import RunConfig
from eagle3.data import prepare, view
from eagle3.data.chat import Chat, load_tokenizer
from eagle3.data.encoder import Preparation
from eagle3.data.loader import Loader
from eagle3.data.packing import Batch
from eagle3.data.sources import DataFile, Source, SourceFiles, find_files, read_rows
from eagle3.data.vocab import vocab_tensors
from eagle3.distributed import choose_device
from eagle3.draft.initial import draft_config, new_draft
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.logger import JsonLines, redact
from eagle3.report import benchmark_table, prepared_table, summary_table, write_report
from eagle3.target.features import Features
from eagle3.target.hf import HFTarget, default_aux_layer_ids, describe, text_config
from eagle3.train import Trainer, fit

PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "safetensors", "numpy")
HOW_TO_ASK = {"urls", "api_key_env", "concurrency", "retries", "timeout"}  # of `regenerate`: no answer depends on them
console = Console(markup=False)


class Run:
    """One job: its config, its folder, and what several stages share, made when first asked for."""

    def __init__(self, config: RunConfig, run_dir: Path, overrides: list[str]):
        before = json.loads((run_dir / "run.json").read_text()) if (run_dir / "run.json").exists() else {}
        self.config, self.run_dir = config, run_dir
        self.overrides, self.resumed_with = before.get("overrides", overrides), overrides if before else None
        self.inputs: dict[str, Any] = before.get("inputs", {})
        self.tracker_id: str | None = before.get("tracker_id")
        self.device = choose_device(config.device)
        self.tracker = instantiate(config.logger)

    @cached_property
    def target_config(self) -> PretrainedConfig:
        model = self.config.model
        return text_config(model.path, model.revision, model.trust_remote_code)

    @property
    def aux_layer_ids(self) -> list[int]:
        return self.config.model.aux_layer_ids or default_aux_layer_ids(self.target_config.num_hidden_layers)

    @cached_property
    def target(self) -> HFTarget:
        model = self.config.model
        return instantiate(self.config.target)(
            model.path,
            self.device,
            aux_layer_ids=self.aux_layer_ids,
            revision=model.revision,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
        )

    @cached_property
    def chat(self) -> Chat:
        model, data = self.config.model, self.config.data
        tokenizer = load_tokenizer(model.path, model.revision, model.trust_remote_code, data.chat_template)
        return Chat(tokenizer, data.chat_template_kwargs)

    @cached_property
    def given_sources(self) -> SourceFiles:
        """The files that `data` names."""
        data = self.config.data
        sources = [Source(**vars(source)) for source in data.sources.values()]
        sources = sources or [Source(data.path, data.subset, data.split)]
        return [(source, find_files(source, self.config.cache_dir)) for source in sources]

    @cached_property
    def sources(self) -> SourceFiles:
        """What `prepare` reads: the given files, or what the target answered again when `regenerate` is a stage."""
        if "regenerate" not in self.config.stages:
            return self.given_sources
        again = [
            Source(str(path / "conversations.jsonl"), weight=max(1.0, source.weight))
            for path, (source, _) in zip(self.regenerated_paths, self.given_sources, strict=True)
        ]
        return [(source, find_files(source, self.config.cache_dir)) for source in again]

    @cached_property
    def regenerated_paths(self) -> list[Path]:
        """The target's own answers to the prompts of each source; of one weighted below 1, only to its share."""
        return [self.regenerated(source, found) for source, found in self.given_sources]

    def regenerated(self, source: Source, files: list[DataFile]) -> Path:
        config, model = self.config, self.config.model
        inputs = {
            "files": [file.identity for file in files],
            "share": min(1.0, source.weight),
            "num_samples": config.data.num_samples,
            "system_prompt": config.data.system_prompt,
            "max_length": config.data.max_length,
            "chat": self.chat.identity,
            "target": describe(model.path, model.revision, model.trust_remote_code),
            "answers": {k: v for k, v in config.regenerate.items() if k not in HOW_TO_ASK},
        }
        rows = read_rows(files, config.data.num_samples, share=min(1.0, source.weight))
        write = instantiate(config.regenerate)
        return artefact(config.cache_dir, "regenerated", inputs, lambda folder: write(self, rows, folder))

    @cached_property
    def prepared_path(self) -> Path:
        config, data = self.config, self.config.data
        options = Preparation(
            num_samples=data.num_samples,
            max_length=data.max_length,
            preformatted=data.preformatted,
            system_prompt=data.system_prompt,
            only_last_turn=data.train_only_last_turn,
            on_reject=data.on_reject,
            num_heldout=config.eval.num_prompts,
            vocab_size=self.target_config.vocab_size,
            draft_vocab_size=config.draft.vocab_size,
        )
        eval_files = find_files(Source(data.eval_path), config.cache_dir) if data.eval_path else []
        inputs = dataclasses.asdict(options) | {
            "sources": [[source.weight, [file.identity for file in found]] for source, found in self.sources],
            "eval": [file.identity for file in eval_files],
            "chat": self.chat.identity,
        }
        num_proc = data.num_proc or len(os.sched_getaffinity(0))

        def write(folder: Path) -> dict:
            return prepare.write(folder, self.chat, options, self.sources, eval_files, num_proc)

        return artefact(config.cache_dir, "prepared", inputs, write)

    @cached_property
    def prepared(self) -> prepare.Prepared:
        return prepare.load(self.prepared_path)

    @cached_property
    def answers_path(self) -> Path:
        config, model = self.config, self.config.model
        inputs = {
            "target": describe(model.path, model.revision, model.trust_remote_code),
            "dtype": str(self.target.model.dtype),
            "aux_layer_ids": self.aux_layer_ids,
            "prompts": self.prepared.heldout,
            "max_new_tokens": config.eval.max_new_tokens,
            "batch_size": config.eval.batch_size,
        }
        return artefact(
            config.cache_dir,
            "generated",
            inputs,
            lambda folder: generate.write(
                folder, self.target, self.prepared.heldout, config.eval.max_new_tokens, config.eval.batch_size
            ),
        )

    @cached_property
    def answers(self) -> list[generate.Answer]:
        return generate.load(self.answers_path, self.prepared.heldout)

    @cached_property
    def vocab(self) -> tuple[torch.Tensor, torch.Tensor]:
        """t2d bool [V] and d2t int64 [Vd] of the prepared data."""
        return vocab_tensors(self.prepared.vocab, self.target_config.vocab_size)

    @property
    def draft_folder(self) -> Path:
        return Path(self.config.draft_path) if self.config.draft_path else self.run_dir / "draft"

    def write_info(self) -> None:
        """run.json: what this run was made from, rewritten as stages add what they learn."""
        info = {
            "config": redact(dataclasses.asdict(self.config)),
            "overrides": redact(self.overrides),
            "resumed_with": redact(self.resumed_with),
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "tracker_id": self.tracker_id,
            "git": git_commit(),
            "hardware": hardware(self.device),
            "seeds": {"seed": self.config.seed},
            "inputs": self.inputs,
        }
        path = self.run_dir / "run.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(info, indent=1, default=str))
        os.replace(partial, path)


def git_commit() -> str | None:
    """The commit of the code, with `+` when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty else "")


def hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "system": platform.platform()}


def online(run: Run) -> Callable[[Batch], Features]:
    """`mode=online`: the target says its Features batch by batch."""
    return run.target


def view_stage(run: Run) -> None:
    config = run.config
    rows = chain.from_iterable(read_rows(found, None, config.data.preformatted) for _, found in run.sources)
    samples = view.collect(rows, run.chat, config.data, config.view.num_samples)
    view.show(samples, console)
    view.write_page(samples, run.run_dir / "view.html")
    console.print(f"view: {run.run_dir / 'view.html'}")


def regenerate_stage(run: Run) -> None:
    run.inputs["regenerated"] = []
    for path in run.regenerated_paths:
        learnt = facts(path)
        console.print(
            f"regenerate: {learnt['answered']:,} of {learnt['rows']:,} conversations answered again, "
            f"{path / 'conversations.jsonl'}",
            soft_wrap=True,
        )
        for reason, count in learnt["rejected"].items():
            console.print(f"regenerate: rejected {count:,} x {reason}")
        run.inputs["regenerated"].append(learnt | {"path": str(path)})


def prepare_stage(run: Run) -> None:
    learnt = facts(run.prepared_path)
    console.print(prepared_table(learnt))
    if learnt["rejected"] or learnt["heldout_rejected"]:
        console.print(f"prepare: rejected rows are listed in {run.prepared_path / 'rejects.jsonl'}", soft_wrap=True)
    run.inputs["prepared"] = learnt | {"path": str(run.prepared_path)}


def generate_stage(run: Run) -> None:
    learnt = facts(run.answers_path)
    console.print(f"generate: {learnt['answers']} answers of the target, {learnt['answer_tokens']:,} tokens")
    run.inputs["generated"] = learnt | {"path": str(run.answers_path)}


def draft_for(run: Run) -> Draft:
    torch.manual_seed(run.config.seed)
    attention, initial = instantiate(run.config.draft.attention), instantiate(run.config.draft.initial)
    return new_draft(run.config.draft, attention, initial, run.target, *run.vocab).to(run.device)


def train_stage(run: Run) -> None:
    config, target = run.config, run.target
    loss = instantiate(config.loss)
    draft = draft_for(run)
    draft_head = target.head[draft.target_ids]
    loader = Loader(
        run.prepared,
        draft.t2d.cpu(),
        loss.mask,
        config.draft.ttt_steps,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        tokens_per_step=config.train.tokens_per_step,
        grad_accum=config.train.grad_accum,
        documents_per_update=config.train.documents_per_update,
        seed=config.seed,
    )
    optimizer = instantiate(config.optimizer)(draft.parameters())
    scheduler = instantiate(config.scheduler)(optimizer, loader.total_updates)
    features_of = instantiate(config.mode, run)
    trainer = Trainer(
        draft,
        target.embedding,
        draft_head,
        features_of,
        loss,
        loader,
        optimizer,
        scheduler,
        config.train.max_grad_norm,
        inputs={"the prepared data": run.prepared_path.name, "the target's answers": run.answers_path.name},
    )
    last = run.run_dir / "checkpoints" / "last"
    if last.exists():
        trainer.restore(checkpoint.load(last))
        console.print(f"train: resumed after update {trainer.update} of {loader.total_updates}")
    steps = max(config.draft.ttt_steps, config.eval.draft_length)
    held_out = evaluate.batches(run.answers, draft.t2d, steps, config.train.tokens_per_step)

    def measure(draft: Draft) -> evaluate.Evaluation:
        return evaluate.evaluate(draft, target.embedding, draft_head, loss, held_out, config.eval.draft_length)

    metrics_file = JsonLines(run.run_dir / "metrics.jsonl", resume_step=trainer.update if last.exists() else None)
    fit(
        trainer,
        measure,
        run.run_dir,
        metrics_file,
        run.tracker.log,
        save_every=config.train.save_every,
        eval_every=config.train.eval_every,
        log_every=config.train.log_every,
        keep_last=config.train.keep_last,
    )
    trainer.draft.load_state_dict(checkpoint.load(run.run_dir / "checkpoints" / "best")["draft"])
    best = measure(trainer.draft)
    (run.run_dir / "evaluation.json").write_text(json.dumps(dataclasses.asdict(best) | {"update": trainer.best_update}))
    console.print(
        f"train: best acceptance length {best.acceptance_length[best.draft_length]:.2f} "
        f"at draft length {best.draft_length}, update {trainer.best_update}"
    )


def export_stage(run: Run) -> None:
    best = run.run_dir / "checkpoints" / "best"
    if not best.exists():
        raise RunError(f"nothing to export: {run.run_dir} has no checkpoint; put train before export in stages")
    state = checkpoint.load(best)["draft"]
    config = draft_config(run.config.draft, run.target_config)
    draft = Draft(config, instantiate(run.config.draft.attention), state["t2d"], state["d2t"])
    draft.load_state_dict(state)
    export.write_draft(draft, run.run_dir / "draft", run.target_config, run.aux_layer_ids)
    console.print(f"export: {run.run_dir / 'draft'}")


def benchmark_stage(run: Run) -> None:
    if not run.draft_folder.exists():
        raise ConfigError(
            "stages=[benchmark] needs a draft: set draft_path=<folder>, or list train and export before it"
        )
    attention = instantiate(run.config.draft.attention)
    draft = export.read_draft(run.draft_folder, attention, run.target_config, run.aux_layer_ids)
    instantiate(run.config.benchmark, run, draft.to(run.device).eval())


STAGES = {
    "view": view_stage,
    "regenerate": regenerate_stage,
    "prepare": prepare_stage,
    "generate": generate_stage,
    "train": train_stage,
    "export": export_stage,
    "benchmark": benchmark_stage,
}


def result(run_dir: Path) -> float | None:
    """The acceptance length that `run.py` returns: the benchmark's first, else the evaluation's."""
    benchmark, evaluation = run_dir / "benchmark.json", run_dir / "evaluation.json"
    if benchmark.exists():
        rows = [row for rows in json.loads(benchmark.read_text())["suites"].values() for row in rows]
        return next((row["acceptance_length"] for row in rows if row["config"][1] > 0), None)
    if evaluation.exists():
        values = json.loads(evaluation.read_text())
        return values["acceptance_length"][str(values["draft_length"])]
    return None


def execute(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Run the stages in order, then write the report; returns what `result` says."""
    run = Run(config, run_dir, overrides)
    settings = dataclasses.asdict(config) | {"overrides": run.overrides}
    run.tracker_id = run.tracker.start(str(run_dir), config.name, settings, run.tracker_id)
    exit_code = 1
    try:
        run.write_info()
        for stage in config.stages:
            STAGES[stage](run)
            run.write_info()
        report = write_report(run_dir)
        benchmark = run_dir / "benchmark.json"
        if benchmark.exists():
            run.tracker.table("benchmark", *benchmark_table(json.loads(benchmark.read_text())))
        run.tracker.file(report)
        exit_code = 0
    finally:
        run.tracker.finish(exit_code)
    console.print(summary_table(run_dir))
    console.print(f"report: {report}")
    if run.draft_folder.exists():
        dropped = ("stages", "draft_path", "train.resume", "hydra.run.dir", "benchmark.temperature")
        again = [o for o in run.overrides if o.split("=")[0] not in dropped]
        again = shlex.join([*again, "stages=[benchmark]", f"draft_path={run.draft_folder}", "benchmark.temperature=1"])
        console.print(f"next, the same draft when sampling: python run.py {again}", soft_wrap=True)
    return result(run_dir)
