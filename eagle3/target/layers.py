"""How each tool numbers the decoder layers whose outputs an EAGLE3 draft reads.

We, as transformers' own code, count decoder layers from 0 and mean their outputs.
"""

# What is added to our number. `hidden_states` is the tuple that transformers returns, the embedding
# in front; vLLM means inputs of layers; SGLang's explicit ids mean outputs (inside, it adds one).
SHIFTS = {"hidden_states": 1, "sglang": 0, "vllm": 1, "tensorrt_llm": 0}


def numbered_by(tool: str, aux_layer_ids: list[int]) -> list[int]:
    """Our `aux_layer_ids` as `tool`, one of SHIFTS, numbers them."""
    return [layer_id + SHIFTS[tool] for layer_id in aux_layer_ids]


def meant_by(tool: str, numbers: list[int]) -> list[int]:
    """In our numbers, the layers that `tool` reads for these."""
    return [number - SHIFTS[tool] for number in numbers]


def engines_default(num_layers: int) -> list[int]:
    """What EAGLE3 and every engine feed unasked, in our numbers; below 7 layers some coincide."""
    return [1, num_layers // 2 - 1, num_layers - 4]
