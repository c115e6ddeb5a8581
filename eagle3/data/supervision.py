"""Which (row t, step k) pairs the loss supervises: the options of `loss/mask`.

Each function takes, for T packed tokens: `assistant` bool [T] (a_t: content or end of an assistant turn), `in_vocab`
bool [T] (x_t lies in the draft vocabulary), `ends` int64 [T] (where the row's document ends), the documents' lengths
and ttt_steps K. It returns bool [K, T] and the normaliser of the batch. The condition that the teacher's argmax lies
in the draft vocabulary is not known yet; the loss applies it.
"""

import torch


def ahead(values: torch.Tensor, ends: torch.Tensor, distance: int) -> torch.Tensor:
    """values[t + distance] at t, False beyond the document's end."""
    places = torch.arange(len(values)) + distance
    return values[places.clamp(max=len(values) - 1)] & (places < ends)


def serving(
    assistant: torch.Tensor, in_vocab: torch.Tensor, ends: torch.Tensor, lengths: list[int], ttt_steps: int
) -> tuple[torch.Tensor, int]:
    """The pairs that drafting can reach: a_{t+1} ... a_{t+k+2}, and every token drafted before k in the vocabulary.

    Normaliser: the number of rows supervised at step 0.
    """
    steps = [ahead(assistant, ends, 1) & ahead(assistant, ends, 2)]
    for k in range(1, ttt_steps):
        steps.append(steps[-1] & ahead(assistant, ends, k + 2) & ahead(in_vocab, ends, k + 1))
    return torch.stack(steps), int(steps[0].sum())


def shifted(
    assistant: torch.Tensor, in_vocab: torch.Tensor, ends: torch.Tensor, lengths: list[int], ttt_steps: int
) -> tuple[torch.Tensor, int]:
    """SpecForge's pairs: the gate a_{t+k}. Normaliser: documents times the longest of them."""
    steps = [ahead(assistant, ends, k) for k in range(ttt_steps)]
    return torch.stack(steps), len(lengths) * max(lengths)
