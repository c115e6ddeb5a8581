"""The trainer core: one loop for every data source, target and attention backend."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eagle3 import checkpoint
from eagle3.data.loader import Loader, Update
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import Evaluation
from eagle3.logger import JsonLines
from eagle3.loss import SoftTargetLoss
from eagle3.metrics import Meter
from eagle3.modes import Supply
from eagle3.optim import step_if_finite
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
    ):
        """`embedding` [V,D] and `draft_head` [Vd,H] are the target's, frozen; `inputs` the fingerprints of the rest."""
        self.inputs = inputs
        self.draft, self.embedding, self.draft_head = draft, embedding, draft_head
        self.supply, self.loss, self.loader = supply, loss, loader
        self.optimizer, self.scheduler, self.max_grad_norm = optimizer, scheduler, max_grad_norm
        self.device = embedding.device
        self.meter = Meter(loader.ttt_steps, loss.gamma, self.device)
        self.update, self.best, self.best_update = 0, -math.inf, 0
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def state(self) -> dict[str, Any]:
        self.supply.sync()
        return {
            "draft": self.draft.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "loader": dict(self.loader.state),
            "update": self.update,
            "best": self.best,
            "best_update": self.best_update,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "meter": self.meter.state(),
            "inputs": self.inputs,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; raises ConfigError when data or target are not those it was trained on."""
        for name, fingerprint in state["inputs"].items():
            if self.inputs.get(name) != fingerprint:
                raise ConfigError(
                    f"{name} is {self.inputs.get(name)}, but the checkpoint has {fingerprint}; start a new run"
                )
        self.draft.load_state_dict(state["draft"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.loader.state = dict(state["loader"])
        self.update, self.best, self.best_update = state["update"], state["best"], state["best_update"]
        self.skipped.copy_(state["skipped"])
        self.skipped_in_a_row.copy_(state["skipped_in_a_row"])
        self.meter.restore(state["meter"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"]:
            torch.cuda.set_rng_state_all(state["rng_cuda"])

    def train_on(self, update: Update, waited: float) -> torch.Tensor:
        """Forward, backward and one guarded optimiser step; returns the gradient norm, still on the device.

        An update all of whose documents are damaged changes nothing and counts.
        """
        if not update.batches:
            self.scheduler.step()
            self.update += 1
            return torch.zeros(())
        for batch in update.batches:
            batch = batch.to(self.device)
            features = batch.features or self.supply.features_of(batch)
            hidden = unroll(self.draft, self.embedding, features.aux_hidden_states, batch)
            output = self.loss(self.draft, hidden, features, batch, self.draft_head)
            (output.loss / update.normaliser).backward()
            self.meter.add(
                output.step_loss,
                output.step_correct,
                batch.pair_counts,
                batch.normaliser,
                tokens=len(batch.input_ids),
                supervised_tokens=batch.pair_counts[0],
                data_wait_seconds=waited,
                flops=training_flops(self.draft.config, batch),
            )
            waited = 0.0
        parameters = list(self.draft.parameters())
        norm, skipped = step_if_finite(self.optimizer, parameters, self.max_grad_norm)
        self.scheduler.step()
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + skipped) * skipped
        self.update += 1
        return norm


@contextlib.contextmanager
def stop_on_signals() -> Iterator[dict[str, int | None]]:
    """The first Ctrl-C or SIGTERM is noted (the loop ends after its update); a second one acts at once."""
    received: dict[str, int | None] = {"signal": None}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received["signal"] = number
        for each, handler in before.items():
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
    metrics_file: JsonLines,
    track: Callable[[dict[str, float], int], None],
    save_every: int,
    eval_every: int,
    log_every: int,
    keep_last: int,
) -> None:
    """Train until the loader's last update; keeps `last` and `best` (by `eval/acceptance_length`) checkpoints.

    Without anything to evaluate on, the last checkpoint is the best.
    """
    folder, total = run_dir / "checkpoints", trainer.loader.total_updates
    meter = trainer.meter

    def log(metrics: dict[str, float]) -> None:
        metrics_file.log(metrics, trainer.update)
        track(metrics, trainer.update)

    with stop_on_signals() as received, progress_bar(total, trainer.update) as show:
        updates = iter(trainer.loader)
        while trainer.update < total:
            began = time.perf_counter()
            update = next(updates)
            lr = trainer.scheduler.get_last_lr()[0]
            norm = trainer.train_on(update, time.perf_counter() - began)
            last = trainer.update == total
            if trainer.update % log_every == 0 or last:
                refuse_endless_skipping(trainer, update, run_dir)
                metrics = meter.read() | {"lr": lr, "grad_norm": float(norm), "skipped_updates": int(trainer.skipped)}
                log(metrics)
                show(trainer.update, loss=metrics["loss"])
            began = time.perf_counter()
            due = trainer.update % save_every == 0 or last or received["signal"] is not None
            if evaluate is None and due:
                trainer.best_update = trainer.update
                checkpoint.save(folder, trainer.update, trainer.state(), keep_last, best=True)
                due = False
            elif evaluate is not None and (trainer.update % eval_every == 0 or last):
                evaluation = evaluate(trainer.draft).metrics()
                log(evaluation)
                show(trainer.update, acceptance=evaluation["eval/acceptance_length"])
                if evaluation["eval/acceptance_length"] > trainer.best:
                    trainer.best, trainer.best_update = evaluation["eval/acceptance_length"], trainer.update
                    checkpoint.save(folder, trainer.update, trainer.state(), keep_last, best=True)
                    due = False
            if due:
                checkpoint.save(folder, trainer.update, trainer.state(), keep_last)
            if received["signal"] is not None:
                print(f"\nstopped after update {trainer.update}; go on with: python run.py train.resume={run_dir}")
                raise Interrupted(128 + received["signal"])
            meter.leave_out(time.perf_counter() - began)


def refuse_endless_skipping(trainer: Trainer, update: Update, run_dir: Path) -> None:
    """End the run when the last updates were all skipped for non-finite gradients; the batch is saved."""
    if int(trainer.skipped_in_a_row) < MAX_SKIPPED_IN_A_ROW:
        return
    path = run_dir / "non_finite_batch.pt"
    torch.save([batch.input_ids for batch in update.batches], path)
    raise RunError(
        f"the gradients of the last {int(trainer.skipped_in_a_row)} updates were not finite; lower optimizer.lr or "
        f"look at the last batch, saved in {path}"
    )


@contextlib.contextmanager
def progress_bar(total: int, done: int) -> Iterator[Callable[..., None]]:
    """A bar with ETA, the latest loss and acceptance length; yields `show(update, loss=, acceptance=)`."""
    columns = [
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    ]
    latest: dict[str, float] = {}
    with Progress(*columns) as progress:
        task = progress.add_task("train", total=total, completed=done, text="")

        def show(update: int, **values: float) -> None:
            latest.update(values)
            text = "  ".join(f"{name} {value:.3f}" for name, value in latest.items())
            progress.update(task, completed=update, text=text)

        yield show
