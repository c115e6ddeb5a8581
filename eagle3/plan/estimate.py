"""What a run will cost: data, disk, memory and hours from its config."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate

from eagle3.batch import Batch, pack
from eagle3.config import RunConfig, parse_size
from eagle3.draft.initial import draft_config
from eagle3.draft.model import DraftConfig
from eagle3.hidden_states.shards import DTYPES, document_bytes
from eagle3.loader import fill_micro_steps, plan_epoch
from eagle3.loss import SoftTargetLoss
from eagle3.plan.costs import (
    TargetSize,
    draft_parameters,
    loss_bytes,
    prefill_bytes,
    prefill_flops,
    saved_bytes,
    target_size,
)
from eagle3.plan.results import Cost, Disk, Hours, Memory, Plan, Tokens, recommend
from eagle3.plan.sample import Sample, count, estimate
from eagle3.runs.disk import free_bytes
from eagle3.ttt import training_flops

H200_FLOPS = 790e12  # bf16 products, measured (FIELD.md, section 6)
PREFILL_UTILISATION, TRAINING_UTILISATION = 0.5, 0.4
SIMULATED_DOCUMENTS = 100_000


def make(run) -> Plan:
    """The plan of a `Run`; neither weights are loaded nor anything is written."""
    config, target = run.config, run.target_config
    shape, loss = draft_config(config.draft, target), instantiate(config.loss)
    sample = sample_of(run)
    batches = micro_steps(sample, config, target.vocab_size, loss)
    tokens = tokens_of(sample, config)
    size = target_size(target, config.model.trust_remote_code)
    packed = sum(len(batch.input_ids) for batch in batches)
    disk = disk_of(sample, run, draft_parameters(shape))
    cost = Cost(
        target=size,
        draft_parameters=draft_parameters(shape),
        prefill_flops=prefill_flops(
            size, target, sample.lengths, sample.weights, tokens.teacher_share
        ),
        training_flops=sum(training_flops(shape, batch) for batch in batches) / packed,
        stored_bytes=disk.needed / tokens.different_tokens,
    )
    memory = memory_of(run, shape, size, batches, loss.chunk_rows)
    devices = speeds(run.device, compute_dtype(run), tokens.gpus)
    hours = [hours_of(*device, cost, tokens, disk.kept_share) for device in devices]
    plan = Plan(config.mode["_target_"].rpartition(".")[2].lower(), tokens, disk, memory, cost, hours, "")
    plan.recommendation = recommend(plan)
    return plan


def sample_of(run) -> Sample:
    """The prepared data where it is there already, else an estimate from the rows that it will be
    made of.
    """
    config = run.config
    again = (
        "regenerate" in config.stages
    )  # its answers are not there yet: those given stand for them
    prepared = None if again else run.prepared_if_there()
    if prepared is not None:
        return count(prepared)
    options = replace(run.preparation, on_reject="skip", num_heldout=0)
    sources = run.given_sources if again else run.sources
    return estimate(
        sources, run.chat, options, 0 if config.data.eval_path else config.eval.num_prompts
    )


def micro_steps(
    sample: Sample, config: RunConfig, vocab_size: int, loss: SoftTargetLoss
) -> list[Batch]:
    """Typical micro-steps of a replica. Every token is taken for one of the draft vocabulary, a
    slight overestimate.
    """
    train, everything = config.train, torch.ones(vocab_size, dtype=torch.bool)
    places = sample.typical(4 * train.tokens_per_step)
    per_update = len(places)
    if train.documents_per_update is not None:
        per_update = -(-train.documents_per_update // replicas_of(config))
    batches = []
    for start in range(0, len(places), per_update):
        documents = np.array(places[start : start + per_update])
        for step in fill_micro_steps(documents, sample.lengths, train.tokens_per_step):
            batches.append(
                pack(
                    [sample.document(i) for i in step],
                    everything,
                    config.draft.ttt_steps,
                    loss.mask,
                )
            )
    return batches


def replicas_of(config: RunConfig) -> int:
    gpus = config.launch.nproc_per_node * config.launch.nnodes
    return max(1, gpus // (config.parallel.ulysses * config.parallel.ring))


def tokens_of(sample: Sample, config: RunConfig) -> Tokens:
    """Totals of an epoch; updates are counted on as many documents, at most `SIMULATED_DOCUMENTS`
    of them.
    """
    train, replicas = config.train, replicas_of(config)
    documents, tokens = float(sample.weights.sum()), float(sample.lengths @ sample.weights)
    simulated = max(1, min(round(documents), SIMULATED_DOCUMENTS))
    lengths = sample.lengths if sample.exact else sample.lengths[sample.evenly(simulated)]
    budget = train.tokens_per_step * train.grad_accum * replicas
    updates = len(plan_epoch(lengths, config.seed, 0, budget, train.documents_per_update))
    updates = max(1, round(updates * documents / len(lengths)))
    planned = updates * train.epochs
    planned = planned if train.max_steps is None else min(planned, train.max_steps)
    return Tokens(
        exact=sample.exact,
        sampled_documents=len(sample.lengths),
        documents=documents,
        tokens=tokens,
        standard_error=sample.standard_error,
        supervised_share=float(sample.supervised @ sample.weights) / tokens,
        teacher_share=float(sample.teachers @ sample.weights) / tokens,
        different_tokens=float(sample.lengths @ sample.distinct),
        updates_per_epoch=updates,
        updates=planned,
        passes=planned / updates,
        replicas=replicas,
        gpus=config.launch.nproc_per_node * config.launch.nnodes,
    )


def disk_of(sample: Sample, run, trained: int) -> Disk:
    """Hidden states of all different documents; prepared data as `prepare` leaves it; checkpoints
    as they are pruned.

    A checkpoint has the weights and AdamW's two states in fp32; `keep_last`, `best` and one half
    written are there.
    """
    config, hidden, size = run.config, run.config.hidden_states, run.target_config.hidden_size
    stored = {
        dtype: document_bytes(sample.lengths, sample.teachers, size, dtype) for dtype in DTYPES
    }
    sizes = {dtype: int(each @ sample.distinct) for dtype, each in stored.items()}
    checkpoint = 3 * 4 * trained
    checkpoints = checkpoint * (config.train.keep_last + 2)
    prepared = int((5 * sample.lengths) @ sample.distinct + 20 * sample.weights.sum())
    folders = {
        "hidden states": hidden.path or config.cache_dir,
        "prepared": config.cache_dir,
        "run": str(run.run_dir),
    }
    free = {name: free_bytes(folder) for name, folder in folders.items()}
    allowed = parse_size(hidden.max_disk) if hidden.max_disk else free["hidden states"]
    allowed = max(0, min(allowed, free["hidden states"] - prepared - checkpoints))
    budget = (
        allowed if hidden.max_disk else min(allowed, free["hidden states"] * 9 // 10)
    )  # as `Run.growing_store`
    return Disk(
        hidden_states=sizes,
        dtype=hidden.dtype,
        allowed=allowed,
        kept_share=min(1.0, budget / sizes[hidden.dtype]),
        prepared=prepared,
        checkpoint=checkpoint,
        checkpoints=checkpoints,
        folders={name: str(Path(folder).absolute()) for name, folder in folders.items()},
        free=free,
    )


def compute_dtype(run) -> torch.dtype:
    """What the target computes in, and the draft with it."""
    named = run.config.model.dtype
    dtype = (run.target_config.dtype or "float32") if named == "auto" else named
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def memory_of(
    run, shape: DraftConfig, size: TargetSize, batches: list[Batch], chunk_rows: int
) -> Memory:
    """Of the largest of `batches`. A sequence-parallel group shares a micro-step, a tensor-parallel
    one the layers.

    16 bytes a trained parameter: weight, gradient and AdamW's states in fp32. Prefill and unroll
    take turns.
    """
    config, target, element = run.config, run.target_config, compute_dtype(run).itemsize
    together = config.parallel.ulysses * config.parallel.ring
    ends = size.embedding + (0 if size.tied else size.head)
    whole = ((size.parameters - ends) // config.target.get("tp_size", 1) + ends) * element
    copied = shape.draft_vocab_size * target.hidden_size * element
    fused = (
        run.device.type == "cuda" or element == 2
    )  # a plan made elsewhere is for GPUs, unless it is in fp32
    kept = max(saved_bytes(shape, batch, element, fused) for batch in batches) // together
    work = max(loss_bytes(shape, batch, chunk_rows, element) for batch in batches) // together
    tokens = max(len(batch.input_ids) for batch in batches)
    states = 16 * draft_parameters(shape) + copied
    captured = config.target.get("batch_tokens") or config.train.tokens_per_step
    parts = {
        "train online, hybrid": training(
            whole, states, kept, work, prefill_bytes(target, tokens, element)
        ),
        "train offline": training(ends * element, states, kept, work, 0),
        "capture": training(whole, 0, 0, 0, prefill_bytes(target, captured, element)),
    }
    total = {
        name: part["target's weights"]
        + part["draft, gradients, optimiser"]
        + max(part["target at work"], part["kept for backward"] + part["loss at work"])
        for name, part in parts.items()
    }
    gpu = (
        torch.cuda.get_device_properties(run.device).total_memory
        if run.device.type == "cuda"
        else None
    )
    return Memory(parts, total, gpu)


def training(weights: int, states: int, kept: int, loss: int, prefill: int) -> dict[str, int]:
    return {
        "target's weights": weights,
        "draft, gradients, optimiser": states,
        "kept for backward": kept,
        "loss at work": loss,
        "target at work": prefill,
    }


def speeds(device: torch.device, dtype: torch.dtype, gpus: int) -> list[tuple[str, int, float]]:
    """(name, how many, FLOP/s of each in products): this GPU; without one, a stated H200, and the
    one CPU here.
    """
    if device.type == "cuda":
        return [(torch.cuda.get_device_name(device), gpus, measured_flops(device, dtype, 8192))]
    return [("H200", gpus, H200_FLOPS), ("this CPU", 1, measured_flops(device, dtype, 768))]


def measured_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best of five products of [size, size] matrices."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def hours_of(
    device: str, devices: int, flops: float, cost: Cost, tokens: Tokens, kept_share: float
) -> Hours:
    """Hours on all devices, and the storage that offline training would need of each.

    Reading runs behind training, so offline is at full speed while storage gives what training
    takes a second. Below `break_even_bandwidth` a token is recomputed sooner than read (FIELD.md,
    section 6: 1.8 GB/s for an 8B at the peak rate).
    """
    prefill = cost.prefill_flops / (flops * PREFILL_UTILISATION)  # seconds a token on one
    train = cost.training_flops / (flops * TRAINING_UTILISATION)
    epoch = tokens.tokens / devices / 3600
    later = max(0.0, tokens.passes - 1)
    first = min(1.0, tokens.passes)
    capture = tokens.different_tokens / devices / 3600 * prefill
    computed = first + later * (1 - kept_share)  # passes in which the target runs
    return Hours(
        device=device,
        devices=devices,
        flops=flops,
        capture=capture,
        epoch_online=epoch * (prefill + train),
        epoch_offline=epoch * train,
        total={
            "online": epoch * tokens.passes * (prefill + train),
            "hybrid": epoch * (tokens.passes * train + computed * prefill),
            "offline": capture + epoch * tokens.passes * train,
        },
        full_speed_bandwidth=cost.stored_bytes / train,
        break_even_bandwidth=break_even(
            cost.stored_bytes, cost.prefill_flops, flops * PREFILL_UTILISATION
        ),
    )


def break_even(stored_bytes: float, prefill: float, flops: float) -> float:
    """Bytes a second at which reading a token takes as long as its prefill of `prefill` FLOPs at
    `flops` a second.
    """
    return stored_bytes * flops / prefill
