"""Training the draft: one loop for every source of hidden states, attention backend and layout."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from hydra.utils import get_class, instantiate
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eagle3.batch import Batch, Features, pack
from eagle3.config import RunConfig
from eagle3.data.prepare import load_prepared
from eagle3.draft.initial import build_draft
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import evaluate, load_answers, pack_answers
from eagle3.hidden_states.store import open_for_hybrid, open_store
from eagle3.loader import Loader, Update
from eagle3.loss import FrozenWeights, SoftTargetLoss
from eagle3.optim import GuardedOptimizer
from eagle3.parallel.ranks import Ranks, collective_timeout
from eagle3.parallel.sequence import Sequence
from eagle3.parallel.watch import Watch
from eagle3.runs.checkpoint import (
    CheckpointState,
    CheckpointWriter,
    draft_weights,
    load_checkpoint,
)
from eagle3.runs.logger import JsonLines
from eagle3.runs.metrics import Meter
from eagle3.target.handle import TargetHandle
from eagle3.ttt import training_flops, unroll

MAX_SKIPPED_IN_A_ROW = 5


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM, after the checkpoint: exits with 130 or 143."""


@dataclass
class TrainingData:
    """What the stages before left for training, as folders that every rank opens for itself.

    `store_inputs` is what hidden states must have been made from; `fingerprints`, by name, are those
    of what a checkpoint belongs to.
    """

    prepared: Path | None
    answers: Path | None
    store: Path | None
    store_inputs: dict
    fingerprints: dict[str, str]


def train(
    ranks: Ranks, config: RunConfig, run_dir: Path, target: TargetHandle, data: TrainingData
) -> dict[int, str]:
    """Train on every rank; leaves checkpoints/, metrics.jsonl and evaluation.json in `run_dir`.

    Keeps `last` and `best` (by `eval/acceptance_length`) checkpoints; without held-out answers the
    last is the best. Returns why documents of a store were left out, by key. Raises ConfigError and
    RunError.
    """
    section, mode = config.train, get_class(config.mode["_target_"])
    prepared = load_prepared(data.prepared) if data.prepared else None
    store = None
    if mode.captures:
        store = open_store(config.hidden_states, data.store, data.store_inputs)
    elif mode.keeps:
        cache_dir = config.cache_dir
        store = open_for_hybrid(config.hidden_states, data.store_inputs, cache_dir, ranks.rank)
    if mode.needs_target:
        target.load_on_ranks(ranks.local_rank, ranks.all_gather)
    supply = mode(prepared=prepared, store=store, target=target, barrier=ranks.barrier)
    weights = target.load_weights()

    torch.manual_seed(config.seed)
    vocab = store.vocab if mode.captures else prepared.vocab
    draft = build_draft(config.draft, target.spec, weights, vocab).to(target.device)
    frozen = FrozenWeights(weights.embedding, weights.head[draft.target_ids])
    loss = instantiate(config.loss)
    last = run_dir / "checkpoints" / "last"
    # The first rank decides: what another node sees of a shared disk may be old.
    saved = load_checkpoint(last) if ranks.broadcast(last.exists()) else None

    # Ranks that share a batch are one replica: each packs it whole and keeps its part.
    shape = config.parallel
    group = shape.ulysses * shape.ring
    replicas = ranks.world_size // group
    pack_batch = partial(
        pack, in_draft_vocab=draft.t2d.cpu(), ttt_steps=config.draft.ttt_steps, mask=loss.mask
    )
    pack_documents, features = pack_batch, supply.features
    if group > 1:
        sequence = Sequence(shape, ranks, draft.config, collective_timeout(config.launch.timeout))
        features = sequence.share_features(supply.features, weights.embedding)

        def pack_documents(documents):
            return sequence.deal(pack_batch(documents))

    tokens_per_update = section.tokens_per_step * section.grad_accum * replicas
    if saved:  # as the run began, however many ranks there are now
        tokens_per_update = saved.plain["tokens_per_update"]
    replica = ranks.rank // group
    loader = Loader(
        supply.documents, section, pack_documents, tokens_per_update, config.seed, replica, replicas
    )
    optimizer = instantiate(config.optimizer)(draft.parameters())
    scheduler = instantiate(config.scheduler)(optimizer, loader.total_updates)
    optim = GuardedOptimizer(optimizer, scheduler, section.max_grad_norm, shape.reduce_dtype)
    meter = Meter(config.draft.ttt_steps, loss.gamma, target.device)
    trainer = Trainer(draft, frozen, loss, features, loader, optim, meter, ranks)
    resumed_at = None
    if saved:
        check_fingerprints(saved.plain["inputs"], data.fingerprints)
        trainer.restore(saved)
        resumed_at, saved = trainer.update, None  # it holds a draft and its moments on the host
        if ranks.is_main:
            print(f"train: resumed after update {resumed_at} of {loader.total_updates}")
    # Other processors may round other first weights.
    ranks.broadcast_tensors(list(draft.state_dict().values()))

    measure = None
    if data.answers:
        draft_length = config.eval.draft_length
        steps = max(config.draft.ttt_steps, draft_length)
        answers = pack_answers(load_answers(data.answers), draft.t2d, steps, section.tokens_per_step)
        measure = partial(evaluate, draft, frozen, loss, answers, draft_length)
    log = JsonLines(run_dir / "metrics.jsonl", resumed_at).log if ranks.is_main else discard
    timeout = collective_timeout(config.launch.timeout)
    checkpoints = CheckpointWriter(
        run_dir / "checkpoints", section.keep_last, ranks.rank, ranks.world_size, timeout
    )
    total, updates = loader.total_updates, iter(loader)
    with (
        contextlib.closing(supply),
        Watch(run_dir, ranks, config.launch.timeout),
        note_signals(ranks.world_size > 1) as received,
        progress_bar(total, trainer.update, ranks.is_main) as show,
    ):
        while trainer.update < total:
            began = time.perf_counter()
            update = next(updates)
            lr = optim.lr
            norm = trainer.train_update(update, waited=time.perf_counter() - began)
            is_last = trainer.update == total
            stopping = ranks.all_reduce(received["signal"], "max")

            if trainer.update % section.log_every == 0 or is_last:
                refuse_endless_skipping(trainer, update, run_dir)
                metrics = trainer.meter.read(ranks.all_reduce_tensor)
                metrics |= {"lr": lr, "grad_norm": float(norm)}
                metrics["skipped_updates"] = int(optim.skipped)
                log(metrics, trainer.update)
                show(trainer.update, loss=metrics["loss"])

            began = time.perf_counter()
            is_best = measure is None
            if measure and (trainer.update % section.eval_every == 0 or is_last):
                evaluation = ranks.broadcast(measure().metrics() if ranks.is_main else None)
                log(evaluation, trainer.update)
                acceptance = evaluation["eval/acceptance_length"]
                show(trainer.update, acceptance=acceptance)
                is_best = acceptance > trainer.best
                trainer.best = max(trainer.best, acceptance)

            due = trainer.update % section.save_every == 0 or is_last or stopping
            if due or (measure and is_best):
                trainer.best_update = trainer.update if is_best else trainer.best_update
                supply.sync()  # what a checkpoint says was trained on must be there when it is read
                state = trainer.state()
                state.plain["inputs"] = data.fingerprints
                checkpoints.save(trainer.update, state, is_best)
            checkpoints.raise_if_failed()
            if stopping:
                checkpoints.wait()
                if ranks.is_main:
                    print(f"\nstopped after update {trainer.update}; go on with: ", end="")
                    print(f"python run.py train.resume={run_dir}")
                raise Interrupted(128 + stopping)
            trainer.meter.leave_out(time.perf_counter() - began)
        checkpoints.wait()
        ranks.barrier()

    if measure and ranks.is_main:
        draft.load_state_dict(draft_weights(run_dir / "checkpoints" / "best"))
        best = asdict(measure()) | {"update": trainer.best_update}
        (run_dir / "evaluation.json").write_text(json.dumps(best))
    damaged = ranks.all_gather(store.damaged if mode.captures else {})
    return {key: reason for each in damaged for key, reason in each.items()}


class Trainer:
    """What a run changes while it trains; `state` and `restore` are what a checkpoint holds."""

    def __init__(
        self,
        draft: Draft,
        frozen: FrozenWeights,
        loss: SoftTargetLoss,
        features: Callable[[Batch], Features],
        loader: Loader,
        optim: GuardedOptimizer,
        meter: Meter,
        ranks: Ranks,
    ):
        """`features` is asked for batches whose documents came without."""
        self.draft, self.frozen, self.loss = draft, frozen, loss
        self.features, self.loader = features, loader
        self.optim, self.meter, self.ranks = optim, meter, ranks
        self.device = frozen.embedding.device
        self.update, self.best, self.best_update = 0, -math.inf, 0

    def train_update(self, update: Update, waited: float) -> torch.Tensor:
        """Forward, backward and one guarded optimiser step; returns the gradient norm, on the device.

        Gradients are added up unnormalised and divided by the count of all ranks, so that every
        layout and micro-batching gives the same. An update all of whose documents are damaged
        changes nothing and counts.
        """
        self.update += 1
        frozen = self.frozen
        normaliser = self.ranks.all_reduce(update.normaliser)
        if not normaliser:
            self.optim.scheduler.step()
            return torch.zeros(())
        for batch in update.batches:
            batch = batch.to(self.device)
            features = batch.features or self.features(batch)
            hidden_ND = unroll(self.draft, frozen.embedding, features.aux_hidden_states, batch)
            output = self.loss(self.draft, hidden_ND, features, batch, frozen.draft_head)
            (output.loss / normaliser).backward()
            flops = training_flops(self.draft.config, batch)
            self.meter.add(output.step_loss, output.step_correct, batch, waited, flops)
            waited = 0.0
        self.ranks.all_reduce_gradients(self.optim.parameters, self.optim.reduce_dtype)
        return self.optim.step()

    def state(self) -> CheckpointState:
        """Every rank makes it together with the others."""
        optimizer = self.optim.optimizer.state_dict()
        names, rank = [name for name, _ in self.draft.named_parameters()], self.ranks.rank
        tensors = {f"draft/{name}": tensor for name, tensor in self.draft.state_dict().items()}
        for place, values in optimizer["state"].items():
            for key, value in values.items():
                tensors[f"optimizer/{names[place]}/{key}"] = value
        own = {f"rank_{rank}/rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            own[f"rank_{rank}/rng_cuda"] = torch.cuda.get_rng_state(self.device)
        plain = {
            "update": self.update,
            "best": self.best,
            "best_update": self.best_update,
            "skipped": int(self.optim.skipped),
            "skipped_in_a_row": int(self.optim.skipped_in_a_row),
            "loader": self.loader.state,
            "tokens_per_update": self.loader.tokens_per_update,
            "scheduler": self.optim.scheduler.state_dict(),
            "param_groups": optimizer["param_groups"],
            "meters": self.ranks.all_gather(self.meter.state()),
        }
        return CheckpointState(tensors, own, plain)

    def restore(self, state: CheckpointState) -> None:
        """Go on from `state`, which may have been written by another number of ranks."""
        plain, rank = state.plain, self.ranks.rank
        self.draft.load_state_dict(with_prefix(state.tensors, "draft/"))
        moments = {
            place: with_prefix(state.tensors, f"optimizer/{name}/")
            for place, (name, _) in enumerate(self.draft.named_parameters())
        }
        groups = plain["param_groups"]
        self.optim.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.optim.scheduler.load_state_dict(plain["scheduler"])
        self.optim.skipped.fill_(plain["skipped"])
        self.optim.skipped_in_a_row.fill_(plain["skipped_in_a_row"])
        self.loader.state = dict(plain["loader"])
        self.update, self.best = plain["update"], plain["best"]
        self.best_update = plain["best_update"]
        self.meter.restore(plain["meters"], rank, self.ranks.world_size)
        if f"rank_{rank}/rng" in state.own:
            torch.set_rng_state(state.own[f"rank_{rank}/rng"])
        if self.device.type == "cuda" and f"rank_{rank}/rng_cuda" in state.own:
            torch.cuda.set_rng_state(state.own[f"rank_{rank}/rng_cuda"], self.device)


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `prefix`, under the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def discard(metrics: dict[str, float], step: int) -> None:
    """What ranks beside the first do with metrics."""


def check_fingerprints(saved: dict[str, str], current: dict[str, str]) -> None:
    """Raise ConfigError when data or target are not those that a checkpoint was trained on."""
    for name, fingerprint in saved.items():
        if current.get(name) != fingerprint:
            raise ConfigError(
                f"{name} is {current.get(name)}, but the checkpoint has {fingerprint}; start a new run"
            )


def refuse_endless_skipping(trainer: Trainer, update: Update, run_dir: Path) -> None:
    """End the run when the last updates were all skipped for non-finite gradients; saves the batch."""
    in_a_row, rank = int(trainer.optim.skipped_in_a_row), trainer.ranks.rank
    if in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    path = run_dir / (f"non_finite_batch_{rank}.pt" if rank else "non_finite_batch.pt")
    torch.save([batch.input_ids for batch in update.batches], path)
    raise RunError(
        f"the gradients of the last {in_a_row} updates were not finite; lower optimizer.lr or look at "
        f"the last batch, saved in {path}"
    )


@contextlib.contextmanager
def note_signals(launched: bool) -> Iterator[dict[str, int]]:
    """The first Ctrl-C or SIGTERM is noted: the loop ends after its update.

    A second one acts at once, except in a launched process, which hears of each signal twice (from
    the terminal and from its launcher).
    """
    received = {"signal": 0}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received["signal"] = number
        for each, handler in before.items() if not launched else ():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(total: int, done: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A bar with ETA, the latest loss and acceptance; yields `show(update, loss=, acceptance=)`."""
    text = TextColumn("{task.fields[text]}")
    columns = TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text
    latest: dict[str, float] = {}
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("train", total=total, completed=done, text="")

        def show(update: int, **values: float) -> None:
            latest.update(values)
            text = "  ".join(f"{name} {value:.3f}" for name, value in latest.items())
            progress.update(task, completed=update, text=text)

        yield show
