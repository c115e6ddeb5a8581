"""Every tool's way to number the decoder layers whose outputs an EAGLE3 draft reads, in one place.

We and transformers' own code count decoder layers from 0 and mean their outputs.
"""

# What is added to such a number. `hidden_states` is the tuple that transformers returns, with the embedding in front;
# vLLM means the inputs of layers; SGLang's explicit ids mean outputs (inside it adds one, for inputs).
SHIFTS = {"hidden_states": 1, "sglang": 0, "vllm": 1, "tensorrt_llm": 0}


def numbered_by(tool: str, aux_layer_ids: list[int]) -> list[int]:
    """Our `aux_layer_ids` as `tool`, one of SHIFTS, numbers them."""
    return [layer_id + SHIFTS[tool] for layer_id in aux_layer_ids]


def meant_by(tool: str, numbers: list[int]) -> list[int]:
    """In our numbers, the layers that `tool` reads for these."""
    return [number - SHIFTS[tool] for number in numbers]


def sglang_default(num_layers: int) -> list[int]:
    """What SGLang captures unasked, in our numbers: it names the inputs of layers 2, L/2 and L - 3."""
    return sorted({layer_id - 1 for layer_id in (2, num_layers // 2, num_layers - 3)})
