"""`plan=true`: tokens, disk, memory and hours of a run, before anything runs.

No weights are loaded and nothing is written. What a training step costs is found by running the
real one (unroll, loss, backward) on tensors without data, so it cannot drift from the code; the
target's prefill is a formula, because a mixture's routing depends on data.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from eagle3.batch import Batch, Document, Features, pack
from eagle3.config import Data, RunConfig, parse_size
from eagle3.data.chat import Chat, with_system
from eagle3.data.prepare import Prepared
from eagle3.data.rows import RowError, read_conversation
from eagle3.data.sources import DataFile, SourceFiles, decode, raw_rows
from eagle3.draft.initial import draft_config
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError
from eagle3.hidden_states.shards import document_bytes
from eagle3.loader import fill_micro_steps, plan_epoch
from eagle3.loss import SoftTargetLoss
from eagle3.runs.disk import free_bytes, size_text
from eagle3.target.spec import TargetSpec
from eagle3.ttt import unroll

H200_FLOPS = 790e12  # bf16 products, measured
IN_PREFILL, IN_TRAINING = 0.5, 0.4  # of those
SAMPLE_ROWS, SCAN_BYTES = 1000, 1 << 26  # of each source: rows to encode at least, bytes to read
MEASURED_STEPS, SIMULATED_DOCUMENTS = 4, 100_000
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")
HEAD_CHUNK_BYTES = 1 << 28  # of `target.hf.head_statistics`
ONLINE, OFFLINE, CAPTURE = "train online, hybrid", "train offline", "capture"
CPU = "this CPU"


@dataclass
class Sample:
    """n documents that stand for an epoch; all of them where the data is prepared (`exact`).

    `supervised` and `teachers` [n] count a document's rows; `weights` [n]: how many documents of an
    epoch each stands for; `distinct` [n]: how many of those differ.
    """

    exact: bool
    lengths: np.ndarray
    supervised: np.ndarray
    teachers: np.ndarray
    weights: np.ndarray
    distinct: np.ndarray
    load: Callable[[list[int]], list[Document]]

    @property
    def tokens(self) -> float:
        return float(self.lengths @ self.weights)

    @property
    def different(self) -> float:
        """The tokens that are stored once."""
        return float(self.lengths @ self.distinct)

    def evenly(self, count: int) -> np.ndarray:
        """`count` places in proportion to the weights, evenly spread over the documents' order."""
        upto = np.cumsum(self.weights)
        return np.searchsorted(upto, (np.arange(count) + 0.5) / count * upto[-1])


@dataclass
class TargetSize:
    """Parameters of the target; `active`: those that a token passes through; `ends`: embedding and
    head, once where they are tied.
    """

    parameters: int
    active: int
    ends: int
    head: int


@dataclass
class Plan:
    """What a run will cost. FLOPs are of a token; `disk` has (bytes, free there) by what is
    written, `hidden_states` bytes by dtype, of which `allowed` may be written and `kept_share` is
    what mode=hybrid has room for; `memory` is bytes on each GPU by situation and part; `hours` are
    by device, of `rates` FLOP/s, and what is done.
    """

    sample: Sample
    mode: str
    dtype: str
    gpus: int
    replicas: int
    updates_per_epoch: int
    updates: int
    target: TargetSize
    trained: int
    prefill_flops: float
    training_flops: float
    hidden_states: dict[str, int]
    allowed: int
    kept_share: float
    disk: dict[str, tuple[int, int]]
    memory: dict[str, dict[str, int]]
    gpu_memory: int | None
    rates: dict[str, float]
    hours: dict[str, dict[str, float]]

    @property
    def epochs(self) -> float:
        return self.updates / self.updates_per_epoch


def plan(
    config: RunConfig,
    spec: TargetSpec,
    sources: SourceFiles,
    chat: Chat,
    prepared: Prepared | None,
    device: torch.device,
    run_dir: Path,
) -> Plan:
    """The plan of a run, from the prepared data where it is there already, else from some rows of
    the sources. Raises RunError where no row can be used.
    """
    sample = count(prepared) if prepared else estimate(sources, chat, config)
    gpus = config.launch.nproc_per_node * config.launch.nnodes
    group = config.parallel.ulysses * config.parallel.ring
    replicas = max(1, gpus // group)
    updates_per_epoch, updates = count_updates(sample, config, replicas)
    loss, shape = instantiate(config.loss), draft_config(config.draft, spec.config)
    dtype, hidden = getattr(torch, spec.dtype), config.hidden_states
    batches = micro_steps(sample, config, shape, loss, replicas)
    steps = [measure_step(shape, batch, loss, dtype) for batch in batches]
    peak, tokens = max(peak for _, peak in steps) // group, [batch.tokens for batch in batches]
    trained = sum(parameter.numel() for parameter in draft_without_data(shape).parameters())
    size = target_size(spec)
    hidden_states = {}
    for name in ("fp32", "bf16", "int8"):
        each = document_bytes(sample.lengths, sample.teachers, spec.config.hidden_size, name)
        hidden_states[name] = int(each @ sample.distinct)
    prepared_bytes = int(5 * sample.different + 20 * sample.weights.sum())
    # A checkpoint has the weights and AdamW's two states in fp32; at once there are `keep_last`,
    # `best` and one half written.
    checkpoints = (config.train.keep_last + 2) * 12 * trained
    free = free_bytes(hidden.path or config.cache_dir)
    allowed = max(0, free - prepared_bytes - checkpoints)
    kept = min(allowed, free * 9 // 10)  # unasked, mode=hybrid leaves a tenth
    if hidden.max_disk:
        allowed = kept = min(allowed, parse_size(hidden.max_disk))
    cuda = device.type == "cuda"
    made = Plan(
        sample=sample,
        mode=config.mode["_target_"].rpartition(".")[2].lower(),  # its name, to be shown
        dtype=hidden.dtype,
        gpus=gpus,
        replicas=replicas,
        updates_per_epoch=updates_per_epoch,
        updates=updates,
        target=size,
        trained=trained,
        prefill_flops=prefill_flops(size, spec.config, sample),
        training_flops=sum(flops for flops, _ in steps) / sum(tokens),
        hidden_states=hidden_states,
        allowed=allowed,
        kept_share=min(1.0, kept / hidden_states[hidden.dtype]),
        disk={
            **{f"hidden states, {name}": (size, free) for name, size in hidden_states.items()},
            "prepared data": (prepared_bytes, free_bytes(config.cache_dir)),
            "checkpoints": (checkpoints, free_bytes(run_dir)),
        },
        memory=memory_of(config, spec, size, trained, peak, max(tokens)),
        gpu_memory=torch.cuda.get_device_properties(device).total_memory if cuda else None,
        rates=rates(device, dtype),
        hours={},
    )
    for name, flops in made.rates.items():
        made.hours[name] = hours_at(flops, 1 if name == CPU else gpus, made)
    return made


def count(prepared: Prepared) -> Sample:
    """The prepared data itself."""
    _, places, times = np.unique(prepared.index["start"], return_inverse=True, return_counts=True)
    ones = np.ones(len(prepared))
    counts = (prepared.lengths, prepared.supervised, prepared.teachers)
    return Sample(True, *counts, ones, ones / times[places], prepared.load)


def estimate(sources: SourceFiles, chat: Chat, config: RunConfig) -> Sample:
    """What `prepare` will make of the sources, from rows evenly spread over every file.

    Duplicates are not known here. Raises RunError when none of the rows can be trained on.
    """
    data, documents, weights, distinct = config.data, [], [], []
    reasons, rows_read = set(), 0
    for source, files in sources:
        remaining = data.num_samples or float("inf")
        for file in files:
            keep = max(8, -(-SAMPLE_ROWS // len(files)))
            total, rows = sample_rows(file, SCAN_BYTES / len(files), remaining, keep)
            remaining, rows_read = remaining - total, rows_read + len(rows)
            for row in rows:
                try:
                    documents.append(encode(row, chat, data))
                except RowError as error:
                    reasons.add(str(error))
                    continue
                weights.append(total / len(rows) * source.weight)
                distinct.append(total / len(rows) * min(1.0, source.weight))
    if not documents:
        why = ", ".join(sorted(reasons)) or "no rows"
        raise RunError(f"data.path: none of {rows_read} rows looked at can be trained on ({why})")
    held_out = 0 if data.eval_path else config.eval.num_prompts
    left = max(0.0, 1 - held_out / max(1.0, sum(distinct)))
    masks = [document.loss_mask for document in documents]
    supervised = np.array([int(mask.sum()) for mask in masks])
    ends = np.array([int((mask[:-1] & ~mask[1:]).sum()) for mask in masks])  # they have teachers
    return Sample(
        exact=False,
        lengths=np.array([len(mask) for mask in masks]),
        supervised=supervised,
        teachers=supervised + ends,
        weights=np.array(weights) * left,
        distinct=np.array(distinct) * left,
        load=lambda places: [documents[place] for place in places],
    )


def encode(row: object, chat: Chat, data: Data) -> Document:
    """Raises RowError for a row that cannot be trained on."""
    conversation = read_conversation(decode(row), data.preformatted)
    if conversation.messages:
        conversation.messages = with_system(conversation.messages, data.system_prompt)
    encoded = chat.encode(conversation, data.train_only_last_turn)
    ids = torch.tensor(encoded.input_ids[: data.max_length], dtype=torch.int32)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for first, stop in encoded.spans:
        mask[first:stop] = True
    if mask[1:].sum() < 2:
        raise RowError("no assistant token within data.max_length")
    return Document(0, ids, mask)


def sample_rows(
    file: DataFile, num_bytes: float, most_rows: float, keep: int
) -> tuple[float, list]:
    """(rows of the file, some of them): `keep` or up to twice as many, evenly spread over its first
    `num_bytes`.

    Compressed files and JSON lists are read in blocks, so rows are counted against the share of the
    file only where that share has just moved on.
    """
    kept: list = []
    stride, rows, read, size = 1, 0, 0.0, Path(file.path).stat().st_size
    for _, raw, share in raw_rows(file):
        if share > read:
            if rows >= keep and read * size >= num_bytes:
                return min(rows / read, most_rows), kept
            read = share
        if rows >= most_rows:
            break
        if rows % stride == 0:
            kept.append(raw)
        if len(kept) == 2 * keep:
            kept, stride = kept[::2], 2 * stride
        rows += 1
    return float(rows), kept


def count_updates(sample: Sample, config: RunConfig, replicas: int) -> tuple[int, int]:
    """(of an epoch, in all), counted on as many documents, `SIMULATED_DOCUMENTS` at most."""
    train, documents = config.train, float(sample.weights.sum())
    simulated = max(1, min(round(documents), SIMULATED_DOCUMENTS))
    lengths = sample.lengths if sample.exact else sample.lengths[sample.evenly(simulated)]
    budget = train.tokens_per_step * train.grad_accum * replicas
    updates = len(plan_epoch(lengths, config.seed, 0, budget, train.documents_per_update))
    updates = max(1, round(updates * documents / len(lengths)))
    return updates, min(updates * train.epochs, train.max_steps or updates * train.epochs)


def micro_steps(
    sample: Sample, config: RunConfig, shape: DraftConfig, loss: SoftTargetLoss, replicas: int
) -> list[Batch]:
    """A few typical micro-steps of a replica. Every token is taken for one of the draft vocabulary,
    a slight overestimate.
    """
    train, everything = config.train, torch.ones(shape.vocab_size, dtype=torch.bool)
    wanted = MEASURED_STEPS * train.tokens_per_step * sample.weights.sum() / sample.tokens
    documents = sample.evenly(int(np.clip(wanted, 100, 2000)))
    if train.documents_per_update is not None:
        documents = documents[: -(-train.documents_per_update // replicas)]
    steps = fill_micro_steps(documents, sample.lengths, train.tokens_per_step)
    return [
        pack(sample.load(step), everything, config.draft.ttt_steps, loss.mask)
        for step in steps[:: -(-len(steps) // MEASURED_STEPS)]
    ]


class NoAttention:
    """Stands for the causal part, whose kernels want data; it makes what a flash kernel makes."""

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide)

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made under it that are still in use, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata  # without data there is no other
            if address not in self.alive:
                self.alive[address] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, address)
        self.peak = max(self.peak, self.now)
        return made

    def free(self, address: int) -> None:
        self.now -= self.alive.pop(address)


def draft_without_data(shape: DraftConfig) -> Draft:
    with torch.device("meta"):
        t2d = torch.empty(shape.vocab_size, dtype=torch.bool)
        d2t = torch.empty(shape.draft_vocab_size, dtype=torch.long)
        return Draft(shape, NoAttention, t2d, d2t)


def measure_step(
    shape: DraftConfig, batch: Batch, loss: SoftTargetLoss, dtype: torch.dtype
) -> tuple[int, int]:
    """(FLOPs of the products, most bytes in use beside weights and gradients) of a micro-step.

    The draft's attention, a few per cent of the FLOPs, is left out; norms keep what the fused
    kernel of GPUs keeps.
    """
    draft, batch = draft_without_data(shape), batch.to(torch.device("meta"))
    size, teachers = shape.target_hidden_size, len(batch.teacher_rows)
    with torch.device("meta"):
        embedding = torch.empty(shape.vocab_size, size, dtype=dtype)
        head = torch.empty(shape.draft_vocab_size, size, dtype=dtype)
        for parameter in draft.parameters():
            parameter.grad = torch.empty_like(parameter)
        with FlopCounterMode(display=False) as counter, LiveBytes() as live:
            features = Features(
                aux_hidden_states=torch.empty(batch.tokens, 3 * size, dtype=dtype),
                last_hidden_states=torch.empty(teachers, size, dtype=dtype),
                argmax=torch.empty(teachers, dtype=torch.long),
                logsumexp=torch.empty(teachers),
            )
            hidden = unroll(draft, embedding, features.aux_hidden_states, batch)
            loss(draft, hidden, features, batch, head).loss.backward()
    return counter.get_total_flops(), live.peak


def target_size(spec: TargetSpec) -> TargetSize:
    """Counts the parameters of a model that has shapes and no weights. Raises RunError."""
    trust = spec.trust_remote_code
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(spec.config, trust_remote_code=trust)
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"plan: transformers cannot make this model: {reason}") from error
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, idle, experts = sum(sizes.values()), 0, first_of(spec.config, EXPERTS)
    if experts:
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        idle = routed - routed * (first_of(spec.config, EXPERTS_PER_TOKEN) or experts) // experts
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    ends = head.numel() + (0 if head is embedding else embedding.numel())
    return TargetSize(total, total - idle, ends, head.numel())


def first_of(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def prefill_flops(size: TargetSize, config: PretrainedConfig, sample: Sample) -> float:
    """FLOPs of the target a token: layers, causal attention within documents, and the head on the
    teacher rows.

    A multiplication and an addition for each active parameter (Kaplan et al., arXiv 2001.08361);
    attention has two products of 2 d FLOPs for each pair of a query and an earlier key of a head,
    n^2 / 2 pairs in a document.
    """
    keys = float(sample.weights @ sample.lengths.astype(float) ** 2) / sample.tokens
    width = config.num_attention_heads * head_size(config) * config.num_hidden_layers
    teachers = float(sample.teachers @ sample.weights) / sample.tokens
    return 2.0 * (size.active - size.ends) + 2 * keys * width + 2.0 * size.head * teachers


def prefill_bytes(config: PretrainedConfig, tokens: int, element: int) -> int:
    """Roughly what the target needs at work: one layer's activations, the auxiliary ones twice, a
    chunk of logits.
    """
    size, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if first_of(config, EXPERTS):
        chosen = first_of(config, EXPERTS_PER_TOKEN) or 1
        inner = chosen * (getattr(config, "moe_intermediate_size", None) or inner) + chosen * size
    numbers = 10 * size + (heads + 2 * kv_heads) * head_size(config) + 3 * inner
    return tokens * numbers * element + 3 * min(HEAD_CHUNK_BYTES, 4 * tokens * config.vocab_size)


def memory_of(
    config: RunConfig, spec: TargetSpec, size: TargetSize, trained: int, step: int, tokens: int
) -> dict[str, dict[str, int]]:
    """By situation and part. `step` and `tokens` are of the largest micro-step.

    16 bytes a trained parameter: weight, gradient and AdamW's states in fp32. A target split by an
    engine has its ends whole on every GPU. Prefill and step take turns.
    """
    element = getattr(torch, spec.dtype).itemsize
    ends = size.ends * element
    target = ends + (size.parameters - size.ends) * element // config.target.get("tp_size", 1)
    states = 16 * trained + config.draft.vocab_size * spec.config.hidden_size * element
    captured = config.target.get("batch_tokens") or config.train.tokens_per_step
    parts = {
        ONLINE: (target, states, step, prefill_bytes(spec.config, tokens, element)),
        OFFLINE: (ends, states, step, 0),
        CAPTURE: (target, 0, 0, prefill_bytes(spec.config, captured, element)),
    }
    return {
        situation: {
            "target's weights": weights,
            "draft, gradients, optimiser": states,
            "draft's step at its peak": step,
            "target at work": prefill,
            "at once": weights + states + max(step, prefill),
        }
        for situation, (weights, states, step, prefill) in parts.items()
    }


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s in products, the best of five: of this GPU; without one, of a stated H200 and the CPU
    here.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 768
    a, seconds = torch.ones(size, size, device=device, dtype=dtype), []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    measured = 2 * size**3 / min(seconds)
    if cuda:
        return {torch.cuda.get_device_name(device): measured}
    return {"H200": H200_FLOPS, CPU: measured}


def hours_at(flops: float, devices: int, made: Plan) -> dict[str, float]:
    """By what is done, on all devices of that many FLOP/s; reading runs behind training."""
    prefill = made.prefill_flops / (flops * IN_PREFILL)  # seconds a token on one
    train = made.training_flops / (flops * IN_TRAINING)
    epochs, epoch = made.epochs, made.sample.tokens / devices / 3600
    capture = made.sample.different / devices / 3600 * prefill
    first = min(1.0, epochs)
    computed = first + (epochs - first) * (1 - made.kept_share)  # epochs the target runs in
    return {
        "capture": capture,
        "an epoch online": epoch * (prefill + train),
        "an epoch offline": epoch * train,
        "all of mode=online": epoch * epochs * (prefill + train),
        "all of mode=hybrid": epoch * (epochs * train + computed * prefill),
        "all of mode=offline": capture + epoch * epochs * train,
    }


def recommend(made: Plan) -> str:
    """One sentence: which mode, and why."""
    needed, room, name = made.hidden_states[made.dtype], made.gpu_memory, list(made.hours)[-1]
    if made.hours[name]["all of mode=online"] >= 24:  # else a CPU is meant, if it is one
        name = next(iter(made.hours))
    hours = made.hours[name]
    online, offline = hours["an epoch online"], hours["an epoch offline"]
    stored = offline * made.epochs + min(1.0, made.epochs) * (online - offline)
    saved = 1 - stored / hours["all of mode=online"]
    if room and made.memory[ONLINE]["at once"] > room >= made.memory[OFFLINE]["at once"]:
        together = f"target and draft do not fit in {size_text(room)} together"
        return f"mode=offline: {together}, the draft alone does; disk: {size_text(needed)}."
    if made.epochs <= 1:
        return "mode=online: the data is passed over once, so nothing stored would be read again."
    if saved < 0.1:  # not worth the disk
        return f"mode=online: storing hidden states would save only {saved:.0%} of the hours."
    dtype = made.dtype if needed <= made.allowed else "int8"
    size = made.hidden_states[dtype]
    if size > made.allowed:
        room = f"{size_text(needed)} of disk and {size_text(made.allowed)} may be used"
        larger = f"a larger disk would save {saved:.0%} of the hours"
        return f"mode=online: the hidden states need {room}; {larger}."
    extra = "" if dtype == made.dtype else f" hidden_states.dtype={dtype}"
    tokens_per_second = made.rates[name] * IN_TRAINING / made.training_flops
    bandwidth = size_text(size / made.sample.different * tokens_per_second)
    return (
        f"mode=hybrid{extra}: {size_text(size)} of disk save {saved:.0%} of the hours of "
        f"mode=online, if it is read at {bandwidth}/s per GPU; mode=offline costs the same, for a "
        "store that several runs use."
    )


def show(made: Plan, console: Console) -> None:
    """The tables, their assumptions and the recommendation, in 80 columns."""
    sample, target = made.sample, made.target

    def amount(value: float) -> str:
        """All digits of what was counted, three of what was estimated."""
        return f"{value:,.0f}" if sample.exact else f"about {float(f'{value:.3g}'):,.0f}"

    read = "prepared" if sample.exact else f"estimated from {len(sample.lengths):,} conversations"
    data = {
        "tokens an epoch": amount(sample.tokens),
        "conversations an epoch": amount(sample.weights.sum()),
        "supervised": f"{sample.supervised @ sample.weights / sample.tokens:.1%}",
        "rows with a teacher": f"{sample.teachers @ sample.weights / sample.tokens:.1%}",
        "updates an epoch": amount(made.updates_per_epoch),
        "epochs": f"{made.epochs:.3g}",
        "updates in all": amount(made.updates),
        "GPUs, of which each replica has": f"{made.gpus}, {made.gpus // made.replicas}",
    }
    console.print(table_of("Data", [read], [data]))
    written = {name: size_text(size) for name, (size, _) in made.disk.items()}
    free = {name: size_text(room) for name, (_, room) in made.disk.items()}
    console.print(table_of("Disk", ["bytes", "free there"], [written, free]))
    columns = []
    for parts in made.memory.values():
        columns.append({name: size_text(size) if size else "–" for name, size in parts.items()})
        if made.gpu_memory:
            fits = "fits" if parts["at once"] <= made.gpu_memory else "does not fit"
            columns[-1][f"of {size_text(made.gpu_memory)}"] = fits
    headings = [situation.replace(" ", "\n", 1) for situation in made.memory]
    console.print(table_of("Memory of each GPU", headings, columns))
    headings, columns = [], []
    for name, flops in made.rates.items():
        devices = "" if name == CPU or made.gpus == 1 else f"{made.gpus} x "
        headings.append(f"{devices}{name}\n{flops / 1e12:.3g} TFLOP/s")
        columns.append({what: time_text(hours) for what, hours in made.hours[name].items()})
    console.print(table_of("Time", headings, columns))
    active = f", {target.active / 1e9:.3g} B active" if target.active < target.parameters else ""
    assumed = (
        f"Target {target.parameters / 1e9:.3g} B parameters{active}, "
        f"{made.prefill_flops / 1e9:.3g} GFLOP a token. Draft {made.trained / 1e9:.3g} B trained, "
        f"{made.training_flops / 1e9:.3g} GFLOP a token. Assumed: {IN_PREFILL:.0%} of the FLOP/s "
        f"named in prefill, {IN_TRAINING:.0%} in training. Not counted: preparing, answering the "
        "held-out prompts, evaluating, benchmarking; the speed of the network. "
        f"Chosen: mode={made.mode} hidden_states.dtype={made.dtype}; {size_text(made.allowed)} may "
        f"be used for hidden states, mode=hybrid keeps {made.kept_share:.0%} of them."
    )
    console.print(Text(assumed, style="dim"))
    console.print(Text(f"Recommended: {recommend(made)}", style="bold"))


def table_of(title: str, headings: list[str], columns: list[dict[str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column(overflow="fold")
    for heading in headings:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for name in columns[0]:
        table.add_row(Text(name), *(column[name] for column in columns))
    return table


def time_text(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.1f} s"
