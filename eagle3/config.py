"""The typed root of the configuration.

Its defaults stand in `conf/` alone: a field that no file there sets is missing, and the run ends
with its name. Bounds stand on the field, or on the parameter of what a `_target_` names.
"""

import difflib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Optional
from urllib.parse import urlsplit

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, SCMode

from eagle3.errors import ConfigError

CONF = Path(__file__).parents[1] / "conf"
MAX_STEPS = 16  # of the unroll, and drafted tokens a round
HYDRA_KEYS = ("_target_", "_partial_", "_convert_")  # of a node that is called


@dataclass(frozen=True)
class Within:
    """Bounds of a parameter, inclusive; of a list, those of its elements."""

    low: float
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        low, high = f"{self.low:.10g}", f"{self.high:.10g}"
        return f"at least {low}" if self.high == math.inf else f"within {low} and {high}"


class OneOf(tuple):
    """The values that a parameter can have; of a list, those of its elements."""

    def __str__(self) -> str:
        return f"one of {', '.join(self)}"


# In the order in which the pipeline runs those that are listed.
STAGES = (
    "import", "regenerate", "view", "prepare", "generate", "capture", "train", "export", "check",
    "benchmark", "compare",
)  # fmt: skip

# The sections, by which OmegaConf types a run. Where a group chooses what is built, the section is
# a dict: what its `_target_` names has the signature and the bounds.


@dataclass
class Model:
    path: str
    revision: Optional[str]
    dtype: Annotated[str, OneOf(("auto", "float32", "bfloat16", "float16"))]
    trust_remote_code: bool
    aux_layer_ids: Optional[list[int]]
    embedding_key: Optional[str]
    lm_head_key: Optional[str]


@dataclass
class Source:
    """One dataset; `weight` is how often an epoch passes over it (0.5: over half of its rows)."""

    # The one section with defaults of its own, because the names of sources are the user's.
    path: str
    subset: Optional[str] = None
    split: str = "train"
    weight: Annotated[float, Within(0, 100)] = 1.0


@dataclass
class Data:
    path: Optional[str]
    subset: Optional[str]
    split: str
    sources: dict[str, Source]
    eval_path: Optional[str]
    num_samples: Annotated[Optional[int], Within(1)]
    num_proc: Annotated[Optional[int], Within(1)]
    max_length: Annotated[int, Within(4)]
    chat_template: str
    chat_template_kwargs: dict[str, Any]
    preformatted: bool
    system_prompt: Optional[str]
    train_only_last_turn: bool
    on_reject: Annotated[str, OneOf(("skip", "fail"))]


@dataclass
class View:
    num_samples: Annotated[int, Within(1)]


@dataclass
class HiddenStates:
    path: Optional[str]
    dtype: Annotated[Optional[str], OneOf(("fp32", "bf16", "int8"))]
    max_disk: Optional[str]
    on_damage: Annotated[str, OneOf(("fail", "skip"))]


@dataclass
class DraftSection:
    """`layers`, `block`, `anchors`, `mask_token_id` and `markov_rank` are of block drafters."""

    architecture: dict[str, Any]
    ttt_steps: Annotated[int, Within(1, MAX_STEPS)]
    vocab_size: Annotated[int, Within(1)]
    fc_norm: bool
    norm_output: bool
    layers: Annotated[int, Within(1)]
    block: Annotated[int, Within(2, MAX_STEPS)]
    anchors: Annotated[Optional[int], Within(1)]
    mask_token_id: Annotated[Optional[int], Within(0)]
    markov_rank: Annotated[int, Within(1)]
    config: Optional[str]
    init_from: Optional[str]
    attention: dict[str, Any]
    kernels: dict[str, Any]
    initial: dict[str, Any]


@dataclass
class Train:
    epochs: Annotated[int, Within(1)]
    data_share: Annotated[float, Within(1e-6, 1)]
    max_steps: Annotated[Optional[int], Within(1)]
    tokens_per_step: Annotated[int, Within(4)]
    documents_per_update: Annotated[Optional[int], Within(1)]
    grad_accum: Annotated[int, Within(1)]
    max_grad_norm: Annotated[float, Within(1e-9)]
    save_every: Annotated[int, Within(1)]
    eval_every: Annotated[int, Within(1)]
    log_every: Annotated[int, Within(1)]
    keep_last: Annotated[int, Within(1)]
    best_by: Annotated[list[float], Within(0, 100)]
    resume: str
    deterministic: bool


@dataclass
class Eval:
    """The held-out prompts; acceptance at `draft_length` says which checkpoint is `best`."""

    temperature: Annotated[list[float], Within(0, 100)]
    num_prompts: Annotated[int, Within(1)]
    max_new_tokens: Annotated[int, Within(2)]
    draft_length: Annotated[int, Within(1, MAX_STEPS)]
    batch_size: Annotated[int, Within(1)]


@dataclass
class Export:
    speculators: bool
    verifier: Optional[str]
    push_to_hub: Optional[str]


@dataclass
class Check:
    engines: Annotated[list[str], OneOf(("sglang", "vllm", "trtllm", "official"))]
    decode: bool
    num_prompts: Annotated[int, Within(1, 8)]
    max_new_tokens: Annotated[int, Within(2)]


@dataclass
class Sweep:
    resume: Optional[str]
    trial: Annotated[Optional[int], Within(0)]


@dataclass
class Parallel:
    """`ulysses` x `ring` ranks share each micro-batch; groups of them train on other documents."""

    ulysses: Annotated[Optional[int], Within(1)]
    ring: Annotated[int, Within(1)]
    reduce_dtype: Annotated[str, OneOf(("fp32", "bf16"))]


@dataclass
class Launch:
    nproc_per_node: Annotated[int, Within(1)]
    nnodes: Annotated[int, Within(1)]
    threads: Annotated[Optional[int], Within(1)]
    timeout: Annotated[float, Within(1)]
    shutdown_timeout: Annotated[int, Within(1)]


@dataclass
class RunConfig:
    name: str
    seed: Annotated[int, Within(0)]
    stages: Annotated[list[str], OneOf(STAGES)]
    plan: bool
    device: Annotated[str, OneOf(("auto", "cpu", "cuda"))]
    cache_dir: str
    draft_path: Optional[str]
    runs: list[str]
    sweep: Sweep
    model: Model
    data: Data
    view: View
    regenerate: dict[str, Any]
    mode: dict[str, Any]
    hidden_states: HiddenStates
    target: dict[str, Any]
    draft: DraftSection
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    train: Train
    eval: Eval
    parallel: Parallel
    export: Export
    check: Check
    benchmark: dict[str, Any]
    logger: dict[str, Any]
    launch: Launch


def layout(config: RunConfig) -> tuple[int, int]:
    """(ulysses, ring); their product is a group, and ulysses null takes what ring leaves of all."""
    launch, shape = config.launch, config.parallel
    left = launch.nproc_per_node * launch.nnodes // shape.ring
    return shape.ulysses or max(1, left), shape.ring


def label(group: str, *, _root_: DictConfig) -> str:
    """What `name` calls the choice of a group: its option, or the paths or sources of the user's
    where that option's file has none.
    """
    sweeps = not HydraConfig.initialized()  # it names its folder before hydra runs a job
    hydra = _root_.hydra if sweeps else HydraConfig.get()
    option, keys = hydra.runtime.choices[group], (f"{group}=", f"{group}.path=")
    swept = [each for each in hydra.overrides.task if each.startswith(keys) and "," in each]
    if sweeps and swept:
        given = swept[-1].partition("=")[2].split(",")
    else:
        file = CONF / group / f"{option}.yaml"
        known = yaml.safe_load(file.read_text()) if file.is_file() else {"path": option}
        if known.get("path", "") not in (None, "???") or "sources" in known:
            return option
        path, sources = (OmegaConf.select(_root_, f"{group}.{key}") for key in ("path", "sources"))
        given = [path] if path else sources or ()
    return "+".join(filter(None, map(last_part, given)))[:80] or option


def sweep_name() -> str | None:
    """The sweep that this job is of, by which a tracker groups its runs; None for a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return " ".join(Path(HydraConfig.get().sweep.dir).parts[-2:])


def last_part(path: str) -> str:
    """The last part of a path, a hub id or an address, as the name of a folder; formats go."""
    if "://" in path:  # which may hold a login, in front and behind
        address = urlsplit(path)
        path = address.path.strip("/") or address.hostname or ""
    name = os.path.basename(os.path.abspath(os.path.expanduser(path)))
    name = re.sub(r"\.(jsonl?|ndjson|parquet)(\.\w+)?$", "", name)
    # What a shell and hydra's command line take as it is.
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")


ConfigStore.instance().store(name="schema", node=RunConfig)
OmegaConf.register_new_resolver("label", label, replace=True)
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
# All nodes of a Slurm job compute the same port, and two jobs on a node hardly ever share one.
OmegaConf.register_new_resolver("package", lambda p: str(Path(__file__).parent / p), replace=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config -> {"a.b": value}; empty sections vanish."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True, structured_config_mode=SCMode.DICT)
    if not isinstance(config, dict):
        return {prefix: config}
    values: dict[str, Any] = {}
    for name, value in config.items():
        values |= flatten(value, f"{prefix}.{name}".lstrip("."))
    return values


def compose_flat(overrides: list[str]) -> dict[str, Any]:
    """What overrides come to: values by dotted key, and options by group. Raises HydraException."""
    GlobalHydra.instance().clear()  # it may be in the middle of a composition that failed
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("run", ["name=x", *overrides], return_hydra_config=True)
    sections = OmegaConf.masked_copy(whole, list(RunConfig.__annotations__))
    return flatten(sections) | dict(whole.hydra.runtime.choices)


OFFERED = (
    "eagle3.runs.logger.NoTracker",  # which older runs have in their run.json
    *(f"torch.optim.{name}" for name in ("Adafactor", "Adam", "AdamW", "NAdam", "RAdam", "SGD")),
    # those that take the number of updates behind the optimiser
    *(f"torch.optim.lr_scheduler.{name}" for name in ("CosineAnnealingLR", "PolynomialLR")),
)


@cache
def offered_targets() -> tuple[str, ...]:
    """What a `_target_` may name: OFFERED, and what the files of conf/ name themselves."""
    # Any other name of this package is refused too: `eagle3.runs.logger.os.system` is one.
    texts = [path.read_text() for path in sorted(CONF.rglob("*.yaml"))]
    named = re.findall(r"^ *_target_: (\S+)", "\n".join(texts), re.MULTILINE)
    return (*dict.fromkeys(named), *OFFERED)


def check_targets(key: str, value: Any) -> None:
    """Raise ConfigError for a `_target_` that is not offered, at any depth of nested values."""
    nested = dict(enumerate(value)) if isinstance(value, list) else value
    for name, inner in nested.items() if isinstance(nested, dict) else ():
        check_targets(f"{key}.{name}".lstrip("."), inner)
        if name == "_target_" and inner not in offered_targets():
            near = nearest(str(inner), offered_targets())
            allowed = f"allowed is what a file of conf/ names, and {', '.join(OFFERED)}{near}"
            raise ConfigError(f"{key}._target_={inner} is not offered: {allowed}")


def instantiate(node: Any) -> Any:
    """Call what a node's `_target_` names with its other keys, in which nodes are called first."""
    # hydra's own would resolve what a run.json says once more.
    if isinstance(node, list):
        return [instantiate(element) for element in node]
    if not isinstance(node, dict):
        return node
    values = {name: instantiate(value) for name, value in node.items() if name not in HYDRA_KEYS}
    if "_target_" not in node:
        return values
    called = get_object(node["_target_"])
    return partial(called, **values) if node.get("_partial_") else called(**values)


def nearest(word: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the closest of `names`, or nothing when none is close."""
    matches = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
