"""`benchmark=builtin`: the reference decoder in this process, with the draft and without."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import torch

from eagle3.benchmark.request import Request, Subject, check_shape
from eagle3.benchmark.statistics import Trial
from eagle3.benchmark.suites import Setup
from eagle3.data.chat import Chat
from eagle3.decode.drafter import DRAFTERS
from eagle3.decode.speculate import Generation, Sampling, generate
from eagle3.draft.model import Draft
from eagle3.engines.engine import Answer, answer_of_rounds
from eagle3.evaluate import ratio
from eagle3.export.rules import read_draft
from eagle3.target.spec import TargetSpec

BIGRAM_CONVERSATIONS = 20_000


@dataclass(kw_only=True)
class Builtin(Request):
    """The fields are the keys of conf/benchmark/builtin.yaml."""

    in_process: ClassVar[bool] = True

    def check_draft(self, folder: Path, target: TargetSpec) -> Draft:
        # The decoder attends to caches of its own, so the draft needs none of the backends.
        draft = read_draft(folder, None, target)
        check_shape(self.configs, draft.config)
        return draft

    def start(self, subject: Subject, run_dir: Path) -> dict[str, Any]:
        draft = self.check_draft(subject.draft_folder, subject.target.spec)
        self.draft = draft.to(subject.target.device).eval()
        self.target = subject.target.load()
        self.target.check_decoding()
        self.chat, self.seed, self.rules = subject.chat, subject.seed, {}
        self.costless = {"prompt_lookup": prompt_lookup}
        if subject.prepared is not None:
            count = min(len(subject.prepared), BIGRAM_CONVERSATIONS)
            texts = (subject.prepared.document(i).input_ids for i in range(count))
            successors = bigram_table(texts, len(self.target.embedding)).tolist()
            self.costless["bigram"] = partial(bigram, successors)
        dtype = str(self.target.embedding.dtype).removeprefix("torch.")
        return {"runner": "builtin", "dtype": dtype, "threads": torch.get_num_threads()}

    def open(self, config: list[int]) -> None:
        # One generator for all questions: were each seeded alike, all would have the same luck and
        # intervals be too narrow.
        generator = torch.Generator(self.target.embedding.device).manual_seed(self.seed)
        self.rules[tuple(config)] = Sampling(self.temperature, generator)

    def answer(self, config: list[int], prompts: list[list[int]], setup: Setup) -> list[Answer]:
        batch, steps, *_ = config
        longest, rule = setup.max_new_tokens, self.rules[tuple(config)]
        ids = [torch.tensor(prompt, device=self.target.embedding.device) for prompt in prompts]
        generations = []
        for start in range(0, len(ids), batch):
            some = ids[start : start + batch]
            drafter = None
            if steps:
                kind = DRAFTERS[type(self.draft)]
                drafter = kind(self.draft, self.target, some, longest, config[1:])
            generations += generate(self.target, some, longest, rule, drafter, self.count)
        ends = self.target.eos_token_ids
        return [read(generation, steps, setup, self.chat, ends) for generation in generations]

    def extra_columns(self, drafted: list[Trial], baseline: list[Trial], steps: int) -> dict:
        """What drafts without a model would have reached, and how close unequal answers were."""
        columns = {}
        turns = [turn for trial in baseline for turn in zip(trial.prompts, trial.ids, strict=True)]
        for name, draft in self.costless.items():
            emitted = [count for turn in turns for count in acceptance_of(draft, *turn, steps)]
            columns[name] = ratio(sum(emitted), len(emitted))
        return columns | (ties(self.target, drafted, baseline) if self.temperature == 0 else {})


def read(generation: Generation, steps: int, setup: Setup, chat: Chat, ends: set[int]) -> Answer:
    """The answer, ended at the first token that completes a text of the setup's `stop`."""
    ids, seconds, stop = generation.ids, generation.decode_seconds, setup.stop
    for length in range(1, len(ids)) if stop else ():
        text = chat.decode(ids[:length])
        if any(end in text for end in stop):
            ids = ids[:length]
            break
    whole = chat.decode(ids)
    text = min((whole.partition(end)[0] for end in stop), key=len, default=whole)
    # What ends an answer may come as the last token that fits.
    truncated = len(ids) == setup.max_new_tokens and ids[-1] not in ends and text == whole
    answer = answer_of_rounds(ids, text, generation.accepted, steps, seconds, truncated)
    # Rounds behind the end took time as well, which is not the answer's.
    answer.seconds *= answer.rounds / max(len(generation.emitted), 1)
    return answer


def ties(target, drafted: list[Trial], baseline: list[Trial]) -> dict:
    """`lossless` is "tie", and `tie_gap` the widest, where answers differ after near ties only."""
    pairs = zip(drafted, baseline, strict=True)
    gaps = [gap(target, one, other) for one, other in pairs if one.ids != other.ids]
    if not gaps or None in gaps:
        return {}
    # Half-precision logits of equal inputs differ by a rounding or two between shapes.
    near = max(1e-4, 2 * torch.finfo(target.embedding.dtype).eps)
    return {"lossless": "tie" if max(gaps) < near else False, "tie_gap": max(gaps)}


@torch.inference_mode()
def gap(target, drafted: Trial, baseline: Trial) -> float | None:
    """Where answers part: best less lower logit by the largest absolute; None if one goes on."""
    turn = [one != other for one, other in zip(drafted.ids, baseline.ids, strict=True)].index(True)
    pairs = list(zip(baseline.ids[turn], drafted.ids[turn], strict=False))
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return None
    # Up to there both are the same text, so that the target is asked once.
    text = baseline.prompts[turn] + baseline.ids[turn][:place]
    ids = torch.tensor(text, device=target.embedding.device)
    _, last = target.states(ids, torch.arange(len(ids), device=ids.device))
    logits = target.lm_head(last[-1:])[0].float()
    return float((logits.max() - logits[list(pairs[place])].min()) / logits.abs().max())


def bigram_table(conversations: Iterable[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """int64 [V]: each token's most frequent successor (the smallest id of these), -1 for none."""
    pairs = torch.cat([ids[:-1].long() * vocab_size + ids[1:] for ids in conversations])
    pairs, counts = pairs.unique(return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    # One number that orders by count, and of equal counts puts the smaller id first.
    rank = counts * vocab_size + (vocab_size - 1 - second)
    best = torch.full((vocab_size,), -1).scatter_reduce(0, first, rank, "amax")
    return torch.where(best < 0, -1, vocab_size - 1 - best % vocab_size)


def bigram(successors: list[int], text: list[int], draft_length: int) -> list[int]:
    """A chain of most frequent successors, ended by a token that has none."""
    drafted = text[-1:]
    while len(drafted) <= draft_length and successors[drafted[-1]] >= 0:
        drafted.append(successors[drafted[-1]])
    return drafted[1:]


def prompt_lookup(text: list[int], draft_length: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest n-gram, 3 to 1, at the end."""
    for length in (3, 2, 1):
        for end in range(len(text) - 1, length - 1, -1):
            # Most places fail at the first token, which is cheaper than a slice.
            if text[end - 1] == text[-1] and text[end - length : end] == text[-length:]:
                return text[end : end + draft_length]
    return []


def acceptance_of(draft: Callable, prompt: list[int], answer: list[int], steps: int) -> list[int]:
    """Tokens that each round commits if `draft(text, steps)` drafts for a greedy target."""
    # As in decoding, the first token of the answer comes from the prefill.
    text, left, emitted = prompt + answer[:1], answer[1:], []
    while left:
        pairs = zip(draft(text, steps), left, strict=False)
        same = list(takewhile(lambda pair: pair[0] == pair[1], pairs))
        # A round commits one more, the target's own; the last one what is left.
        emitted.append(min(len(same) + 1, len(left)))
        text, left = text + left[: emitted[-1]], left[emitted[-1] :]
    return emitted
