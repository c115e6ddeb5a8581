"""The plan as named results, and what they speak for."""

from dataclasses import dataclass

from eagle3.plan.costs import TargetSize
from eagle3.runs.disk import size_text

MODES = ("online", "hybrid", "offline")
WORTH_IT = 0.1  # of the hours; below that, storing hidden states is not worth the disk


@dataclass
class Tokens:
    """What is trained on. `standard_error` is of `tokens`; `passes` counts epochs, also broken
    ones.
    """

    exact: bool
    sampled_documents: int
    documents: float
    tokens: float
    standard_error: float
    supervised_share: float
    teacher_share: float
    different_tokens: float
    updates_per_epoch: int
    updates: int
    passes: float
    replicas: int
    gpus: int


@dataclass
class Disk:
    """Bytes; `hidden_states` by dtype, `allowed` for them, `kept_share` of them is what
    `mode=hybrid` has room for.
    """

    hidden_states: dict[str, int]
    dtype: str
    allowed: int
    kept_share: float
    prepared: int
    checkpoint: int
    checkpoints: int
    folders: dict[str, str]
    free: dict[str, int]

    @property
    def needed(self) -> int:
        return self.hidden_states[self.dtype]


@dataclass
class Memory:
    """Bytes on each GPU, part by part, in each situation; `total` of a situation takes what is not
    held at once.
    """

    parts: dict[str, dict[str, int]]
    total: dict[str, int]
    gpu: int | None


@dataclass
class Cost:
    """Of a token: FLOPs of the target's prefill and of the draft's training, bytes of its hidden
    states.
    """

    target: TargetSize
    draft_parameters: int
    prefill_flops: float
    training_flops: float
    stored_bytes: float


@dataclass
class Hours:
    """At `flops` a second on each of the devices; bandwidths in bytes a second for each of them."""

    device: str
    devices: int
    flops: float
    capture: float
    epoch_online: float
    epoch_offline: float
    total: dict[str, float]
    full_speed_bandwidth: float
    break_even_bandwidth: float


@dataclass
class Plan:
    mode: str
    tokens: Tokens
    disk: Disk
    memory: Memory
    cost: Cost
    hours: list[Hours]
    recommendation: str


def recommend(plan: Plan) -> str:
    """One sentence: which mode, and why."""
    here = plan.hours[-1]  # a CPU is meant where it would be done within a day
    disk, memory, hours = (
        plan.disk,
        plan.memory,
        here if here.total["online"] < 24 else plan.hours[0],
    )
    online = hours.total["online"]
    stored = hours.epoch_offline * plan.tokens.passes + min(1.0, plan.tokens.passes) * (
        hours.epoch_online - hours.epoch_offline
    )
    saved = 1 - stored / online
    together, alone = memory.total["train online, hybrid"], memory.total["train offline"]
    if memory.gpu and together > memory.gpu >= alone:
        return (
            f"mode=offline: target and draft do not fit in {size_text(memory.gpu)} together, the draft alone does"
            + (
                "."
                if disk.needed <= disk.allowed
                else f"; it needs {size_text(disk.needed)} of disk."
            )
        )
    if plan.tokens.passes <= 1:
        return "mode=online: the data is passed over once, so nothing that is stored would be read again."
    if saved < WORTH_IT:
        return f"mode=online: storing hidden states would save only {saved:.0%} of the hours."
    fitting = [dtype for dtype in (disk.dtype, "int8") if disk.hidden_states[dtype] <= disk.allowed]
    if fitting:
        size = disk.hidden_states[fitting[0]]
        bandwidth = hours.full_speed_bandwidth * size / disk.needed
        extra = "" if fitting[0] == disk.dtype else f" hidden_states.dtype={fitting[0]}"
        return (
            f"mode=hybrid{extra}: {size_text(size)} of disk save {saved:.0%} of the hours of mode=online, if it is "
            f"read at {size_text(bandwidth)}/s per GPU; mode=offline costs the same, for a store that several runs use."
        )
    return (
        f"mode=online: the hidden states need {size_text(disk.needed)} of disk and {size_text(disk.allowed)} may be "
        f"used; a larger disk would save {saved:.0%} of the hours."
    )
