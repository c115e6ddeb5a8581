"""`plan=true`: tokens, disk, memory and hours of a run, before anything is loaded or written."""

import math
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from eagle3.batch import Batch, Features
from eagle3.config import RunConfig, instantiate, layout
from eagle3.data.chat import Chat
from eagle3.data.encoder import Encoder
from eagle3.data.prepare import INDEX, Prepared
from eagle3.data.rows import RowError, read_conversation
from eagle3.data.sources import DataFile, SourceFiles, decode, raw_rows, why_none
from eagle3.draft.attention import empty_outputs
from eagle3.draft.initial import draft_config
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError
from eagle3.hidden_states.shards import document_bytes
from eagle3.loader import Loader, packing
from eagle3.loss import SoftTargetLoss
from eagle3.runs.disk import free_bytes, parse_size, size_text
from eagle3.target.spec import TargetSpec

H200_FLOPS = 790e12  # bf16 products, measured
# Of those, what `dev/roofline/sim.py --json` predicts as share_of_products: with --prefill, and of
# a step by the share of its tokens that is supervised (--supervised).
IN_PREFILL, IN_TRAINING = 0.792, {0.3: 0.659, 0.6: 0.71, 1.0: 0.737}
CPU, ON_CPU = "this machine", (0.5, 0.4)  # assumed, prefill and training
ROWS_CUDA, ROWS_CPU = 16384, 512  # of the products that are measured
SAMPLE_ROWS, SCAN_BYTES = 1000, 1 << 25  # of each source: rows to encode at least, bytes to read
MEASURED_STEPS = 4
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # in the configs of mixtures
KEPT, GPU = "of which mode=hybrid keeps", "this GPU has"


@dataclass
class Plan:
    """What a run will cost; `exact`: its documents are counted, not estimated."""

    data: dict[str, float]
    disk: dict[str, tuple[int, int]]  # (bytes, room there) by what is written
    memory: dict[str, list[int]]  # bytes on a GPU: training online, training offline, capture
    speeds: dict[str, float]  # FLOP/s by device
    shares: dict[str, tuple[float, float]]  # of those, in prefill and in training
    hours: dict[str, dict[str, float]]  # by device and what is done
    recommended: str
    exact: bool


def plan(
    config: RunConfig, spec: TargetSpec, sources: SourceFiles, chat: Chat,
    prepared: Prepared | None, device: torch.device, run_dir: Path,
) -> Plan:  # fmt: skip
    """The plan of a run, from prepared data, else from some rows. Raises RunError."""
    if prepared:
        # Of a document that an epoch repeats, each time stores a part.
        starts = prepared.index["start"]
        _, places, times = np.unique(starts, return_inverse=True, return_counts=True)
        documents, stored = prepared, 1 / times[places]
    else:
        documents, stored = estimate(sources, chat, config)
    dtype, loss = getattr(torch, spec.dtype), instantiate(config.loss)
    gpus = config.launch.nproc_per_node * config.launch.nnodes
    group = math.prod(layout(config))
    replicas = max(1, gpus // group)
    shape = draft_config(config.draft, spec.config, len(spec.aux_layer_ids))
    draft = draft_without_data(shape)
    # Every token is taken for one of the draft vocabulary, a slight overestimate.
    everything = torch.ones(draft.config.vocab_size, dtype=torch.bool)
    budget = config.train.tokens_per_step * config.train.grad_accum * replicas
    packed = packing(config.draft, shape, everything, loss.mask)
    loader = Loader(documents, config.train, packed, budget, config.seed, 0, replicas)
    epoch, batches = loader.plan_epoch(0), []
    for update in epoch[:MEASURED_STEPS]:
        batches += loader.pack_update(update)
    # An update's longest documents are in its first micro-steps, so they are taken evenly.
    batches = batches[:: -(-len(batches) // MEASURED_STEPS)]
    steps = [measure_step(draft, batch, loss, dtype) for batch in batches]
    training = sum(flops for flops, _ in steps) / sum(batch.tokens for batch in batches)
    trained = sum(parameter.numel() for parameter in draft.parameters())
    parameters, active, prefill = target_costs(spec, documents)

    disk = disk_of(config, spec, documents, stored, trained, run_dir)
    # The ranks of a group have equal parts of a micro-step.
    peak = max(peak for _, peak in steps) // group
    memory = memory_of(config, spec, parameters, trained, peak)
    if device.type == "cuda":
        memory[GPU] = [torch.cuda.mem_get_info(device)[1]] * 3
    tokens, share = int(documents.lengths.sum()), config.train.data_share
    epochs = share * loader.total_updates / len(epoch)  # passes over all tokens
    kept = disk[KEPT][0] / disk[f"hidden states, {config.hidden_states.dtype}"][0]
    speeds, hours = rates(device, dtype, gpus, draft.config), {}
    supervised = documents.supervised.sum() / tokens
    on_gpu = IN_PREFILL, np.interp(supervised, [*IN_TRAINING], [*IN_TRAINING.values()])
    shares = {name: ON_CPU if name == CPU else on_gpu for name in speeds}
    for name, (in_prefill, in_training) in shares.items():
        target = tokens * prefill / (speeds[name] * in_prefill) / 3600  # of an epoch
        train = epochs * tokens * training / (speeds[name] * in_training) / 3600
        # mode=hybrid runs the target in the first epoch, and then for what it has no room to keep.
        first = min(share, epochs)
        hours[name] = {
            "capture": target * float(documents.lengths @ stored) / tokens,
            "train, mode=online": train + epochs * target,
            "train, mode=hybrid": train + (first + (epochs - first) * (1 - kept)) * target,
            "train, mode=offline": train,  # reading runs behind it
        }
    data = {
        "tokens an epoch": round(share * tokens),
        "conversations an epoch": len(loader.chosen),
        "share supervised": supervised,
        "updates an epoch": len(epoch),
        "updates in all": loader.total_updates,
        "parameters of the target": parameters,
        "of which active": active,
        "parameters of the draft": trained,
    }
    if "regenerate" in config.stages and not prepared:
        data["tokens of an answer, at most"] = longest_answer(config)
    # The first device is the GPU that a run of this size is for.
    best = recommend(disk, memory, next(iter(hours.values())))
    return Plan(data, disk, memory, speeds, shares, hours, best, prepared is not None)


def estimate(sources: SourceFiles, chat: Chat, config: RunConfig) -> tuple[Prepared, np.ndarray]:
    """(about the documents of an epoch, how much of each is stored), from rows of every file."""
    rows, stands_for, stored = [], [], []
    for source, files in sources:
        remaining = config.data.num_samples or 1 << 62
        for file in files:
            total, some = sample_rows(file, SCAN_BYTES / len(files), remaining, len(files))
            remaining -= total
            if "regenerate" in config.stages:
                some = [with_answers(raw, longest_answer(config)) for raw in some]
            rows += [(0, 0, 0, raw) for raw in some]
            stands_for += [total * source.weight / max(1, len(some))] * len(some)
            stored += [1 / max(1.0, source.weight)] * len(some)
    chunk = Encoder(chat, config.data)[rows, 0]
    usable = chunk.records["outcome"] == 0
    if not usable.any():
        words = {number: reason for reason, number in chunk.reasons.items()}
        why = why_none(Counter(map(words.get, chunk.records["outcome"])), sources[0][1])
        raise RunError(f"data.path: none of {len(rows)} rows read can be trained on ({why})")
    records, upto = chunk.records[usable], np.cumsum(np.array(stands_for)[usable])
    index = np.empty(len(records), INDEX)
    index["start"] = np.cumsum(records["tokens"]) - records["tokens"]
    counts = ["supervised", "teachers"]
    index[["length", *counts]] = records[["tokens", *counts]]
    # As many documents as an epoch has, evenly spread over what the rows stand for.
    count = max(1, round(upto[-1]))
    places = np.searchsorted(upto, (np.arange(count) + 0.5) / count * upto[-1])
    documents = Prepared(chunk.ids, chunk.mask, index[places], np.empty(0, np.int64), [])
    return documents, np.array(stored)[usable][places]


def longest_answer(config: RunConfig) -> int:
    return config.regenerate["max_new_tokens"] or config.data.max_length


def with_answers(raw: Any, tokens: int) -> Any:
    """A row of prompts alone with answers of about so many tokens; any other as it is."""
    with suppress(RowError):
        messages = read_conversation(decode(raw)).messages
        if all(message["role"] != "assistant" for message in messages):
            answer = {"role": "assistant", "content": " a" * tokens}
            turns = ([m, answer] if m["role"] == "user" else [m] for m in messages)
            return {"messages": list(chain.from_iterable(turns))}
    return raw


def sample_rows(file: DataFile, num_bytes: float, most: int, files: int) -> tuple[int, list]:
    """(rows of the file, some of them), evenly spread over its first `num_bytes`."""
    rows, read, total = [], 0.0, None
    size, keep = Path(file.path).stat().st_size, SAMPLE_ROWS // files + 1
    for _, raw, share in islice(raw_rows(file), most):
        # Compressed files and JSON lists are read in blocks: rows are counted against the share of
        # the file only where that has just moved on.
        if share > read and len(rows) >= keep and read * size >= num_bytes:
            total = round(len(rows) / read)
            break
        rows.append(raw)
        read = share
    return min(total or len(rows), most), rows[:: max(1, len(rows) // keep)]


# Stands for the causal part, whose kernels want data; it makes what a flash kernel makes.
NO_ATTENTION = SimpleNamespace(
    forward=lambda q, *others: empty_outputs(q),
    backward=lambda grad_out, q, rows, k, v, *others: [torch.empty_like(x) for x in (q, k, v)],
)


class LiveBytes(TorchDispatchMode):
    """The most bytes in use at once of the storages made under it."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [tensor for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        self.alive.update(tensor.untyped_storage() for tensor in tensors)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return made


def draft_without_data(shape: DraftConfig) -> Draft:
    with torch.device("meta"):
        t2d = torch.empty(shape.vocab_size, dtype=torch.bool)
        d2t = torch.empty(shape.draft_vocab_size, dtype=torch.long)
        return shape.build(NO_ATTENTION, t2d, d2t)


def measure_step(
    draft: Draft, batch: Batch, loss: SoftTargetLoss, dtype: torch.dtype
) -> tuple[int, int]:
    """(FLOPs of products but attention's, most bytes beside weights and gradients) of a step."""
    shape, batch = draft.config, batch.to(torch.device("meta"))
    size, teachers = shape.target_hidden_size, len(batch.teacher_rows)
    with torch.device("meta"):
        embedding = torch.empty(shape.vocab_size, size, dtype=dtype)
        head = torch.empty(shape.draft_vocab_size, size, dtype=dtype)
        # Gradients stay from step to step, so they are counted with the weights.
        for parameter in draft.parameters():
            parameter.grad = torch.empty_like(parameter)
        with FlopCounterMode(display=False) as counter, LiveBytes() as live:
            aux = torch.empty(batch.tokens, shape.aux_size, dtype=dtype)
            last, argmax = torch.empty(teachers, size, dtype=dtype), torch.empty(teachers).long()
            features = Features(aux, last, argmax, torch.empty(teachers))
            hidden = draft.unroll(embedding, aux, batch)
            loss(draft, hidden, features, batch, head).loss.backward()
    return counter.get_total_flops(), live.peak


def target_costs(spec: TargetSpec, documents: Prepared) -> tuple[int, int, float]:
    """(parameters, those that a token passes through, FLOPs of a token). Raises RunError."""
    trust, shape = spec.trust_remote_code, spec.config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunError(f"plan: transformers cannot make this model: {reason}") from error
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    experts = next((getattr(shape, name) for name in EXPERTS if getattr(shape, name, None)), 1)
    chosen = getattr(shape, "num_experts_per_tok", None) or experts
    total = sum(sizes.values())
    active = total - routed + routed * chosen // experts
    # A formula, not a run without data as in training: a mixture's routing depends on data.
    # 2 FLOPs a parameter (Kaplan et al., arXiv 2001.08361), but an embedding's that is no head too.
    # Attention: two products of 2 FLOPs and the hidden size for each of n^2 / 2 pairs of tokens.
    embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    lengths = documents.lengths.astype(float)
    keys = lengths @ lengths / lengths.sum()
    attention = 2 * keys * shape.hidden_size * shape.num_hidden_layers
    return total, active, float(2 * (active - embedding) + attention)


def disk_of(
    config: RunConfig, spec: TargetSpec, documents: Prepared, stored: np.ndarray, trained: int,
    run: Path,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """(bytes, room there) by what is written; at KEPT the room that hidden states may use."""
    section, disk, sizes = config.hidden_states, {}, (spec.config.hidden_size, spec.aux_size)
    free = free_bytes(section.path or config.cache_dir)
    for name in ("fp32", "bf16", "int8"):
        each = document_bytes(documents.lengths, documents.teachers, sizes, name)
        disk[f"hidden states, {name}"] = int(each @ stored), free
    # 4 bytes an id, 1 of the mask, and a record of the index
    prepared = int(5 * documents.lengths @ stored) + INDEX.itemsize * len(documents)
    # Weights and AdamW's two states in fp32: `keep_last` of them, `best` and one half written.
    checkpoints = (config.train.keep_last + 2) * 12 * trained
    # Unasked, mode=hybrid leaves a tenth of the disk.
    limit = parse_size(section.max_disk) if section.max_disk else free * 9 // 10
    room = max(0, min(limit, free - prepared - checkpoints))
    disk[KEPT] = min(room, disk[f"hidden states, {section.dtype}"][0]), room
    disk["prepared data"] = prepared, free_bytes(config.cache_dir)
    disk["checkpoints"] = checkpoints, free_bytes(run)
    return disk


def memory_of(
    config: RunConfig, spec: TargetSpec, parameters: int, trained: int, step: int
) -> dict[str, list[int]]:
    """Bytes on each GPU by part; `step` is what the largest micro-step needs."""
    shape, element = spec.config, getattr(torch, spec.dtype).itemsize
    embedding = shape.vocab_size * shape.hidden_size * element
    ends = embedding if shape.tie_word_embeddings else 2 * embedding
    # A target split by an engine has its embedding and head whole on every GPU.
    target = ends + (parameters * element - ends) // config.target.get("tp_size", 1)
    # Weight, gradient and AdamW's states in fp32; and the head's rows of the draft vocabulary,
    # unless those are all of it.
    rows = config.draft.vocab_size % shape.vocab_size  # 0 of a whole vocabulary
    draft = 16 * trained + rows * shape.hidden_size * element
    # Roughly one layer's activations, the auxiliary ones twice, and a chunk of logits.
    tokens = config.target.get("batch_tokens") or config.train.tokens_per_step
    numbers = (
        10 * shape.hidden_size
        + 2 * spec.aux_size
        + 3 * (getattr(shape, "intermediate_size", None) or 0)
    )
    prefill = tokens * numbers * element + 3 * min(1 << 28, 4 * tokens * shape.vocab_size)
    return {
        "target's weights": [target, ends, target],
        "draft, gradients, optimiser": [draft, draft, 0],
        "draft's step at its peak": [step, step, 0],
        "target at work": [prefill, 0, prefill],
        # Prefill and step take turns.
        "at once": [target + draft + max(step, prefill), ends + draft + step, target + prefill],
    }


def rates(
    device: torch.device, dtype: torch.dtype, gpus: int, shape: DraftConfig
) -> dict[str, float]:
    """FLOP/s by device: of all GPUs like this one, or of this machine beside H200s.

    Measured by a second of products as large as the target's, with the threads of the run.
    """
    rows = ROWS_CUDA if device.type == "cuda" else ROWS_CPU
    kind = {"device": device, "dtype": dtype}
    a = torch.randn(rows, shape.hidden_size, **kind)
    b = torch.randn(shape.hidden_size, shape.intermediate_size, **kind)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    measured = 2 * rows * b.numel() / timer.blocked_autorange(min_run_time=1).median
    if device.type == "cuda":
        return {f"{gpus} GPUs like this": gpus * measured}
    return {f"{gpus} x H200": gpus * H200_FLOPS, CPU: measured}


def recommend(
    disk: dict[str, tuple[int, int]], memory: dict[str, list[int]], hours: dict[str, float]
) -> str:
    """Which mode, and why: what is kept of hidden states is read instead of computed again."""
    kept, saved = disk[KEPT][0], 1 - hours["train, mode=hybrid"] / hours["train, mode=online"]
    online, offline, _ = memory["at once"]
    if online > memory.get(GPU, [online])[0] >= offline:
        return "mode=offline: target and draft together do not fit on a GPU"
    # Less is not worth the disk.
    mode, verb = ("hybrid", "save") if saved >= 0.1 else ("online", "would save")
    return f"mode={mode}: {size_text(kept)} of hidden states {verb} {saved:.0%} of the hours"


def show(made: Plan, console: Console) -> None:
    """In 80 columns."""

    def table(title: str, headings: list[str], rows: dict[str, list[str]]) -> None:
        for label, values in ({f"\n{title}": headings} | rows).items():
            console.print(f"{label:<32}" + "".join(f"{value:>16}" for value in values))

    data = {k: [f"{n:,}" if isinstance(n, int) else f"{n:.3g}"] for k, n in made.data.items()}
    disk = {name: map(size_text, row) for name, row in made.disk.items()}
    memory = {name: map(size_text, row) for name, row in made.memory.items()}
    table("Data and models", ["counted" if made.exact else "estimated"], data)
    table("Disk", ["needed", "room there"], disk)
    table("Memory of each GPU", ["online, hybrid", "offline", "capture"], memory)
    devices = list(made.hours.values())
    rows = {what: [f"{each[what]:,.3f}" for each in devices] for what in devices[0]}
    table("Hours", list(made.hours), rows)
    speeds = ", ".join(f"{name} {flops / 1e12:,.4g}" for name, flops in made.speeds.items())
    console.print(f"\nTFLOP/s of products: {speeds} (measured).")
    for name, (prefill, training) in made.shares.items():
        why = "assumed" if name == CPU else "predicted"
        console.print(
            f"{name}: {prefill:.0%} of it in prefill, {training:.0%} in training ({why})."
        )
    console.print("Not counted: answers of the target, preparing, evaluation, benchmark.\n")
    console.print(f"Recommended: {made.recommended}.")
