"""Other ways to read a draft, as it would be without a likely mistake of who wrote it, and how much
better it drafts so; wrong drafts of the right shape load everywhere without a word.

M pairs of a row and a step of the target's own answers, V the draft's vocabulary.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from eagle3.batch import by_step
from eagle3.draft.model import Draft, DraftConfig
from eagle3.draft.rope import Rope
from eagle3.evaluate import Packed, acceptance_length, draft_likelihoods, walk, wanted_ids
from eagle3.loss import FrozenWeights
from eagle3.runs.checkpoint import Tensors

# How many times as likely another way must find the target's tokens to show a mistake, and by how
# many standard errors; for sound drafts none came to 1.03 on text of the kind they learnt, but to
# 1.12 on other text, where it accepted no more: so more must be accepted, too.
CLEARLY, ERRORS = 1.1, 4.0
FLOOR = 1e-6  # a probability: what a token without a draft id has
BLOCK_NORMS = (
    ("hidden_norm.weight", "norm.weight"), ("q_norm.weight", "k_norm.weight"),
    ("input_layernorm.weight", "post_attention_layernorm.weight"),
)  # fmt: skip
NORMS = (
    "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight",
    "midlayer.post_attention_layernorm.weight", "norm.weight",
)  # fmt: skip


@dataclass
class Reading:
    """How a draft, read in some way, does on the target's own answers."""

    acceptance_length: float  # of greedy chains
    likelihoods: torch.Tensor  # log-probabilities of the target's tokens, [M]


@dataclass
class Way:
    """A reading against that of the draft as it is: how many times as likely it finds the target's
    tokens, and the logarithm of that in standard errors.
    """

    length: float
    likelier: float
    errors: float
    is_clear: bool


def compare(reading: Reading, as_it_is: Reading, suspect: bool = False) -> Way:
    """`suspect`: config.json is odd there, so that any difference of half the errors is clear."""
    gained_M = (reading.likelihoods - as_it_is.likelihoods).double()
    mean, error = float(gained_M.mean()), float(gained_M.std()) / len(gained_M) ** 0.5
    likelier, errors = math.exp(mean), mean / max(error, 1e-9)
    length = reading.acceptance_length
    better = likelier > CLEARLY and length > as_it_is.acceptance_length
    clear = errors > ERRORS / 2 if suspect else errors > ERRORS and better
    return Way(length, likelier, errors, clear)


@torch.no_grad()
def read_with(
    draft: Draft, frozen: FrozenWeights, packed: Packed, columns: torch.Tensor, draft_length: int
) -> Reading:
    """Of answers, one in each batch, and `columns` of their auxiliary states."""
    answers, likelihoods = [], []
    for batch, documents in packed:
        head, aux = frozen.draft_head, batch.features.aux_hidden_states[:, columns]
        hidden_ND = draft.unroll(frozen.embedding, aux, batch)
        best_M = draft.target_ids[draft.logits(hidden_ND[batch.pair_index], head).argmax(-1)]
        right_M = (best_M == wanted_ids(batch)).double()
        answers += walk(documents, [by_step(batch, right_M).cpu()], draft_length)
        found_M = draft_likelihoods(draft, hidden_ND, batch, head, 1.0, len(best_M))
        likelihoods.append(found_M.clamp(min=math.log(FLOOR)).cpu())
    return Reading(acceptance_length(answers), torch.cat(likelihoods))


def mended(draft: Draft, theta: float) -> Iterator[tuple[str, Draft]]:
    """Words for a likely mistake, and the draft (one object) without it; the target's `theta`."""
    own, config = copy.deepcopy(draft.state_dict()), draft.config
    for words, tensors in repairs(own, config):
        draft.load_state_dict(own | tensors)
        yield words, draft
    draft.load_state_dict(own)
    if not config.reads_mask_token:
        config.norm_output = not config.norm_output
        yield f"norm_output={str(config.norm_output).lower()}", draft
        config.norm_output = not config.norm_output
    for other in sorted({theta, 10000.0} - {config.rope_theta}):
        draft.rope = Rope(config.head_dim, other)
        yield f"rope_theta={other:g}", draft


def other_orders(count: int) -> list[tuple[int, ...]]:
    """Of so many layers: backwards, turned round, or with two exchanged; of three these are all."""
    places = tuple(range(count))
    orders = [places[::-1], *(places[shift:] + places[:shift] for shift in range(1, count))]
    for one, other in combinations(places, 2):
        exchanged = {one: other, other: one}
        orders.append(tuple(exchanged.get(place, place) for place in places))
    return [order for order in dict.fromkeys(orders) if order != places]


def repairs(own: Tensors, config: DraftConfig) -> Iterator[tuple[str, Tensors]]:
    """What fits in shape as well as the tensors of `own` do."""
    count = config.num_aux_hidden_states
    parts = own["fc.weight"].chunk(count, dim=1)
    for order in other_orders(count):
        changed = {"fc.weight": torch.cat([parts[place] for place in order], dim=1)}
        for number, place in enumerate(order if config.fc_norm else ()):
            changed[f"fc_norm.{number}.weight"] = own[f"fc_norm.{place}.weight"]
        yield f"the layers of fc in the order {tuple(place + 1 for place in order)}", changed
    if parts[0].shape[0] == parts[0].shape[1]:
        transposed = torch.cat([part.T for part in parts], dim=1)
        yield "each layer's part of fc.weight transposed", {"fc.weight": transposed}
    # The two numbers that RoPE turns lie side by side in some code, half a head apart in ours.
    of_heads = ("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")
    names = [name for name in own if name.endswith(of_heads)]
    order = torch.arange(config.head_dim).view(-1, 2).T.flatten()
    for words, rows in {"pairs to halves": order, "halves to pairs": order.argsort()}.items():
        heads = {name: own[name].unflatten(0, (-1, config.head_dim)) for name in names}
        turned = {name: head[:, rows].flatten(0, 1) for name, head in heads.items()}
        yield f"the rows of q and k reordered from rotary {words}", turned
    pairs = BLOCK_NORMS if config.reads_mask_token else combinations(NORMS, 2)
    for one, other in pairs:
        changed = {}
        for name in own:
            if name.endswith(one):  # in every layer
                twin = name.removesuffix(one) + other
                changed |= {name: own[twin], twin: own[name]}
        yield f"{one} and {other} exchanged", changed
    if not config.reads_mask_token:
        yield from eagle3_repairs(own, config.vocab_size)


def eagle3_repairs(own: Tensors, vocab_size: int) -> Iterator[tuple[str, Tensors]]:
    """Of its columns for the embedding, and of its own vocabulary."""
    names = [f"midlayer.self_attn.{name}_proj.weight" for name in "qkv"]
    # Their columns are for the embedding, then for the hidden state.
    halves = {name: own[name].roll(own[name].shape[1] // 2, dims=1) for name in names}
    yield "the halves of the columns of q, k and v exchanged", halves
    norms = {NORMS[0]: own[NORMS[1]], NORMS[1]: own[NORMS[0]]}
    yield "the halves of q, k and v and their norms exchanged", halves | norms
    d2t, places = own["d2t"], torch.arange(len(own["d2t"]), device=own["d2t"].device)
    maps = {"the numbers in d2t as ids": d2t, "ids one higher": d2t + places + 1}
    for words, ids in (maps | {"ids one lower": d2t + places - 1}).items():
        ids = ids % vocab_size
        if len(ids.unique()) == len(ids):
            t2d = torch.zeros_like(own["t2d"]).index_fill_(0, ids, True)
            yield words, {"d2t": ids - places, "t2d": t2d}
