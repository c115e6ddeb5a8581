"""A target spread over several processes: one leads and runs the pipeline, the others repeat each of its calls."""

from typing import Any

from eagle3.distributed import Ranks

LOAD = "load"


class Led:
    """The leader's view of a tensor parallel target: every call is told to the group before it is made."""

    def __init__(self, target: Any, ranks: Ranks):
        self.target, self.ranks = target, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def __call__(self, batch: Any) -> Any:
        self.ranks.share(("__call__", (batch,), {}))
        return self.target(batch)

    def generate(self, *args: Any, **options: Any) -> Any:
        self.ranks.share(("generate", args, options))
        return self.target.generate(*args, **options)


def follow(load: Any, ranks: Ranks) -> None:
    """Repeat the leader's calls on this process's part of the target until it says that there are no more."""
    if ranks.share(None) is None:
        return
    target = load()
    while (call := ranks.share(None)) is not None:
        name, args, options = call
        getattr(target, name)(*args, **options)
