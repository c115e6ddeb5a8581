"""The draft vocabulary: which target tokens the draft can propose."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from hydra.utils import get_object
from transformers import PreTrainedTokenizerBase

from eagle3.config import DraftSection
from eagle3.data.chat import load_tokenizer
from eagle3.errors import ConfigError, RunError
from eagle3.target.spec import TargetSpec

SPARE = ("mask", "reserved", "unused", "fim_pad", "pad")  # in names of tokens that no text holds


def complete_section(section: DraftSection, spec: TargetSpec) -> DraftSection:
    """What a block drafter takes from its target: the whole vocabulary, and a token for the slots
    that are empty. Raises ConfigError.
    """
    kind, size = get_object(section.architecture["_target_"]), spec.config.vocab_size
    section = kind.complete(section, size)
    if not kind.reads_mask_token:
        return section
    given = section.mask_token_id
    if given is None:
        with suppress(ConfigError):  # a target without a tokenizer
            given = find_spare_token(load_tokenizer(spec), size)
    if given is None or given >= size:
        wanted = f"an id below {size} of a token that no text holds"
        raise ConfigError(f"draft.mask_token_id={section.mask_token_id}: give {wanted}")
    return replace(section, mask_token_id=given)


def find_spare_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    """A token that no text holds: the tokenizer's own for masks, an id that it never gives, or one
    whose name says so.
    """
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    names = {name.lower(): i for name, i in tokenizer.get_added_vocab().items() if i not in ends}
    found = (i for word in SPARE for name, i in names.items() if word in name and i < vocab_size)
    return next(found, None)


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
