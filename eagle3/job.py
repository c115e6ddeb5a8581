"""One job: its config, its folder, and what several stages share, made when first asked for."""

import dataclasses
import json
import os
import platform
import subprocess
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from rich.console import Console
from transformers import PretrainedConfig

from eagle3 import evaluate as generate
from eagle3.config import RunConfig, Source
from eagle3.data import prepare
from eagle3.data.chat import Chat, load_tokenizer
from eagle3.data.encoder import Preparation
from eagle3.data.sources import DataFile, SourceFiles, find_files, read_rows
from eagle3.data.vocab import vocab_tensors
from eagle3.draft.model import Draft
from eagle3.export.folder import locate
from eagle3.export.write import read_draft
from eagle3.hidden_states.capture import capture
from eagle3.hidden_states.import_specforge import import_specforge, is_specforge
from eagle3.hidden_states.store import Store, open_for_hybrid, open_store, store_inputs
from eagle3.hidden_states.supply import Supply
from eagle3.parallel.ranks import Ranks, choose_device
from eagle3.runs.artefact import artefact, read_facts, fingerprint
from eagle3.runs.logger import NoTracker, redact
from eagle3.target.handle import TargetHandle
from eagle3.target.hf import HFTarget
from eagle3.target.spec import TargetSpec, read_spec
from eagle3.target.weights import TargetWeights, load_weights

PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "safetensors", "numpy")
HOW_TO_ASK = {
    "urls",
    "api_key_env",
    "concurrency",
    "retries",
    "timeout",
}  # of `regenerate`: no answer depends on them


class Run:
    """One job: its config, its folder, and what several stages share, made when first asked for."""

    def __init__(
        self, config: RunConfig, run_dir: Path, overrides: list[str], ranks: Ranks | None = None
    ):
        self.ranks = ranks or Ranks()
        before = (
            json.loads((run_dir / "run.json").read_text())
            if (run_dir / "run.json").exists()
            else {}
        )
        self.config, self.run_dir = config, run_dir
        self.overrides, self.resumed_with = (
            before.get("overrides", overrides),
            overrides if before else None,
        )
        self.inputs: dict[str, Any] = before.get("inputs", {})
        self.tracker_id: str | None = before.get("tracker_id")
        self.device = choose_device(config.device)
        self.tracker = instantiate(config.logger) if self.ranks.is_main else NoTracker()

    @cached_property
    def spec(self) -> TargetSpec:
        return read_spec(self.config.model)

    @property
    def target_config(self) -> PretrainedConfig:
        return self.spec.config

    @property
    def aux_layer_ids(self) -> list[int]:
        return self.spec.aux_layer_ids

    @property
    def target_dtype(self) -> str:
        return self.spec.dtype

    @cached_property
    def handle(self) -> TargetHandle:
        return TargetHandle(self.spec, self.config.target, self.device)

    @property
    def target(self) -> HFTarget:
        return self.handle.load()

    def let_go_of_target(self) -> None:
        for name in ("weights", "supply"):
            self.__dict__.pop(name, None)
        self.handle.close()

    @property
    def reads_store(self) -> bool:
        """Whether training needs no target, because hidden states were captured before."""
        return get_class(self.config.mode["_target_"]).captures

    @cached_property
    def weights(self) -> HFTarget | TargetWeights:
        """The target's embedding and head: those of the target where it is loaded, else only they
        are read.
        """
        if self.handle.loaded or not self.reads_store:
            return self.target
        return self.load_weights()

    def load_weights(self) -> TargetWeights:
        return load_weights(self.spec, self.device)

    @cached_property
    def chat(self) -> Chat:
        model, data = self.config.model, self.config.data
        tokenizer = load_tokenizer(
            model.path, model.revision, model.trust_remote_code, data.chat_template
        )
        return Chat(tokenizer, data.chat_template_kwargs)

    @cached_property
    def given_sources(self) -> SourceFiles:
        """The files that `data` names."""
        data, cache_dir = self.config.data, self.config.cache_dir
        if data.sources:
            return [
                (source, find_files(source, cache_dir, f"data.sources.{name}"))
                for name, source in data.sources.items()
            ]
        source = Source(data.path, data.subset, data.split)
        return [(source, find_files(source, cache_dir))]

    @cached_property
    def sources(self) -> SourceFiles:
        """What `prepare` reads: the given files, or what the target answered again when
        `regenerate` is a stage.
        """
        if "regenerate" not in self.config.stages:
            return self.given_sources
        again = [
            Source(str(path / "conversations.jsonl"), weight=max(1.0, source.weight))
            for path, (source, _) in zip(self.regenerated_paths, self.given_sources, strict=True)
        ]
        return [(source, find_files(source, self.config.cache_dir)) for source in again]

    @cached_property
    def regenerated_paths(self) -> list[Path]:
        """The target's own answers to the prompts of each source; of one weighted below 1, only to
        its share.
        """
        return [self.regenerated(source, found) for source, found in self.given_sources]

    def regenerated(self, source: Source, files: list[DataFile]) -> Path:
        config = self.config
        inputs = {
            "files": [file.identity for file in files],
            "share": min(1.0, source.weight),
            "num_samples": config.data.num_samples,
            "system_prompt": config.data.system_prompt,
            "max_length": config.data.max_length,
            "chat": self.chat.identity,
            "target": self.spec.identity,
            "answers": {k: v for k, v in config.regenerate.items() if k not in HOW_TO_ASK},
        }
        rows = read_rows(files, config.data.num_samples, share=min(1.0, source.weight))
        write = instantiate(config.regenerate)
        return artefact(
            config.cache_dir,
            "regenerated",
            inputs,
            lambda folder: write(self, rows, folder),
            "regenerate",
        )

    @property
    def preparation(self) -> Preparation:
        """What the stage `prepare` is asked for."""
        config, data = self.config, self.config.data
        return Preparation(
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

    @cached_property
    def eval_files(self) -> list[DataFile]:
        path = self.config.data.eval_path
        return find_files(Source(path), self.config.cache_dir) if path else []

    @cached_property
    def prepared_inputs(self) -> dict[str, Any]:
        """What the prepared data depends on."""
        return dataclasses.asdict(self.preparation) | {
            "format": prepare.FORMAT,
            "sources": [
                [source.weight, [file.identity for file in found]] for source, found in self.sources
            ],
            "eval": [file.identity for file in self.eval_files],
            "chat": self.chat.identity,
        }

    @cached_property
    def prepared_path(self) -> Path:
        num_proc = self.config.data.num_proc or len(os.sched_getaffinity(0))

        def write(folder: Path) -> dict:
            return prepare.write(
                folder, self.chat, self.preparation, self.sources, self.eval_files, num_proc
            )

        return artefact(self.config.cache_dir, "prepared", self.prepared_inputs, write, "prepare")

    def prepared_if_there(self) -> prepare.Prepared | None:
        """The prepared data, if an earlier run has left it; for plans, which make nothing."""
        if "regenerate" in self.config.stages:
            return None
        path = Path(self.config.cache_dir) / "prepared" / fingerprint(self.prepared_inputs)
        return prepare.load(path) if (path / "artefact.json").is_file() else None

    @cached_property
    def prepared(self) -> prepare.Prepared:
        return prepare.load(self.prepared_path)

    @cached_property
    def answers_path(self) -> Path:
        config = self.config
        inputs = {
            "target": self.spec.identity,
            "dtype": self.target_dtype,
            "aux_layer_ids": self.aux_layer_ids,
            **self.quantised_by_engine,
            "prompts": self.prepared.heldout,
            "max_new_tokens": config.eval.max_new_tokens,
            "batch_size": config.eval.batch_size,
        }
        return artefact(
            config.cache_dir,
            "generated",
            inputs,
            lambda folder: generate.write_answers(
                folder,
                self.target,
                self.prepared.heldout,
                config.eval.max_new_tokens,
                config.eval.batch_size,
            ),
            "generate",
        )

    @property
    def quantised_by_engine(self) -> dict[str, str]:
        """How an engine quantises the target while loading it, if it does: that changes the hidden
        states.
        """
        name = self.config.target.get("quantization")
        return {} if name is None else {"quantization": name}

    @cached_property
    def answers(self) -> list[generate.Answer]:
        return generate.load_answers(self.answers_path, self.prepared.heldout)

    @property
    def store_inputs(self) -> dict[str, Any]:
        """What hidden states depend on."""
        config = self.config
        alone = (
            self.reads_store
            and config.hidden_states.path
            and not {"prepare", "capture"} & set(config.stages)
        )
        digest = None if alone else read_facts(self.prepared_path)["digest"]
        return store_inputs(self.handle, config.hidden_states.dtype, digest)

    @cached_property
    def imported_path(self) -> Path:
        config = self.config
        return import_specforge(
            config.hidden_states, self.handle, config.data.max_length, config.cache_dir, True
        )

    @cached_property
    def store(self) -> Store:
        config, section = self.config, self.config.hidden_states
        if section.path and is_specforge(Path(section.path)):
            return open_store(section, self.imported_path, self.store_inputs)
        if section.path and not {"prepare", "capture"} & set(config.stages):
            return open_store(section, Path(section.path), self.store_inputs)
        self.prepared.digest = read_facts(self.prepared_path)["digest"]
        write = "capture" in config.stages
        return capture(section, self.prepared, self.handle, config.cache_dir, write, Console())

    @cached_property
    def supply(self) -> Supply:
        config, kind = self.config, get_class(self.config.mode["_target_"])
        store, prepared = None, None if kind.captures else self.prepared
        if kind.keeps:
            store = open_for_hybrid(
                config.hidden_states, self.store_inputs, config.cache_dir, self.ranks.rank
            )
            self.inputs["damaged"] = store.damaged
        elif kind.captures:
            store = self.store
        return kind(prepared, store, self.handle, self.ranks.meet)

    @cached_property
    def vocab(self) -> tuple[torch.Tensor, torch.Tensor]:
        """t2d bool [V] and d2t int64 [Vd] of the data: prepared here, or noted or counted in a
        store.
        """
        given = self.config.hidden_states.path
        stored = given and self.reads_store
        ids = self.store.vocab(self.config.draft.vocab_size) if stored else self.prepared.vocab
        return vocab_tensors(ids, self.target_config.vocab_size)

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out prompts to measure on: imported hidden states come without."""
        return not (
            self.config.hidden_states.path and self.reads_store and "imported" in self.store.inputs
        )

    @property
    def trained_on(self) -> dict[str, str]:
        """Fingerprints of what a checkpoint belongs to."""
        if not self.evaluates:
            return {"the imported hidden states": fingerprint(self.store.inputs)}
        documents = fingerprint(self.store.inputs) if self.reads_store else self.prepared_path.name
        return {"the data": documents, "the target's answers": self.answers_path.name}

    @cached_property
    def draft_folder(self) -> Path:
        """The draft to measure: the one that `draft_path` names, fetched from the hub if need be,
        or this run's own.
        """
        return locate(self.config.draft_path) if self.config.draft_path else self.run_dir / "draft"

    def read_draft(self) -> Draft:
        """The draft in `draft_folder`, ready to draft."""
        attention = instantiate(self.config.draft.attention)
        draft = read_draft(self.draft_folder, attention, self.target_config, self.aux_layer_ids)
        return draft.to(self.device).eval()

    def write_info(self) -> None:
        """run.json: what this run was made from, rewritten as stages add what they learn."""
        info = {
            "config": redact(dataclasses.asdict(self.config)),
            "overrides": redact(self.overrides),
            "resumed_with": redact(self.resumed_with),
            "versions": {name: version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
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
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty else "")


def hardware(device: torch.device) -> dict[str, Any]:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
