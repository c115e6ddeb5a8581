"""The work that is simulated and measured alike: a run's own trainer and target at a model's sizes,
with weights, documents and hidden states made up.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from eagle3.batch import Document, Features, empty_on_host
from eagle3.config import CONF, RunConfig
from eagle3.data.vocab import complete_section
from eagle3.draft.model import Draft
from eagle3.parallel.ranks import Ranks
from eagle3.target.hf import HFTarget
from eagle3.target.spec import TargetSpec, read_spec
from eagle3.train import Trainer, build_draft, build_trainer

LLAMA = Path(__file__).with_name("llama3-8b")


@dataclass
class Work:
    """A micro-batch of `tokens` in documents of `length`, of whose tokens `supervised` are answers,
    two to a document; `stored`: its hidden states are there already.
    """

    model: Path = LLAMA  # a folder with a config.json
    tokens: int = 16384
    length: int = 2048
    supervised: float = 0.6
    stored: bool = True
    overrides: list[str] = field(default_factory=list)  # of a run

    @property
    def count(self) -> int:
        return self.tokens // self.length

    def config(self) -> tuple[RunConfig, TargetSpec]:
        given = ["name=x", "model=hf", f"model.path={self.model}", "mode=offline"]
        given += [f"train.tokens_per_step={self.tokens}", "draft.mask_token_id=0", *self.overrides]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_object(compose("run", given))
        spec = read_spec(config.model)
        return replace(config, draft=complete_section(config.draft, spec)), spec


class Documents:
    """Those of some work, as a Supply has them. Hidden states lie side by side on the host, as a
    store reads them; `random` gives them values.
    """

    def __init__(self, work: Work, config: RunConfig, spec: TargetSpec, random: bool):
        size, vocab_size = spec.config.hidden_size, config.draft.vocab_size
        self.every = torch.ones(spec.config.vocab_size, dtype=torch.bool)
        self.work, self.mask = work, torch.zeros(work.length, dtype=torch.bool)
        answer = round(work.length * work.supervised / 2)
        for end in (work.length // 2, work.length):
            self.mask[end - answer : end] = True
        self.ids = torch.randint(vocab_size, (work.length,), dtype=torch.int32)
        self.lengths = np.full(64 * work.count, work.length)
        self.supervised = np.full(64 * work.count, int(self.mask.sum()))
        self.prepared, self.features = SimpleNamespace(vocab=np.arange(vocab_size)), None
        self.teachers = int(self.mask[0]) + int((self.mask[1:] | self.mask[:-1]).sum())
        if work.stored:
            shapes = (work.length, spec.aux_size), (self.teachers, size)
            self.states = [empty_on_host(work.count * n, (w,), torch.bfloat16) for n, w in shapes]
            for states, shape in zip(self.states, shapes) if random else ():
                states.view(work.count, *shape)[:] = torch.randn(shape)

    def begin(self, epoch: int) -> None: ...

    def load(self, numbers: list[int]) -> list[Document]:
        documents = []
        for place, number in enumerate(numbers):
            features = None
            if self.work.stored:
                counts = self.work.length, self.teachers
                spans = [slice(place * n, (place + 1) * n) for n in counts]
                states = (x[span] for x, span in zip(self.states, spans))
                argmax = torch.zeros(self.teachers, dtype=torch.long)
                features = Features(*states, argmax, torch.zeros(self.teachers))
            documents.append(Document(number, self.ids, self.mask, features))
        return documents


def make_target(config: RunConfig, spec: TargetSpec, device: torch.device, kind=HFTarget):
    """The target with the weights that transformers gives a new model."""

    def new(path, dtype, **others):
        with device:
            return AutoModelForCausalLM.from_config(spec.config, dtype=getattr(torch, dtype))

    settings = {name: value for name, value in config.target.items() if not name.startswith("_")}
    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", new):
        return kind(spec, device, **settings)


def make_trainer(
    config: RunConfig, spec: TargetSpec, documents: Documents, target, device: torch.device
) -> Trainer:
    vocab_size, size, dtype = spec.config.vocab_size, spec.config.hidden_size, spec.dtype

    def vocab_tensors(vocab: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(count) < len(vocab), torch.zeros(len(vocab), dtype=torch.long)

    def draft_on_device(*given) -> Draft:
        with device, mock.patch("eagle3.train.vocab_tensors", vocab_tensors):
            return build_draft(*given)

    def load_weights() -> SimpleNamespace:
        kind = {"dtype": getattr(torch, dtype), "device": device}
        embedding, head = (torch.randn(vocab_size, size, **kind) / 50 for _ in range(2))
        return SimpleNamespace(embedding=embedding, head=head)

    handle = SimpleNamespace(spec=spec, device=device, load_weights=load_weights)
    if target is not None:
        handle.load_weights, documents.features = (lambda: target), target
    with mock.patch("eagle3.train.build_draft", draft_on_device):
        trainer = build_trainer(config, handle, documents, None, Ranks())
    # Batches are packed of tensors with data, even where the trainer has none.
    packed = trainer.loader.pack_documents
    trainer.loader.pack_documents = partial(packed, in_draft_vocab=documents.every)
    return trainer
