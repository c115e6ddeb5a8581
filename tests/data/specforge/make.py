"""How `case.npz` and `expected.json` were cut out of reference arrays of SpecForge's EAGLE3 core.

    python make.py FOLDER

The arrays in FOLDER were made with the registry package specforge 0.2.0 in fp32 on a CPU:
`weights`, `inputs_full`, `inputs_padded`, `expected_full` and `expected_padded` (safetensors) and
`adamw_trajectory.json`. To keep the fixture below 3 MB, only the embeddings of ids that occur, the
last hidden states that teach, and the head's rows of the draft vocabulary are kept, with the argmax
over the whole vocabulary computed beforehand; bf16 numbers are stored as two planes of bytes, high
and low, because that compresses by a third. A gradient is folded to 256 numbers (see `fold` in
test_specforge_reference.py).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

here = Path(__file__).parent
sys.path.insert(0, str(here.parents[1]))

from test_specforge_reference import fold  # noqa: E402


def planes(values: torch.Tensor) -> np.ndarray:
    """bf16 [...] -> uint8 [2, ...]"""
    bits = values.contiguous().view(torch.int16).numpy().view(np.uint16)
    return np.stack([bits >> 8, bits & 255]).astype(np.uint8)


folder = Path(sys.argv[1])
weights, inputs = (
    load_file(folder / "weights.safetensors"),
    load_file(folder / "inputs_full.safetensors"),
)
t2d, d2t = weights.pop("t2d"), weights.pop("d2t")
embedding, head = weights.pop("embed_tokens.weight"), weights.pop("target.lm_head.weight")
assistant = inputs["loss_mask"].bool()
teaches = assistant | torch.nn.functional.pad(assistant[:, :-1], (1, 0))
used_ids = torch.cat([inputs["input_ids"].flatten(), torch.zeros(1, dtype=torch.long)]).unique()
arrays = {
    "t2d": t2d.numpy(),
    "d2t": d2t.numpy().astype(np.int16),
    "used_ids": used_ids.numpy().astype(np.int16),
    "used_embeddings": planes(embedding[used_ids]),
    "draft_head": planes(head[t2d]),
    "target_norm": planes(weights.pop("target.norm.weight")),
    "input_ids": inputs["input_ids"].numpy().astype(np.int16),
    "aux_hidden_states": planes(inputs["aux_hidden_states"]),
    "last_hidden_prenorm": planes(inputs["target_last_hidden_prenorm"] * teaches[..., None]),
    "argmax": (inputs["target_last_hidden_postnorm"] @ head.float().T)
    .argmax(-1)
    .numpy()
    .astype(np.int16),
}
arrays |= {f"draft.{name}": planes(weights[name]) for name in weights}

results = {"adamw_trajectory": json.loads((folder / "adamw_trajectory.json").read_text())["rows"]}
for case, lengths in (("full", [256, 256]), ("padded", [256, 200])):
    expected = load_file(folder / f"expected_{case}.safetensors")
    results[case] = {
        "lengths": lengths,
        "step_loss": expected["plosses"].tolist(),
        "loss": expected["loss"].item(),
        "correct": expected["acc_corrects"].tolist(),
        "supervised": expected["acc_denoms"].tolist(),
    }
    arrays[f"{case}.loss_mask"] = (
        load_file(folder / f"inputs_{case}.safetensors")["loss_mask"].numpy().astype(bool)
    )
    arrays |= {
        f"{case}.{name}": fold(x).numpy()
        for name, x in expected.items()
        if name.startswith("grad.")
    }
np.savez_compressed(here / "case.npz", **arrays)
(here / "expected.json").write_text(json.dumps(results))
