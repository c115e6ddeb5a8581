"""The trainer core: one loop for every data source, target and attention backend."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import Evaluation
from eagle3.hidden_states.supply import Supply
from eagle3.loader import Loader, Update
from eagle3.loss import SoftTargetLoss
from eagle3.optim import step_if_finite
from eagle3.parallel.ranks import Ranks
from eagle3.runs.checkpoint import Checkpoints, State
from eagle3.runs.metrics import Meter
from eagle3.ttt import training_flops, unroll

MAX_SKIPPED_IN_A_ROW = 5


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM, after the checkpoint: exits with 130 or 143."""


class Trainer:
    """What a run changes while it trains; `state` and `restore` are what a checkpoint holds."""

    def __init__(
        self,
        draft: Draft,
        embedding: torch.Tensor,
        draft_head: torch.Tensor,
        supply: Supply,
        loss: SoftTargetLoss,
        loader: Loader,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        max_grad_norm: float,
        inputs: dict[str, str],
        ranks: Ranks | None = None,
        reduce_dtype: torch.dtype = torch.float32,
    ):
        """`embedding` [V,D] and `draft_head` [Vd,H] are the target's, frozen; `inputs` the
        fingerprints of the rest.

        Gradients are exchanged in `reduce_dtype`.
        """
        self.inputs, self.ranks, self.reduce_dtype = inputs, ranks or Ranks(), reduce_dtype
        self.draft, self.embedding, self.draft_head = draft, embedding, draft_head
        self.supply, self.loss, self.loader = supply, loss, loader
        self.optimizer, self.scheduler, self.max_grad_norm = optimizer, scheduler, max_grad_norm
        self.device = embedding.device
        self.meter = Meter(loader.ttt_steps, loss.gamma, self.device)
        self.update, self.best, self.best_update = 0, -math.inf, 0
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def state(self) -> State:
        """Every rank makes it together with the others."""
        self.supply.sync()
        optimizer = self.optimizer.state_dict()
        names, rank = [name for name, _ in self.draft.named_parameters()], self.ranks.rank
        tensors = {f"draft/{name}": tensor for name, tensor in self.draft.state_dict().items()}
        for place, values in optimizer["state"].items():
            tensors |= {f"optimizer/{names[place]}/{key}": value for key, value in values.items()}
        own = {f"rank_{rank}/rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            own[f"rank_{rank}/rng_cuda"] = torch.cuda.get_rng_state(self.device)
        plain = {
            "update": self.update,
            "best": self.best,
            "best_update": self.best_update,
            "skipped": int(self.skipped),
            "skipped_in_a_row": int(self.skipped_in_a_row),
            "loader": self.loader.state,
            "tokens_per_update": self.loader.tokens_per_update,
            "scheduler": self.scheduler.state_dict(),
            "param_groups": optimizer["param_groups"],
            "inputs": self.inputs,
            "meters": self.ranks.collect(self.meter.state()),
        }
        return State(tensors, own, plain)

    def restore(self, state: State) -> None:
        """Go on from `state`; raises ConfigError when data or target are not those it was trained
        on.
        """
        plain, tensors, rank = state.plain, state.tensors, self.ranks.rank
        for name, fingerprint in plain["inputs"].items():
            if self.inputs.get(name) != fingerprint:
                raise ConfigError(
                    f"{name} is {self.inputs.get(name)}, but the checkpoint has {fingerprint}; start a new run"
                )
        self.draft.load_state_dict(
            {n[len("draft/") :]: t for n, t in tensors.items() if n.startswith("draft/")}
        )
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for place, (name, _) in enumerate(self.draft.named_parameters()):
            prefix = f"optimizer/{name}/"
            moments[place] = {
                n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)
            }
        self.optimizer.load_state_dict({"state": moments, "param_groups": plain["param_groups"]})
        self.scheduler.load_state_dict(plain["scheduler"])
        self.loader.state = dict(plain["loader"])
        self.update, self.best, self.best_update = (
            plain["update"],
            plain["best"],
            plain["best_update"],
        )
        self.skipped.fill_(plain["skipped"])
        self.skipped_in_a_row.fill_(plain["skipped_in_a_row"])
        self.meter.restore(plain["meters"], rank, self.ranks.world_size)
        if f"rank_{rank}/rng" in state.own:
            torch.set_rng_state(state.own[f"rank_{rank}/rng"])
        if self.device.type == "cuda" and f"rank_{rank}/rng_cuda" in state.own:
            torch.cuda.set_rng_state(state.own[f"rank_{rank}/rng_cuda"], self.device)

    def train_on(self, update: Update, waited: float) -> torch.Tensor:
        """Forward, backward and one guarded optimiser step; returns the gradient norm, still on the
        device.

        Gradients meet once, after the last micro-step. An update all of whose documents are damaged
        changes nothing and counts.
        """
        normaliser = self.ranks.total(update.normaliser)
        if not normaliser:
            self.scheduler.step()
            self.update += 1
            return torch.zeros(())
        for batch in update.batches:
            batch = batch.to(self.device)
            features = batch.features or self.supply.features(batch)
            hidden = unroll(self.draft, self.embedding, features.aux_hidden_states, batch)
            output = self.loss(self.draft, hidden, features, batch, self.draft_head)
            (output.loss / normaliser).backward()
            self.meter.add(
                output.step_loss,
                output.step_correct,
                batch.pair_counts,
                batch.normaliser,
                tokens=batch.tokens,
                supervised_tokens=batch.pair_counts[0],
                data_wait_seconds=waited,
                flops=training_flops(self.draft.config, batch),
            )
            waited = 0.0
        parameters = list(self.draft.parameters())
        self.ranks.sum_gradients(parameters, self.reduce_dtype)
        norm, skipped = step_if_finite(self.optimizer, parameters, self.max_grad_norm)
        self.scheduler.step()
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + skipped) * skipped
        self.update += 1
        return norm


@contextlib.contextmanager
def stop_on_signals(launched: bool) -> Iterator[dict[str, int]]:
    """The first Ctrl-C or SIGTERM is noted: the loop ends after its update. A second one acts at
    once, except in a launched process, which hears of each signal twice (from the terminal and from
    its launcher).
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


def fit(
    trainer: Trainer,
    evaluate: Callable[[Draft], Evaluation] | None,
    run_dir: Path,
    log: Callable[[dict[str, float], int], None],
    save_every: int,
    eval_every: int,
    log_every: int,
    keep_last: int,
) -> None:
    """Train until the loader's last update; keeps `last` and `best` (by `eval/acceptance_length`)
    checkpoints.

    Every rank is here, takes the same turns and evaluates to the same number. Without anything to
    evaluate on, the last checkpoint is the best.
    """
    total, meter, ranks = trainer.loader.total_updates, trainer.meter, trainer.ranks
    checkpoints = Checkpoints(run_dir / "checkpoints", keep_last, ranks)
    launched = ranks.world_size > 1
    with (
        stop_on_signals(launched) as received,
        progress_bar(total, trainer.update, ranks.is_main) as show,
    ):
        updates = iter(trainer.loader)
        while trainer.update < total:
            began = time.perf_counter()
            update = next(updates)
            lr = trainer.scheduler.get_last_lr()[0]
            norm = trainer.train_on(update, time.perf_counter() - began)
            last, stopping = trainer.update == total, int(ranks.most(received["signal"]))
            if trainer.update % log_every == 0 or last:
                refuse_endless_skipping(trainer, update, run_dir)
                metrics = meter.read(ranks.sum)
                metrics |= {
                    "lr": lr,
                    "grad_norm": float(norm),
                    "skipped_updates": int(trainer.skipped),
                }
                log(metrics, trainer.update)
                show(trainer.update, loss=metrics["loss"])
            began = time.perf_counter()
            best = evaluate is None
            if evaluate is not None and (trainer.update % eval_every == 0 or last):
                evaluation = evaluate(trainer.draft).metrics()
                log(evaluation, trainer.update)
                show(trainer.update, acceptance=evaluation["eval/acceptance_length"])
                best = evaluation["eval/acceptance_length"] > trainer.best
                trainer.best = max(trainer.best, evaluation["eval/acceptance_length"])
            due = trainer.update % save_every == 0 or last or stopping
            if due or (best and evaluate is not None):
                trainer.best_update = trainer.update if best else trainer.best_update
                checkpoints.save(trainer.update, trainer.state(), best)
            checkpoints.look()
            if stopping:
                checkpoints.wait()
                if ranks.is_main:
                    print(
                        f"\nstopped after update {trainer.update}; go on with: python run.py train.resume={run_dir}"
                    )
                raise Interrupted(128 + stopping)
            meter.leave_out(time.perf_counter() - began)
        checkpoints.wait()
        ranks.meet()


def refuse_endless_skipping(trainer: Trainer, update: Update, run_dir: Path) -> None:
    """End the run when the last updates were all skipped for non-finite gradients; the batch is
    saved.
    """
    if int(trainer.skipped_in_a_row) < MAX_SKIPPED_IN_A_ROW:
        return
    path = run_dir / (
        f"non_finite_batch_{trainer.ranks.rank}.pt" if trainer.ranks.rank else "non_finite_batch.pt"
    )
    torch.save([batch.input_ids for batch in update.batches], path)
    raise RunError(
        f"the gradients of the last {int(trainer.skipped_in_a_row)} updates were not finite; lower optimizer.lr or "
        f"look at the last batch, saved in {path}"
    )


@contextlib.contextmanager
def progress_bar(total: int, done: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A bar with ETA, the latest loss and acceptance length; yields `show(update, loss=,
    acceptance=)`.
    """
    columns = [
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    ]
    latest: dict[str, float] = {}
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("train", total=total, completed=done, text="")

        def show(update: int, **values: float) -> None:
            latest.update(values)
            text = "  ".join(f"{name} {value:.3f}" for name, value in latest.items())
            progress.update(task, completed=update, text=text)

        yield show
