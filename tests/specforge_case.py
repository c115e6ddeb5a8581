"""SpecForge's fixed inputs and our batch of them, for the tests that compare with its numbers."""

from pathlib import Path

import numpy as np
import torch
from conftest import soft_target_loss

from eagle3.batch import Document, Features, pack, shifted
from eagle3.draft.flash import Auto
from eagle3.draft.model import EAGLE3, DraftConfig
from eagle3.draft.ttt import unroll
from eagle3.loss import kl

FOLDER = Path(__file__).parent / "data" / "specforge"
TTT_STEPS, GAMMA = 7, 0.8


def bf16(planes: np.ndarray) -> torch.Tensor:
    """High and low bytes uint8 [2, ...] of bf16 numbers -> fp32 [...]."""
    high, low = planes.astype(np.int32)
    return torch.from_numpy(((high << 24) | (low << 16)).view(np.float32))


class Fixture:
    def __init__(self, name: str, lengths: list[int]):
        self.arrays = arrays = np.load(FOLDER / "case.npz")
        t2d, d2t = torch.from_numpy(arrays["t2d"]), torch.from_numpy(arrays["d2t"]).long()
        config = DraftConfig(
            hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, vocab_size=4096, draft_vocab_size=1024, target_hidden_size=256,
            max_position_embeddings=2048,
        )  # fmt: skip
        self.draft = EAGLE3(config, Auto, t2d, d2t)
        weights = {key[6:]: bf16(arrays[key]) for key in arrays.files if key.startswith("draft.")}
        self.draft.load_state_dict(weights | {"t2d": t2d, "d2t": d2t})
        self.embedding = torch.zeros(4096, 256)
        used = torch.from_numpy(arrays["used_ids"]).long()
        self.embedding[used] = bf16(arrays["used_embeddings"])
        self.draft_head = bf16(arrays["draft_head"])

        def packed(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])

        ids, mask = (torch.from_numpy(arrays[key]) for key in ("input_ids", f"{name}.loss_mask"))
        documents = [Document(i, ids[i, :n], mask[i, :n]) for i, n in enumerate(lengths)]
        self.batch = pack(documents, t2d, TTT_STEPS, shifted)
        prenorm = packed(bf16(arrays["last_hidden_prenorm"]))[self.batch.teacher_rows]
        last = torch.nn.functional.rms_norm(prenorm, (256,), bf16(arrays["target_norm"]), 1e-5)
        argmax = packed(torch.from_numpy(arrays["argmax"]).long())[self.batch.teacher_rows]
        aux = packed(bf16(arrays["aux_hidden_states"]))
        self.features = Features(aux, last, argmax, torch.zeros(len(argmax)))

    def __call__(self):
        hidden = unroll(self.draft, self.embedding, self.features.aux_hidden_states, self.batch)
        given = hidden, self.features, self.batch, self.draft_head
        out = soft_target_loss(kl, GAMMA)(self.draft, *given)
        return out, out.loss / self.batch.normaliser
