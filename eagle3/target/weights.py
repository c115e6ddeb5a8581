"""The target's embedding, head and final norm alone, for training that never runs the target.

V the target's vocabulary, D the width of its embedding, H its hidden size.
"""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import cached_file

from eagle3.errors import ConfigError, RunError, first_line
from eagle3.target.spec import TargetSpec, check_supported, end_token_ids, whole_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# How families end the names; what stands before (`model.`, `model.language_model.`) differs too
# much to be listed and is found in the checkpoint.
EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight",
    "tok_embeddings.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
HEAD_BIASES = ("lm_head.bias", "embed_out.bias", "output.bias")
NORMS = ("norm.weight", "ln_f.weight", "final_layernorm.weight", "final_layer_norm.weight")


@dataclass
class TargetWeights:
    """What offline training needs of a target, under the names that `HFTarget` has."""

    config: PretrainedConfig  # of the language model
    embedding: torch.Tensor  # [V,D]
    head: torch.Tensor  # [V,H]; the embedding itself when tied
    norm: torch.Tensor | None  # [H], the final norm's weight where it has one
    eos_token_ids: set[int]


class Checkpoint:
    """The tensors of a folder or hub id by name; only files that hold one asked for are downloaded.

    Raises ConfigError where a file is missing, RunError where it is damaged.
    """

    def __init__(self, path: str, revision: str | None):
        self.path, self.revision = path, revision
        try:
            index = cached_file(path, INDEX, revision=revision)
        except OSError:  # a checkpoint of a single file
            self.files = dict.fromkeys(self.open(SINGLE).keys(), SINGLE)
            return
        try:
            self.files: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{INDEX} of {path} names no tensors; get it again") from error

    def open(self, name: str) -> safe_open:
        """One of the files, of which only the header is read."""
        try:
            return safe_open(cached_file(self.path, name, revision=self.revision), "pt")
        except SafetensorError as error:
            sentence = f"{name} of {self.path} does not open ({error}); get it again"
            raise RunError(sentence) from error
        except OSError as error:
            reason = f"model.path={self.path}: {first_line(error)}"
            remedy = "(save_pretrained of transformers converts a pytorch_model.bin)"
            wanted = f"give a folder or hub id with all of its safetensors {remedy}"
            raise ConfigError(f"{reason}; {wanted}") from error

    def ending(self, endings: tuple[str, ...]) -> list[str]:
        """Names with one of `endings`, shortest first, without those of numbered layers."""
        dotted = tuple(f".{end}" for end in endings)
        names = [name for name in self.files if f".{name}".endswith(dotted)]
        return sorted((name for name in names if not re.search(r"\.\d+\.", name)), key=len)

    def find(self, key: str, given: str | None, endings: tuple[str, ...]) -> str:
        """The name that model.`key` gives, else the shortest that ends as families end it."""
        names = self.ending(endings) if given is None else [given]
        if names and names[0] in self.files:
            return names[0]
        near = difflib.get_close_matches(given or endings[0], self.files, n=3, cutoff=0)
        where = f"model.{key}={given or 'null'} finds no tensor in {self.path}"
        raise ConfigError(f"{where}; the nearest are {', '.join(near)}")

    def read(self, name: str, shape: list[int], device: torch.device, dtype) -> torch.Tensor:
        """One tensor. Raises ConfigError where it is not of `shape`, or not of floats."""
        with self.open(self.files[name]) as tensors:
            stored = tensors.get_slice(name)
            kind, found = stored.get_dtype(), stored.get_shape()
            if found != shape or kind not in ("F64", "F32", "F16", "BF16"):
                what = f"{name} of {self.path} is {kind} {found}, not of floats {shape}"
                raise ConfigError(f"{what}; set model.embedding_key or model.lm_head_key")
            # A copy: the tensor is a view of the mapped file, whose pages the system may drop and
            # read again during training.
            return tensors.get_tensor(name).to(device, dtype, copy=True)


def load_weights(spec: TargetSpec, device: torch.device) -> TargetWeights:
    """The tensors as `HFTarget` would hold them. Raises ConfigError and RunError."""
    config, path, dtype = spec.config, spec.path, getattr(torch, spec.dtype)
    check_supported(config)
    checkpoint = Checkpoint(path, spec.revision)
    # The teacher's logits are a product without one, and no loss would show the difference.
    if checkpoint.ending(HEAD_BIASES):
        raise ConfigError(f"{path} changes its logits behind the head (a bias): not supported")
    shape = [config.vocab_size, config.hidden_size]
    embedding_name = checkpoint.find("embedding_key", spec.embedding_key, EMBEDDINGS)
    embedding = head = checkpoint.read(embedding_name, shape, device, dtype)
    # A head that is stored wins over a config that ties, as in transformers; an equal one is not
    # held twice.
    tied = any(getattr(c, "tie_word_embeddings", False) for c in (whole_config(spec), config))
    if spec.lm_head_key is not None or not tied or checkpoint.ending(HEADS):
        head_name = checkpoint.find("lm_head_key", spec.lm_head_key, HEADS)
        head = checkpoint.read(head_name, shape, device, dtype)
        if tied and torch.equal(head, embedding):
            head = embedding
    # The final norm lies beside the embedding; a `norm.weight` elsewhere may be another's.
    decoder = embedding_name.rpartition(".")[0].rpartition(".")[0]
    norms = [f"{decoder}.{name}".lstrip(".") for name in NORMS]
    norm = next((name for name in norms if name in checkpoint.files), None)
    scale = checkpoint.read(norm, [config.hidden_size], device, dtype) if norm else None
    return TargetWeights(config, embedding, head, scale, end_token_ids(spec))
