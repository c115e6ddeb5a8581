"""What a target says about a batch; online, hybrid and offline hand the trainer exactly this."""

from dataclasses import dataclass, fields

import torch


@dataclass
class Features:
    """T packed tokens, H the target's hidden size, U teacher rows (`Batch.teacher_rows`).

    `aux_hidden_states` [T,3H]: outputs of the three auxiliary decoder layers, concatenated low to high.
    `last_hidden_states` [U,H]: after the target's final norm.
    `argmax` int64 [U] and `logsumexp` fp32 [U]: of the target's logits over its whole vocabulary.
    """

    aux_hidden_states: torch.Tensor
    last_hidden_states: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor

    def to(self, device: torch.device) -> "Features":
        return Features(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))
