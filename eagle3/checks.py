"""Every check that can be made before a model loads.

Nodes with a `_target_` are bound to the signature of what they name. A mistake is one ConfigError
sentence with the key, what is allowed, and the nearest name.
"""

import importlib
import inspect
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from eagle3.benchmark import builtin
from eagle3.benchmark.measure import check as check_benchmark
from eagle3.config import Data, RunConfig, nearest, parse_size
from eagle3.data.chat import load_tokenizer
from eagle3.data.sources import may_be_remote
from eagle3.draft.initial import draft_config
from eagle3.errors import ConfigError
from eagle3.export.folder import check_given
from eagle3.export.rules import ENGINES
from eagle3.parallel.ranks import choose_device, is_started
from eagle3.pipeline import STAGES
from eagle3.target.spec import check_supported, read_spec

TARGET_PREFIXES = ("eagle3.", "torch.", "transformers.")
RANGES = {
    "optimizer.lr": (1e-12, 1e3),
    "optimizer.betas": (0, 1),
    "optimizer.weight_decay": (0, 1e3),
    "scheduler.warmup_ratio": (0, 1),
    "scheduler.min_ratio": (0, 1),
    "loss.gamma": (0, 1),
    "loss.chunk_rows": (1, 1 << 30),
    "regenerate.concurrency": (1, 1e5),
    "regenerate.retries": (1, 1000),
    "regenerate.timeout": (0.1, 1e6),
    "regenerate.max_new_tokens": (1, 1 << 20),
    "regenerate.temperature": (0, 100),
    "regenerate.top_p": (1e-6, 1),
    "regenerate.top_k": (-1, 1 << 30),
    "regenerate.batch_size": (1, 1 << 20),
    "benchmark.temperature": (0, 100),
    "target.tp_size": (1, 1 << 10),
    "target.dp_size": (1, 1 << 10),
    "target.ep_size": (1, 1 << 10),
    "target.batch_tokens": (1, 1 << 30),
    "target.mem_fraction_static": (0.01, 1),
    "target.ready_seconds": (1, 1e6),
    "benchmark.max_new_tokens": (2, 1 << 20),
    "benchmark.port": (0, 65535),
    "benchmark.tp_size": (1, 1024),
    "benchmark.mem_fraction_static": (0.01, 1),
    "benchmark.ready_seconds": (1, 1e6),
    "benchmark.timeout": (1, 1e6),
}


def check(config: RunConfig) -> None:
    """Raise ConfigError for the first value, path or pair that cannot work; looks at files but
    loads no model.
    """
    check_fields(config, "")
    for stage in config.stages:
        if stage not in STAGES:
            raise ConfigError(
                f"stages={stage} is unknown; allowed: {', '.join(STAGES)}{nearest(stage, list(STAGES))}"
            )
    if config.hidden_states.max_disk is not None:
        parse_size(config.hidden_states.max_disk)
    if "regenerate" in config.stages and config.data.preformatted:
        raise ConfigError(
            "stages: regenerate needs messages, so it does not go with data.preformatted=true"
        )
    if (
        "regenerate" in config.stages
        and "prepare" in config.stages[: config.stages.index("regenerate")]
    ):
        raise ConfigError("stages: regenerate must come before prepare, which reads what it writes")
    for key in (
        "mode",
        "target",
        "regenerate",
        "loss",
        "optimizer",
        "scheduler",
        "benchmark",
        "logger",
    ):
        check_node(getattr(config, key), key)
    check_node(config.draft.attention, "draft.attention")
    check_node(config.draft.initial, "draft.initial")
    check_ranges(config)
    check_processes(config)
    if config.data.max_length > config.train.tokens_per_step:
        raise ConfigError(
            f"data.max_length={config.data.max_length} must be at most "
            f"train.tokens_per_step={config.train.tokens_per_step}, or a document would not fit into a micro-step"
        )
    asked = ("configs", "suites", "protocol", "system_prompt", "paths")
    check_benchmark(**{key: config.benchmark[key] for key in asked if key in config.benchmark})
    runner = importlib.import_module(config.benchmark["_target_"].rpartition(".")[0])
    if "benchmark" in config.stages and not config.plan and hasattr(runner, "check_settings"):
        runner.check_settings(config.benchmark)
    for engine in config.check.engines:
        if engine not in ENGINES:
            raise ConfigError(f"check.engines={engine} is unknown; allowed: {', '.join(ENGINES)}")
    if "check" in config.stages and config.draft_path is None and "export" not in config.stages:
        raise ConfigError(
            "stages=[check] needs a draft: set draft_path=<folder or hub id>, or list export before it"
        )
    check_files(config)
    check_against_target(config)
    check_target(config)


def check_target(config: RunConfig) -> None:
    """What an engine as the target asks for and cannot do."""
    target = find(config.target["_target_"], "target")
    if config.plan:
        return
    decodes = (
        "benchmark" in config.stages
        and find(config.benchmark["_target_"], "benchmark") is builtin.run
    )
    if target.in_process:
        return
    if {"generate", "capture", "train", "regenerate"} & set(config.stages):
        target.check_settings(config.target, config.model)
    if decodes:
        raise ConfigError(
            "benchmark=builtin: the built-in benchmark needs the target in this process: set target=hf or "
            "benchmark=sglang, or leave benchmark out of stages"
        )


def check_processes(config: RunConfig) -> None:
    """That the processes asked for exist and can be divided as asked for."""
    launch, group = config.launch, config.parallel.ulysses * config.parallel.ring
    processes = launch.nproc_per_node * launch.nnodes
    if processes % group:
        raise ConfigError(
            f"parallel.ulysses x parallel.ring = {group} must divide launch.nproc_per_node x launch.nnodes = "
            f"{processes}; set launch.nproc_per_node to a multiple of {group}"
        )
    gpus = torch.cuda.device_count() if choose_device(config.device).type == "cuda" else None
    if gpus is not None and launch.nproc_per_node > gpus and not config.plan:
        raise ConfigError(
            f"launch.nproc_per_node={launch.nproc_per_node} is more than the {gpus} GPUs that torch sees here; set "
            f"launch.nproc_per_node={gpus}, or device=cpu"
        )
    if launch.nnodes > 1 and launch.rdzv_endpoint is None and not is_started() and not config.plan:
        raise ConfigError(
            f"launch.nnodes={launch.nnodes} needs launch.rdzv_endpoint=<host of the first node>:<free port>; or start "
            "with launch/torchrun.sh or launch/slurm.sbatch"
        )


def check_ranges(config: RunConfig) -> None:
    """Ranges of values in nodes with a `_target_`, which no typed field holds."""
    for key, (low, high) in RANGES.items():
        section, name = key.split(".")
        values = getattr(config, section).get(name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{key}={values} must be within {low:g} and {high:g}")
    for key in ("stages", "benchmark.suites", "benchmark.configs"):
        section, _, name = key.partition(".")
        values = getattr(config, section).get(name) if name else config.stages
        if values == []:
            raise ConfigError(f"{key} is empty; name at least one")


def check_fields(section: Any, prefix: str) -> None:
    """Ranges and choices of a dataclass, recursively."""
    for f in fields(section):
        key, value = f"{prefix}{f.name}", getattr(section, f.name)
        if is_dataclass(value):
            check_fields(value, f"{key}.")
            continue
        low, high, choices = (f.metadata.get(name) for name in ("low", "high", "choices"))
        if value is None:
            continue
        if choices is not None and value not in choices:
            raise ConfigError(
                f"{key}={value} is not one of {', '.join(choices)}{nearest(str(value), choices)}"
            )
        if low is not None and not value >= low:
            raise ConfigError(f"{key}={value} must be at least {low}")
        if high is not None and not value <= high:
            raise ConfigError(f"{key}={value} must be at most {high}")


def check_node(node: dict[str, Any], key: str) -> None:
    """Bind a node with `_target_` to the signature of what it names, recursively."""
    target = node.get("_target_")
    if target is not None:
        if not target.startswith(TARGET_PREFIXES):
            raise ConfigError(
                f"{key}._target_={target} must start with one of {', '.join(TARGET_PREFIXES)}"
            )
        called = find(target, key)
        parameters = inspect.signature(called).parameters
        hints = typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
        for name, value in node.items():
            if name in ("_target_", "_partial_", "_convert_"):
                continue
            if name not in parameters:
                raise ConfigError(
                    f"{key}.{name} is unknown to {target}; allowed: {', '.join(parameters)}"
                    f"{nearest(name, list(parameters))}"
                )
            if name in hints and not fits(value, hints[name]):
                wanted = getattr(hints[name], "__name__", str(hints[name]))
                raise ConfigError(
                    f"{key}.{name}={value} is a {type(value).__name__}, but {target} takes {wanted}"
                )
    for name, value in node.items():
        if isinstance(value, dict):
            check_node(value, f"{key}.{name}")


def find(target: str, key: str) -> Any:
    """The class or function that a dotted name means."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}._target_={target} cannot be imported: {error}") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can be what a type hint asks for; hints that YAML cannot express fit
    anything.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(
            fits(v, arguments[0]) for v in value if arguments
        )
    if hint in (bool, str, int, type(None)):
        return isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return inspect.isclass(hint) is False or isinstance(value, (dict, hint)) or hint is Any


def check_files(config: RunConfig) -> None:
    """Paths that the run will read, where they are local."""
    check_data(config.data)
    hidden = config.hidden_states.path
    reads = (
        config.mode["_target_"] == "eagle3.hidden_states.supply.Offline"
        and "capture" not in config.stages
    )
    if hidden is not None and reads and not Path(hidden).is_dir():
        raise ConfigError(
            f"hidden_states.path={hidden} does not exist; give a folder, or put capture in stages"
        )
    if config.draft.config is not None and not Path(config.draft.config).is_file():
        raise ConfigError(f"draft.config={config.draft.config} does not exist; give a local file")
    for key, path in {
        "draft_path": config.draft_path,
        "draft.init_from": config.draft.init_from,
    }.items():
        if path is not None:
            check_given(path, key)
    folder = Path(config.model.path)
    if not folder.is_dir():
        if config.model.path.startswith((".", "/", "~")):
            raise ConfigError(f"model.path={folder} is not a folder; give a folder or a hub id")
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path={folder} has no config.json, so it is not a transformers model"
        )
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if needs_tokenizer(config) and not any((folder / name).is_file() for name in names):
        raise ConfigError(
            f"model.path={folder} has no tokenizer; copy the tokenizer's files beside config.json"
        )


def check_data(data: Data) -> None:
    """That data comes from `path` or from `sources`, and that what looks like a local path exists."""
    if (data.path is None) == (not data.sources):
        raise ConfigError(
            "data.path and data.sources exclude each other; set one of them, such as data.path=<file>"
        )
    paths = {"data.path": data.path, "data.eval_path": data.eval_path}
    paths |= {f"data.sources.{name}.path": source.path for name, source in data.sources.items()}
    for name, source in data.sources.items():
        check_fields(source, f"data.sources.{name}.")
    for key, path in paths.items():
        if path is not None and not may_be_remote(path) and not Path(path).expanduser().exists():
            raise ConfigError(
                f"{key}={path} does not exist; give a local file or folder, a hub id, or an address"
            )


def needs_tokenizer(config: RunConfig) -> bool:
    """Training on stored hidden states, and what comes after it, does without; `check` says so
    where it is missing.
    """
    if config.stages == ["check"]:
        return False
    stored = (
        config.mode["_target_"] == "eagle3.hidden_states.supply.Offline"
        and config.hidden_states.path is not None
    )
    return not stored or bool(set(config.stages) - {"import", "train", "export"})


def check_against_target(config: RunConfig) -> None:
    """What only the target's config can tell: layers and vocabulary."""
    target = read_spec(config.model).config
    check_supported(target)
    layers = config.model.aux_layer_ids
    if layers is not None and (
        len(layers) != 3
        or sorted(set(layers)) != layers
        or not 0 <= layers[0] <= layers[-1] < target.num_hidden_layers
    ):
        raise ConfigError(
            f"model.aux_layer_ids={layers} must be three different layers of 0..{target.num_hidden_layers - 1}, "
            "low to high"
        )
    if config.stages == ["check"]:
        return
    if config.data.max_length > target.max_position_embeddings:
        raise ConfigError(
            f"data.max_length={config.data.max_length} must be at most the target's max_position_embeddings="
            f"{target.max_position_embeddings}"
        )
    model = config.model
    if needs_tokenizer(config):
        load_tokenizer(
            model.path, model.revision, model.trust_remote_code, config.data.chat_template
        )
    if config.draft.vocab_size > target.vocab_size:
        raise ConfigError(
            f"draft.vocab_size={config.draft.vocab_size} must be at most the target's vocabulary of {target.vocab_size}"
        )
    shape, ulysses = draft_config(config.draft, target), config.parallel.ulysses
    if shape.num_key_value_heads % ulysses or shape.num_attention_heads % ulysses:
        raise ConfigError(
            f"parallel.ulysses={ulysses} must divide the draft's {shape.num_key_value_heads} key/value heads (and its "
            f"{shape.num_attention_heads} heads); make it smaller and parallel.ring larger"
        )
