"""Training the draft: one loop for every source of hidden states, attention backend and layout."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from hydra.utils import get_class

from eagle3.batch import Batch, Document, Features
from eagle3.config import DraftSection, RunConfig, instantiate, layout
from eagle3.data.prepare import load_prepared
from eagle3.data.vocab import vocab_tensors
from eagle3.draft.initial import draft_config
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import evaluate, load_answers, pack_answers, suffix
from eagle3.export.read import locate
from eagle3.export.rules import read_draft
from eagle3.hidden_states.store import HybridStore, Store, store_inputs
from eagle3.hidden_states.supply import Supply
from eagle3.loader import Feed, Loader, packing
from eagle3.loss import FrozenWeights, SoftTargetLoss
from eagle3.optim import GuardedOptimizer, with_prefix
from eagle3.parallel.ranks import Ranks, load_target
from eagle3.parallel.sequence import Sequence
from eagle3.parallel.watch import Watch
from eagle3.runs.checkpoint import CheckpointState, CheckpointWriter, load_checkpoint, load_draft
from eagle3.runs.disk import write_atomically
from eagle3.runs.logger import JsonLines
from eagle3.runs.metrics import Meter
from eagle3.runs.progress import Progress
from eagle3.runs.resume import command_to_resume
from eagle3.runs.signals import note_signals
from eagle3.runs.sweep import is_pruned
from eagle3.target.handle import TargetHandle
from eagle3.target.weights import TargetWeights

MAX_SKIPPED_IN_A_ROW = 5


@dataclass
class TrainingData:
    """What the stages before left for training, as folders that every rank opens for itself."""

    prepared: Path | None
    answers: Path | None
    store: Path | None
    fingerprints: dict[str, str]  # by name, of what a checkpoint belongs to


def train(
    ranks: Ranks, config: RunConfig, run_dir: Path, target: TargetHandle, data: TrainingData
) -> tuple[dict[int, str], bool]:
    """Train on every rank; leaves checkpoints/, metrics.jsonl and evaluation.json in `run_dir`.

    Keeps `last` and `best` (by acceptance at `train.best_by`) checkpoints; without held-out answers
    the last is the best. Returns why documents were left out, by key, and whether Optuna has ended
    the run before its last update. Raises ConfigError, RunError.
    """
    section, folder = config.train, run_dir / "checkpoints"
    last, best = folder / "last", folder / "best"
    # The first rank decides: what another node sees of a shared disk may be old.
    saved = load_checkpoint(last) if ranks.broadcast(last.exists()) else None
    for name, was in saved.plain["inputs"].items() if saved else ():
        if (now := data.fingerprints.get(name)) != was:
            raise ConfigError(f"{name} is {now}, but the checkpoint has {was}; start anew")
    supply = open_supply(config, target, data, ranks)
    trainer = build_trainer(config, target, supply, saved, ranks)
    draft, total, resumed_at, history = trainer.draft, trainer.loader.total_updates, None, None
    if saved:
        resumed_at, history = trainer.update, saved.plain.get("metrics")
        saved = None  # it holds a draft and its moments on the host
        print(f"train: resumed after update {resumed_at} of {total}")

    evaluates, draft_length, measure = data.answers is not None, config.eval.draft_length, None
    if evaluates and ranks.is_main:  # the others wait for what it has measured
        steps, tokens = max(config.draft.ttt_steps, draft_length), section.tokens_per_step
        if draft.config.most_drafts is not None:  # blocks are as engines make them for so many
            steps, tokens = draft_length, tokens // draft.config.slots(draft_length)
        answers = {}
        for at in config.eval.temperature:
            answers[at] = pack_answers(load_answers(data.answers, at), draft.t2d, steps, tokens)
        measure = partial(evaluate, draft, trainer.frozen, trainer.loss, answers, draft_length)
    chosen_by = [f"eval/acceptance_length{suffix(each)}" for each in section.best_by]
    path = run_dir / "metrics.jsonl"
    lines = JsonLines(path, resumed_at, history) if ranks.is_main else None
    log = lines.log if lines else lambda metrics, step: None
    position = ranks.rank, ranks.world_size, ranks.timeout
    checkpoints = CheckpointWriter(folder, section.keep_last, *position)
    updates, pruned = iter(trainer.loader), False

    def kept() -> int:
        return int(last.resolve().name.partition("step_")[2] or 0)

    with (
        contextlib.closing(supply),
        Watch(run_dir, ranks, config.launch.timeout),
        note_signals(ranks.world_size > 1) as received,
        Progress("train", total, "updates", trainer.update, ranks.is_main, kept) as bar,
    ):
        while trainer.update < total and not pruned:
            began = time.perf_counter()
            batches = next(updates)  # packed meanwhile, unless the data is what is slow
            lr = trainer.optim.scheduler.get_last_lr()[0]
            norm = trainer.train_update(batches, waited=time.perf_counter() - began)
            # Ranks train on about as many tokens each.
            bar.advance(tokens=ranks.world_size * sum(batch.tokens for batch in batches))
            is_last = trainer.update == total
            # All ranks stop behind the same update, whichever of them heard the signal.
            stopping = ranks.all_reduce(received["signal"], "max")

            if trainer.update % section.log_every == 0 or is_last:
                # Only here the host waits for the device.
                refuse_endless_skipping(trainer, batches, run_dir)
                metrics = trainer.meter.read(ranks.all_reduce_tensor)
                skipped = int(trainer.optim.skipped)
                metrics |= {"lr": lr, "grad_norm": float(norm), "skipped_updates": skipped}
                log(metrics, trainer.update)
                ends = [metrics[f"accuracy/step_{k}"] for k in (0, config.draft.ttt_steps - 1)]
                shown = {"loss": metrics["loss"], "accuracy": f"{ends[0]:.2f} to {ends[1]:.2f}"}
                bar.advance(0, **shown, memory=f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB")

            began = time.perf_counter()
            is_best = not evaluates
            if evaluates and (trainer.update % section.eval_every == 0 or is_last):
                evaluation = ranks.broadcast(measure().metrics() if ranks.is_main else None)
                spent = {"seconds/evaluation": time.perf_counter() - began}
                log(evaluation | spent, trainer.update)
                acceptance = fmean(evaluation[name] for name in chosen_by)
                bar.advance(0, acceptance=acceptance)
                is_best = acceptance > trainer.best
                trainer.best = max(trainer.best, acceptance)
                reached = config.sweep, run_dir, trainer.update, acceptance
                pruned = ranks.broadcast(ranks.is_main and not is_last and is_pruned(*reached))

            evaluated = time.perf_counter()
            due = trainer.update % section.save_every == 0 or is_last or stopping or pruned
            if due or (evaluates and is_best):
                trainer.best_update = trainer.update if is_best else trainer.best_update
                supply.sync()  # what a checkpoint says was trained on must be on disk by then
                state = trainer.state()
                state.plain["inputs"] = data.fingerprints
                state.plain["metrics"] = lines and lines.checksum.hexdigest()
                checkpoints.save(trainer.update, state, is_best)
            checkpoints.raise_if_failed()
            if stopping:
                checkpoints.wait()
                kept = f"stopped after update {trainer.update} of {total}, which is kept"
                print(f"{kept}; go on with: {command_to_resume(run_dir)}")
                raise SystemExit(128 + stopping)
            now = time.perf_counter()
            trainer.meter.excluded_seconds += now - began
            trainer.meter.checkpoint_seconds += now - evaluated
        checkpoints.wait()
        ranks.barrier()

    if ranks.is_main and (skipped := int(trainer.optim.skipped)):
        found = f"{skipped} of {trainer.update} updates were skipped"
        print(f"train: {found}: gradients or hidden states of the target were not finite")
    if evaluates and ranks.is_main:
        draft.load_state_dict(load_draft(best)[1])
        evaluation, update = measure(), trainer.best_update
        values = asdict(evaluation) | {"update": update}
        write_atomically(run_dir / "evaluation.json", [json.dumps(values).encode()])
        length = evaluation.acceptance_length[draft_length]
        found = f"{length:.2f} at draft length {draft_length}, update {update}"
        for name, at in evaluation.sampled.items():
            found += f"; {at.acceptance_length[draft_length]:.2f} at temperature {name}"
        print(f"train: best acceptance length {found}")
    elif ranks.is_main:
        print("train: no held-out answers to measure on; the last checkpoint is kept as the best")
    damaged = ranks.all_gather(supply.store.damaged if supply.store else {})
    return {key: reason for each in damaged for key, reason in each.items()}, pruned


def open_supply(
    config: RunConfig, target: TargetHandle, data: TrainingData, ranks: Ranks
) -> Supply:
    """Where hidden states come from: what `mode` names, with what it reads."""
    mode, hidden = get_class(config.mode["_target_"]), config.hidden_states
    prepared = load_prepared(data.prepared) if data.prepared else None
    store = Store(data.store, hidden.on_damage) if data.store else None
    if mode.keeps:
        inputs = store_inputs(target, hidden.dtype, prepared.digest)
        store = HybridStore(hidden, inputs, config.cache_dir, ranks.rank, ranks.world_size)
    if mode.needs_target:
        load_target(target, ranks)
    return mode(prepared, store, target, ranks.barrier)


def build_trainer(
    config: RunConfig, target: TargetHandle, supply: Supply, saved: CheckpointState | None,
    ranks: Ranks,
) -> "Trainer":  # fmt: skip
    """The draft with all that trains it, as `saved` left it."""
    section, shape, weights = config.train, config.parallel, target.load_weights()
    torch.manual_seed(config.seed)
    draft = build_draft(config.draft, target, weights, supply).to(target.device)
    draft.kernels = instantiate(config.draft.kernels)
    whole = len(draft.target_ids) == len(weights.head)  # a copy would be as large
    head = weights.head if whole else weights.head[draft.target_ids]
    frozen = FrozenWeights(weights.embedding, head)
    loss = instantiate(config.loss)

    # Ranks that share a batch are one replica: each packs it whole and keeps its part.
    group = math.prod(layout(config))
    replica, replicas = ranks.rank // group, ranks.world_size // group
    packed = packing(config.draft, draft.config, draft.t2d.cpu(), loss.mask)
    features, pack_documents = supply.features, packed
    if group > 1:
        sequence = Sequence(*layout(config), ranks.rank, draft.config, ranks.timeout)
        features = partial(sequence.features, supply.features, weights.embedding.dtype)

        def pack_documents(documents: list[Document]) -> Batch:
            return sequence.deal(packed(documents))

    tokens_per_update = section.tokens_per_step * section.grad_accum * replicas
    if saved:  # as the run began, however many ranks there are now
        tokens_per_update = saved.plain["tokens_per_update"]
    loader = Loader(
        supply, section, pack_documents, tokens_per_update, config.seed, replica, replicas
    )
    optimizer = instantiate(config.optimizer)(draft.parameters())
    scheduler = instantiate(config.scheduler)(optimizer, loader.total_updates)
    optim = GuardedOptimizer(optimizer, scheduler, section.max_grad_norm, shape.reduce_dtype)
    meter = Meter(config.draft.ttt_steps, loss.weights, target.device)
    trainer = Trainer(draft, frozen, loss, features, loader, optim, meter, ranks)
    if saved:
        try:
            trainer.restore(saved)
        except KeyError as error:
            missing = f"the checkpoint, of another version, has no {error}; start anew"
            raise RunError(missing) from error
    # Other processors may round other first weights.
    ranks.broadcast_tensors(list(draft.state_dict().values()))
    return trainer


def build_draft(
    section: DraftSection, target: TargetHandle, weights: TargetWeights, supply: Supply
) -> Draft:
    """The draft that `draft.init_from` names, else a new one with the data's draft vocabulary."""
    spec, attention = target.spec, instantiate(section.attention)
    if section.init_from is not None:
        draft = read_draft(locate(section.init_from, "draft.init_from"), attention, spec)
        own, kind = draft.config, get_class(section.architecture["_target_"])
        if type(own) is not kind:
            problem = f"draft.init_from={section.init_from} is of draft={own.method}"
            raise ConfigError(f"{problem}, not draft={kind.method}; set it to that")
        if own.most_drafts not in (None, section.ttt_steps):
            has = f"draft.init_from={section.init_from} has blocks of {own.block_size} slots"
            raise ConfigError(f"{has}; set draft.block={own.block_size}")
        for name in ("fc_norm", "norm_output"):
            if getattr(section, name) and not getattr(draft.config, name):
                has = f"draft.init_from={section.init_from} has {name}=false"
                raise ConfigError(f"draft.{name}=true, but {has}; leave it and draft=eagle31 out")
        return draft
    size, whole = section.vocab_size, spec.config.vocab_size
    # An imported store comes without prepared data, and counts its own tokens.
    vocab = supply.prepared.vocab if supply.prepared else supply.store.vocab(size)
    if size == whole:  # as it is of a block drafter, whatever a store was made with
        vocab = np.arange(whole)
    if len(vocab) != size:
        problem = f"draft.vocab_size={size}, but the data's draft vocabulary has "
        raise ConfigError(f"{problem}{len(vocab)} tokens; set draft.vocab_size={len(vocab)}")
    t2d, d2t = vocab_tensors(vocab, whole)
    shape = draft_config(section, spec.config, len(spec.aux_layer_ids))
    draft = shape.build(attention, t2d, d2t)
    draft.begin(instantiate(section.initial), weights.embedding, weights.head)
    return draft


@dataclass
class Trainer:
    """What a run changes while it trains; `state` and `restore` are what a checkpoint holds."""

    draft: Draft
    frozen: FrozenWeights
    loss: SoftTargetLoss
    features: Callable[[Batch], Features]  # of batches whose documents came without
    loader: Loader
    optim: GuardedOptimizer
    meter: Meter
    ranks: Ranks
    update: int = 0
    best: float = -math.inf
    best_update: int = 0

    def __post_init__(self):
        self.feed = Feed(self.frozen.embedding.device)

    def train_update(self, batches: list[Batch], waited: float) -> torch.Tensor:
        """One optimiser step on all micro-batches; returns the gradient norm, on the device."""
        self.update += 1
        # Divided by the count of all ranks, gradients are those of one large batch, however it is
        # cut into micro-batches and dealt.
        normaliser = self.ranks.all_reduce(sum(batch.normaliser for batch in batches))
        if not normaliser:  # all of its documents are damaged: it changes nothing and counts
            self.optim.scheduler.step()
            return torch.zeros(())
        for batch in self.feed(batches):
            with self.meter.target():
                features = batch.features or self.features(batch)
            hidden_ND = self.draft.unroll(self.frozen.embedding, features.aux_hidden_states, batch)
            given = self.draft, hidden_ND, features, batch, self.frozen.draft_head
            output = self.loss(*given, scale=1 / normaliser)
            (output.loss / normaliser).backward()
            flops = self.draft.training_flops(self.draft.config, batch)
            self.meter.add(output.step_loss, output.step_correct, batch, waited, flops)
            self.loss.weights.measure(batch, output.correct)
            waited = 0.0
            del features, hidden_ND, given, output  # or they would live through the next one's
        self.loss.weights.advance(self.ranks, self.frozen.embedding.device)
        self.ranks.all_reduce_gradients(self.optim.parameters, self.optim.reduce_dtype)
        return self.optim.step()

    def state(self) -> CheckpointState:
        """Every rank makes it together with the others."""
        rank, names = self.ranks.rank, [name for name, _ in self.draft.named_parameters()]
        moments, counts = self.optim.state(names)
        tensors = {f"draft/{name}": tensor for name, tensor in self.draft.state_dict().items()}
        tensors[f"rank_{rank}/rng"] = torch.get_rng_state()
        if self.frozen.embedding.is_cuda:
            tensors[f"rank_{rank}/rng_cuda"] = torch.cuda.get_rng_state()
        plain = counts | {
            "draft": asdict(self.draft.config) | {"architecture": self.draft.config.architecture},
            "update": self.update,
            "best": self.best,
            "best_update": self.best_update,
            "loader": self.loader.state,
            "tokens_per_update": self.loader.tokens_per_update,
            "meters": self.ranks.all_gather(self.meter.state()),
        }
        plain |= self.loss.weights.state()
        return CheckpointState(tensors | moments, plain)

    def restore(self, state: CheckpointState) -> None:
        """Go on from `state`, which may have been written by another number of ranks."""
        plain, rank = state.plain, self.ranks.rank
        self.draft.load_state_dict(with_prefix(state.tensors, "draft/"))
        names = [name for name, _ in self.draft.named_parameters()]
        self.optim.restore(names, state.tensors, plain)
        self.loader.state = dict(plain["loader"])
        self.update, self.best = plain["update"], plain["best"]
        self.best_update = plain["best_update"]
        self.meter.restore(plain["meters"], rank, self.ranks.world_size)
        self.loss.weights.restore(plain)
        # A rank that was not there before begins with the state that its process has.
        own = with_prefix(state.tensors, f"rank_{rank}/")
        if "rng" in own:
            torch.set_rng_state(own["rng"])
        if self.frozen.embedding.is_cuda and "rng_cuda" in own:
            torch.cuda.set_rng_state(own["rng_cuda"])


def refuse_endless_skipping(trainer: Trainer, batches: list[Batch], run_dir: Path) -> None:
    """End the run, with the batch saved, when the last updates were all skipped as not finite."""
    in_a_row, rank = int(trainer.optim.skipped_in_a_row), trainer.ranks.rank
    if in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    path = run_dir / (f"non_finite_batch_{rank}.pt" if rank else "non_finite_batch.pt")
    torch.save([batch.input_ids for batch in batches], path)
    finite = True
    for batch in batches:
        features = batch.features or trainer.features(batch.to(trainer.frozen.embedding.device))
        states = features.aux_hidden_states, features.last_hidden_states
        finite = finite and all(bool(each.isfinite().all()) for each in states)
    whose, remedy = "gradients", "lower optimizer.lr"
    if trainer.ranks.all_reduce(int(not finite), "max"):
        whose = "hidden states of the target, and so the gradients,"
        remedy = "set model.dtype=float32, or see whether model.path is whole"
    problem = f"the {whose} of the last {in_a_row} updates were not finite"
    raise RunError(f"{problem}; {remedy}, or look at the last batch, saved in {path}")
