"""A target spread over several processes, in the two ways in which a run uses it."""

from typing import Any

import torch

from eagle3.data.packing import Batch
from eagle3.distributed import Ranks
from eagle3.target.features import Features


class Led:
    """For stages that one process runs: it tells the others each call before making it, and they repeat it."""

    def __init__(self, run: Any, ranks: Ranks):
        """`run` is an `eagle3.job.Run`, whose `part` of the target is loaded by all at once."""
        self.ranks = ranks
        ranks.share(("load", {}, {}))
        self.part = run.part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, batch: Batch) -> Features:
        self.ranks.share(("__call__", {"batch": batch.for_target()}, {}))
        return self.part(batch)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        given = {"input_ids": input_ids.cpu(), "attention_mask": attention_mask.cpu()}
        self.ranks.share(("generate", given, options))
        return self.part.generate(input_ids, attention_mask=attention_mask, **options)


def follow(run: Any, ranks: Ranks) -> None:
    """Repeat the leader's calls on this process's part of the target until it says that there are no more."""
    while (call := ranks.share(None)) is not None:
        name, given, options = call
        if name == "load":
            _ = run.part
        else:
            getattr(run.part, name)(**{key: value.to(run.part.device) for key, value in given.items()}, **options)


class Shared:
    """For training: all processes prefill each one's batch together, and each keeps the features of its own.

    Hidden states are the same on all of them, so only the batches travel. Every process asks equally often.
    """

    def __init__(self, part: Any, ranks: Ranks):
        self.part, self.ranks = part, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, batch: Batch | None) -> Features | None:
        """The features of this process' batch; without one it only takes part."""
        mine = None
        for place, asked in enumerate(self.ranks.gather(batch and batch.for_target())):
            features = None if asked is None else self.part(asked.to(self.part.device))
            mine = features if place == self.ranks.rank % self.ranks.tp_size else mine
        return mine

    def stand_by(self, times: int) -> None:
        """Take part in what the others ask for."""
        for _ in range(times):
            self(None)
