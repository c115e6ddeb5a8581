"""The benchmark without an engine: `eagle3.decode.speculate`, with the draft and without it in
turn.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import torch

from eagle3.benchmark import measure
from eagle3.benchmark.baselines import acceptance_of, bigram, bigram_table, prompt_lookup
from eagle3.benchmark.statistics import Answer, Trial, ratio
from eagle3.data.chat import Chat
from eagle3.decode.speculate import Generation, generate, speculate
from eagle3.draft.model import Draft

BIGRAM_CONVERSATIONS = 20_000


def run(
    job,
    configs: list[list[int]],
    suites: list[str],
    max_new_tokens: int | None,
    temperature: float,
    system_prompt: str | None = None,
    protocol: str = "chat",
    execute_code: bool = False,
    paths: dict[str, str] | None = None,
) -> dict:
    """The stage `benchmark` of `job`, an `eagle3.pipeline.Run`: writes benchmark.json and returns
    what it holds.
    """
    draft = job.read_draft()
    sampled = range(min(len(job.prepared), BIGRAM_CONVERSATIONS))
    successors = bigram_table(
        (job.prepared.document(i)[1] for i in sampled), len(job.target.embedding)
    )
    drafts = {"prompt_lookup": prompt_lookup, "bigram": partial(bigram, successors.tolist())}

    def further(drafted: list[Trial], alone: list[Trial], steps: int) -> dict:
        found = {name: simulated(draft_at, alone, steps) for name, draft_at in drafts.items()}
        return found | (ties(job.target, drafted, alone) if temperature == 0 else {})

    facts = {
        "runner": "builtin",
        "dtype": str(job.target.embedding.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return measure.run(
        job,
        lambda config: Decoder(job.target, draft, config, temperature, job.config.seed, job.chat),
        configs,
        suites,
        max_new_tokens,
        temperature,
        system_prompt,
        protocol,
        execute_code,
        paths,
        facts,
        together=True,
        further=further,
    )


@dataclass
class Decoder:
    """An engine of `eagle3.benchmark.measure` in this process, at `config` [batch, steps, topk,
    verify_tokens].
    """

    target: object
    draft: Draft
    config: list[int]
    temperature: float
    seed: int
    chat: Chat

    def answer(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[Answer]:
        """One answer per prompt, `batch` at a time."""
        batch, answers = self.config[0], []
        for i in range(0, len(prompts), batch):
            for generation in self.decode(
                [torch.tensor(p) for p in prompts[i : i + batch]], max_new_tokens
            ):
                answers.append(
                    self.read(cut(generation, stop, self.chat) if stop else generation, stop)
                )
        return answers

    def decode(self, prompts: list[torch.Tensor], max_new_tokens: int) -> list[Generation]:
        _, steps, topk, verify_tokens = self.config
        prompts = [prompt.to(self.target.embedding.device) for prompt in prompts]
        if steps == 0:
            return generate(self.target, prompts, max_new_tokens, self.temperature, self.generator)
        tree = steps, topk, verify_tokens
        return speculate(
            self.target,
            self.draft,
            prompts,
            *tree,
            max_new_tokens,
            self.temperature,
            self.generator,
        )

    @cached_property
    def generator(self) -> torch.Generator:
        """One for all questions: were each seeded alike, all would share their luck and intervals
        be too narrow.
        """
        return torch.Generator(self.target.embedding.device).manual_seed(self.seed)

    def read(self, generation: Generation, stop: tuple[str, ...]) -> Answer:
        steps, accepted, text = (
            self.config[1],
            generation.accepted,
            self.chat.decode(generation.ids),
        )
        return Answer(
            generation.ids,
            len(generation.emitted),
            [sum(count > k for count in accepted) for k in range(steps)],
            generation.decode_seconds,
            min((text.partition(end)[0] for end in stop), key=len, default=text),
            generation.emitted,
        )

    def close(self) -> None:
        """The target stays with the job."""


def cut(generation: Generation, stop: tuple[str, ...], chat: Chat) -> Generation:
    """A generation as if it had ended at the first token that completes a text of `stop`; its
    seconds in proportion to the rounds that are left.
    """
    ids, emitted = generation.ids, generation.emitted
    ends = (n for n in range(1, len(ids)) if any(text in chat.decode(ids[:n]) for text in stop))
    length = next(ends, len(ids))
    rounds = next(
        (n for n in range(len(emitted) + 1) if 1 + sum(emitted[:n]) >= length), len(emitted)
    )
    kept = emitted[:rounds]
    if rounds:
        kept[-1] -= 1 + sum(kept) - length
    accepted = [
        min(count, tokens) for count, tokens in zip(generation.accepted[:rounds], kept, strict=True)
    ]
    seconds = generation.decode_seconds * rounds / max(1, len(emitted))
    return Generation(ids[:length], kept, accepted, generation.prefill_seconds, seconds)


def simulated(draft_at, trials: list[Trial], steps: int) -> float | None:
    """Acceptance length of a draft without a model, on what the target answers alone."""
    walks = [
        acceptance_of(draft_at, prompt, answer.ids, steps)
        for trial in trials
        for prompt, answer in zip(trial.prompts, trial.answers, strict=True)
    ]
    return ratio(sum(map(sum, walks)), sum(map(len, walks)))


def ties(target, drafted: list[Trial], alone: list[Trial]) -> dict:
    """Where answers differ: `lossless` is "tie" if they do so only after near ties, `tie_gap` being
    the widest.
    """
    gaps = [
        gap(target, *pair)
        for pair in zip(drafted, alone, strict=True)
        if pair[0].ids != pair[1].ids
    ]
    if not gaps or None in gaps:
        return {}
    # half-precision logits of equal inputs differ by a rounding or two between shapes
    near = max(1e-4, 2 * torch.finfo(target.embedding.dtype).eps)
    return {"lossless": "tie" if max(gaps) < near else False, "tie_gap": max(gaps)}


@torch.inference_mode()
def gap(target, drafted: Trial, alone: Trial) -> float | None:
    """The first tokens that differ: how far the lower one lies below the target's best, relative to
    its largest absolute logit; None where one answer only goes on behind the other.
    """
    turn = next(
        i for i, (one, other) in enumerate(zip(drafted.ids, alone.ids, strict=True)) if one != other
    )
    pairs = list(zip(alone.ids[turn], drafted.ids[turn], strict=False))
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return None
    text = torch.tensor(
        alone.prompts[turn] + alone.ids[turn][:place], device=target.embedding.device
    )
    _, last = target.states(text, torch.arange(len(text), device=text.device))
    logits = target.lm_head(last[-1:])[0].float()
    return float((logits.max() - logits[list(pairs[place])].min()) / logits.abs().max())


run.in_process, run.check_settings = True, lambda section: None
