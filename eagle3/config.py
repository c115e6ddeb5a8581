"""The typed root of the configuration, and what a resumed run keeps of it. Fields carry their
allowed range.
"""

import difflib
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf, SCMode

from eagle3.errors import ConfigError


@dataclass(frozen=True)
class Within:
    """Bounds of a parameter, inclusive; of a list, those of its elements."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"within {self.low:g} and {self.high:g}"


def ranged(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class Model:
    """The target: `path` is a folder or a hub id; `aux_layer_ids` are zero-based decoder layers,
    derived if null.

    `embedding_key` and `lm_head_key` name tensors of checkpoints that call them unusually.
    """

    path: str = MISSING
    revision: Optional[str] = None
    dtype: str = field(
        default="auto", metadata={"choices": ["auto", "float32", "bfloat16", "float16"]}
    )
    trust_remote_code: bool = False
    aux_layer_ids: Optional[list[int]] = None
    embedding_key: Optional[str] = None
    lm_head_key: Optional[str] = None


@dataclass
class Source:
    """One dataset of a mix; `weight` is how often an epoch passes over it (0.5: over half of its
    rows).
    """

    path: str = MISSING
    subset: Optional[str] = None
    split: str = "train"
    weight: float = ranged(1.0, 0, 100)


@dataclass
class Data:
    """`path`: a file, a folder, a hub id or an fsspec address; or `sources`, several of them by
    name.

    `num_samples` rows are read of each. Without `eval_path`, some conversations are held out.
    """

    path: Optional[str] = MISSING
    subset: Optional[str] = None
    split: str = "train"
    sources: dict[str, Source] = field(default_factory=dict)
    eval_path: Optional[str] = None
    num_samples: Optional[int] = ranged(None, 1)
    num_proc: Optional[int] = ranged(None, 1)
    max_length: int = ranged(2048, 4)
    chat_template: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    preformatted: bool = False
    system_prompt: Optional[str] = None
    train_only_last_turn: bool = False
    on_reject: str = field(default="skip", metadata={"choices": ["skip", "fail"]})


@dataclass
class View:
    """How many conversations `stages=[view]` shows."""

    num_samples: int = ranged(5, 1)


@dataclass
class HiddenStates:
    """The store of `mode=offline` and `hybrid`: its folder (null: one under `cache_dir`) and
    precision.

    `max_disk` is what it may take, such as 500GB. A `path` with SpecForge's files is converted on
    first use.
    """

    path: Optional[str] = None
    dtype: str = field(default="bf16", metadata={"choices": ["fp32", "bf16", "int8"]})
    max_disk: Optional[str] = None
    on_damage: str = field(default="fail", metadata={"choices": ["fail", "skip"]})


@dataclass
class DraftSection:
    """`config` is a JSON file with the draft's shape (else derived); `init_from` an exported draft
    to start from.
    """

    ttt_steps: int = ranged(7, 1, 16)
    vocab_size: int = ranged(32000, 1)
    config: Optional[str] = None
    init_from: Optional[str] = None
    attention: dict[str, Any] = MISSING
    initial: dict[str, Any] = MISSING


@dataclass
class Train:
    epochs: int = ranged(2, 1)
    max_steps: Optional[int] = ranged(None, 1)
    tokens_per_step: int = ranged(16384, 4)
    documents_per_update: Optional[int] = ranged(None, 1)
    grad_accum: int = ranged(1, 1)
    max_grad_norm: float = ranged(0.5, 1e-9)
    save_every: int = ranged(1000, 1)
    eval_every: int = ranged(500, 1)
    log_every: int = ranged(10, 1)
    keep_last: int = ranged(2, 1)
    resume: str = "auto"
    deterministic: bool = False


@dataclass
class Eval:
    """The held-out prompts that the target answers once; `best` is chosen by acceptance at
    `draft_length`.
    """

    num_prompts: int = ranged(64, 1)
    max_new_tokens: int = ranged(256, 2)
    draft_length: int = ranged(5, 1, 16)
    batch_size: int = ranged(16, 1)


@dataclass
class Export:
    """`speculators` also writes `draft-speculators/`, which `vllm serve` takes alone.

    `verifier` is what exported drafts name as their target (null: model.path).
    """

    speculators: bool = False
    verifier: Optional[str] = None


@dataclass
class Check:
    """`stages=[check]`: the engines that matter (sglang, vllm, trtllm, official), and prompts to
    decode.
    """

    engines: list[str] = field(default_factory=lambda: ["sglang", "vllm", "trtllm", "official"])
    decode: bool = True
    num_prompts: int = ranged(4, 1, 8)
    max_new_tokens: int = ranged(64, 2)


@dataclass
class Parallel:
    """`ulysses` x `ring` ranks share each micro-batch; what is left of the ranks trains on other
    documents.

    `reduce_dtype` is what gradients are exchanged in.
    """

    ulysses: int = ranged(MISSING, 1)
    ring: int = ranged(1, 1)
    reduce_dtype: str = field(default="fp32", metadata={"choices": ["fp32", "bf16"]})


@dataclass
class Launch:
    """`rdzv_endpoint` host:port is where the launchers of several nodes meet. Seconds: without
    progress for `timeout`, a process hangs; it has `shutdown_timeout` to write its checkpoint when
    it is told to stop.
    """

    nproc_per_node: int = ranged(1, 1)
    nnodes: int = ranged(1, 1)
    threads: Optional[int] = ranged(None, 1)
    rdzv_endpoint: Optional[str] = None
    timeout: float = ranged(1800.0, 1)
    shutdown_timeout: int = ranged(600, 1)


@dataclass
class RunConfig:
    name: str = "eagle3"
    seed: int = ranged(0, 0)
    stages: list[str] = MISSING
    plan: bool = False
    device: str = field(default="auto", metadata={"choices": ["auto", "cpu", "cuda"]})
    cache_dir: str = MISSING
    draft_path: Optional[str] = None
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    view: View = field(default_factory=View)
    regenerate: dict[str, Any] = MISSING
    mode: dict[str, Any] = MISSING
    hidden_states: HiddenStates = field(default_factory=HiddenStates)
    target: dict[str, Any] = MISSING
    draft: DraftSection = field(default_factory=DraftSection)
    loss: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    parallel: Parallel = field(default_factory=Parallel)
    export: Export = field(default_factory=Export)
    check: Check = field(default_factory=Check)
    benchmark: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING
    launch: Launch = field(default_factory=Launch)


ConfigStore.instance().store(name="schema", node=RunConfig)

# What may change when a run is resumed, because no weight depends on it.
RESUME_FREE = {
    "stages", "plan", "device", "cache_dir", "draft_path", "name", "benchmark", "logger", "launch", "train.resume",
    "parallel", "target.tp_size", "target.batch_tokens", "data.num_proc", "hidden_states.on_damage",
    "hidden_states.path", "view", "regenerate", "check", "export", "train.save_every",
    "train.eval_every", "train.log_every", "train.keep_last", "target.url", "target.port", "target.python",
    "target.ready_seconds", "target.mem_fraction_static", "target.server_args", "target.dp_size", "target.ep_size",
}  # fmt: skip


def is_run(path: str | Path) -> bool:
    return (Path(path) / "run.json").is_file() and (Path(path) / "checkpoints" / "last").exists()


def again(run_dir: Path, overrides: list[str]) -> str:
    """The command that goes on with a run that was stopped."""
    return (
        f"python run.py train.resume={run_dir}"
        if is_run(run_dir)
        else f"python run.py {shlex.join(overrides)}"
    )


def run_folder(resume: str, default: str) -> str:
    """Hydra's run dir: the run that `train.resume` names, else a new one."""
    if resume == "auto":
        return default
    if not is_run(resume):
        raise ConfigError(
            f"train.resume={resume} is no run folder with a checkpoint; give outputs/<name>/<date>, or auto"
        )
    return resume


OmegaConf.register_new_resolver("run_dir", run_folder, replace=True)
OmegaConf.register_new_resolver(
    "hydra_folder", lambda resume: ".hydra" if resume == "auto" else ".hydra/resumed", replace=True
)
# where the nodes of a Slurm job meet
OmegaConf.register_new_resolver("port", lambda job_id: 20000 + int(job_id) % 20000, replace=True)
OmegaConf.register_new_resolver(
    "package", lambda path: str(Path(__file__).parent / path), replace=True
)


def typed(composed: DictConfig, run_dir: Path, overrides: list[str]) -> RunConfig:
    """The composed config as a RunConfig; that of the run being resumed, where there is one.

    A resumed run takes its config from its run.json; raises ConfigError when an override asks for a
    different draft.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; set {missing[0]}=...")
    resume = composed.train.resume
    if resume != "auto" and (
        not is_run(resume) or Path(resume).resolve() != Path(run_dir).resolve()
    ):
        raise ConfigError(
            f"train.resume={resume} must be a run with a checkpoint, given without hydra.run.dir and -m"
        )
    if not is_run(run_dir):
        return OmegaConf.to_object(composed)
    saved = OmegaConf.merge(
        OmegaConf.structured(RunConfig), json.loads((run_dir / "run.json").read_text())["config"]
    )
    resumed = composed
    if resume != "auto":
        resumed, keys = OmegaConf.merge(saved), flat(composed)
        for override in overrides:
            key = override.lstrip("+~").split("=")[0].split("@")[0].replace("/", ".")
            if key in keys or any(k.startswith(f"{key}.") for k in keys):
                OmegaConf.update(
                    resumed, key, OmegaConf.select(composed, key), merge=False, force_add=True
                )
    for key, before, now in differences(flat(saved), flat(resumed)):
        raise ConfigError(
            f"{key}={now} differs from the run in {run_dir}, which has {before}; start a new run instead"
        )
    return OmegaConf.to_object(resumed)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config -> {"a.b": value}."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True, structured_config_mode=SCMode.DICT)
    if not isinstance(config, dict):
        return {prefix: config}
    values: dict[str, Any] = {}
    for name, value in config.items():
        values |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return values


def differences(saved: dict[str, Any], resumed: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, before, now) of every value that a resumed run may not change."""
    fixed = [
        k
        for k in {**saved, **resumed}
        if k not in RESUME_FREE and k.split(".")[0] not in RESUME_FREE
    ]
    return [(k, saved.get(k), resumed.get(k)) for k in fixed if saved.get(k) != resumed.get(k)]


def parse_size(text: str) -> int:
    """Bytes of a size such as 500GB or 1.5TB. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B", text.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"hidden_states.max_disk={text} is no size; write it as 500GB or 1.5TB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def nearest(word: str, names: list[str]) -> str:
    """`; did you mean X?` for the closest of `names`, or nothing when none is close."""
    matches = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
