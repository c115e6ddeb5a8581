"""The draft vocabulary: which target tokens the draft can propose."""

import numpy as np
import torch

from eagle3.errors import RunError


def choose_vocab(counts: np.ndarray, size: int, always: set[int]) -> np.ndarray:
    """int64 [size] ascending target ids: `always`, then those of the highest `counts` [V] over
    supervised tokens; ties, also of tokens never seen, go to the lowest ids.
    """
    order = np.argsort(-counts, kind="stable")
    forced = np.array(sorted(always), dtype=np.int64)[:size]
    rest = order[~np.isin(order, forced)][: size - len(forced)]
    return np.sort(np.concatenate([forced, rest])).astype(np.int64)


def vocab_tensors(vocab: np.ndarray, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending ids [Vd] -> t2d bool [V], d2t int64 [Vd] (target id = draft id + d2t[draft id]).
    Raises RunError where the ids are no subset of this target's vocabulary.
    """
    ids = torch.from_numpy(np.array(vocab, dtype=np.int64))
    if (ids.diff() <= 0).any() or ids[0] < 0 or ids[-1] >= vocab_size:
        words = f"the draft vocabulary ({ids.min()} to {ids.max()}) does not belong to this target"
        raise RunError(f"{words} with {vocab_size} tokens; prepare the data again for it")
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return t2d, ids - torch.arange(len(ids))
