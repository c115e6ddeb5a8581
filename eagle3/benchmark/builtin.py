"""The benchmark without an engine: `eagle3.decode` at batch 1, beside the same loop without a draft.

P prompts of a suite, R resamples of them.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import track

from eagle3.benchmark.baselines import acceptance_of, bigram, bigram_table, prompt_lookup
from eagle3.benchmark.suites import Prompt, load
from eagle3.decode import Generation, generate, speculate
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError
from eagle3.loops import is_loop

RESAMPLES = 2000
WARM_UP_TOKENS = 8
BIGRAM_CONVERSATIONS = 20_000
TIMING = "decode only, prompt excluded; per prompt the target alone and with the draft in turn, after a warm-up"


@dataclass
class Trial:
    """One prompt under one config: what the target answers alone and with the draft."""

    prompt: Prompt
    alone: Generation
    drafted: Generation


def draft_length(config: list[int]) -> int:
    """Steps of [batch, steps, topk, verify_tokens]; raises ConfigError where only an engine can run it."""
    if config == [1, 0, 0, 0] or (len(config) == 4 and config[1] > 0 and config == [1, config[1], 1, config[1] + 1]):
        return config[1]
    raise ConfigError(
        f"benchmark.configs={config} is not for the built-in benchmark, which takes chains [1, steps, 1, steps + 1] "
        "and the target alone [1, 0, 0, 0]; batches and trees need an engine, such as benchmark=sglang"
    )


def run(
    job,
    draft: Draft,
    configs: list[list[int]],
    suites: list[str],
    max_new_tokens: int,
    temperature: float,
    system_prompt: str | None = None,
) -> dict:
    """The stage `benchmark` of `job`, an `eagle3.pipeline.Run`: writes benchmark.json and returns what it holds."""
    configs, suites = [list(config) for config in configs], list(suites)
    for config in configs:
        draft_length(config)
    # what `prepare` holds out is tokenised with data.system_prompt; another one needs the conversations
    heldout = job.prepared_path / "heldout.jsonl" if system_prompt is None else job.config.data.eval_path
    if heldout is None:
        raise ConfigError("benchmark.system_prompt needs data.eval_path; set it, or data.system_prompt instead")
    prompts = load(suites, job.chat, str(heldout), system_prompt)
    sampled = range(min(len(job.prepared), BIGRAM_CONVERSATIONS))
    successors = bigram_table((job.prepared.document(i)[1] for i in sampled), len(job.target.embedding))
    result = benchmark(
        job.target,
        draft,
        prompts,
        configs,
        max_new_tokens,
        temperature,
        successors,
        seed=job.config.seed,
        progress=partial(track, description="benchmark", transient=True),
    )
    asked = {"suites": suites, "system_prompt": system_prompt or job.config.data.system_prompt}
    result["protocol"] = asked | result["protocol"]
    path = job.run_dir / "benchmark.json"
    path.with_suffix(".partial").write_text(json.dumps(result, indent=1, allow_nan=False))
    os.replace(path.with_suffix(".partial"), path)
    return result


def benchmark(
    target,
    draft: Draft,
    prompts: list[Prompt],
    configs: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    successors: torch.Tensor | None = None,
    seed: int = 0,
    progress: Callable[[list[Prompt]], Iterable[Prompt]] = iter,
) -> dict:
    """For every suite a row per config, and the protocol.

    `successors` int64 [V] is the `bigram_table` of the training text, if there is one. `progress` wraps the
    prompts, as a progress bar does.
    """
    lengths = [draft_length(config) for config in configs]
    answer = partial(decode, target, draft, temperature, seed)
    measured = list(measure(answer, progress(prompts), lengths, max_new_tokens))
    drafts = {"prompt_lookup": prompt_lookup}
    if successors is not None:
        drafts["bigram"] = partial(bigram, successors.tolist())
    tables = {}
    for suite in dict.fromkeys(prompt.suite for prompt in prompts):
        tables[suite] = []
        for config, trials in zip(configs, zip(*measured, strict=True), strict=True):
            chosen = [trial for trial in trials if trial.prompt.suite == suite]
            row = {"config": config, "num_prompts": len(chosen)}
            row |= acceptance(chosen, config[1], seed) | speed(chosen, seed)
            row |= {name: simulated(draft_at, chosen, config[1]) for name, draft_at in drafts.items()}
            row |= losslessness(target, chosen) if temperature == 0 else {"lossless": None}
            tables[suite].append(row)
    protocol = {
        "runner": "builtin",
        "drafting": "chain",
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "device": device_name(target.embedding.device),
        "dtype": str(target.embedding.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "timing": TIMING,
    }
    return {"suites": tables, "protocol": protocol}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def decode(
    target, draft: Draft, temperature: float, seed: int, input_ids: torch.Tensor, steps: int, max_new_tokens: int
) -> Generation:
    """One answer; `steps` 0 is the target alone."""
    input_ids = input_ids.to(target.embedding.device)
    generator = torch.Generator(input_ids.device).manual_seed(seed)
    if steps == 0:
        return generate(target, input_ids, max_new_tokens, temperature, generator)
    return speculate(target, draft, input_ids, steps, max_new_tokens, temperature, generator)


def measure(
    answer: Callable[[torch.Tensor, int, int], Generation],
    prompts: Iterable[Prompt],
    lengths: list[int],
    max_new_tokens: int,
) -> Iterator[list[Trial]]:
    """For each prompt a trial per draft length.

    The order of the runs turns round from prompt to prompt, so that a machine that grows slower favours none.
    """
    runs = [0, *lengths]
    for number, prompt in enumerate(prompts):
        if number == 0:
            for steps in runs:
                answer(prompt.input_ids, steps, min(WARM_UP_TOKENS, max_new_tokens))
        order = list(range(len(runs)))[:: 1 if number % 2 == 0 else -1]
        generations = {i: answer(prompt.input_ids, runs[i], max_new_tokens) for i in order}
        yield [Trial(prompt, generations[0], generations[i + 1]) for i in range(len(lengths))]


def acceptance(trials: list[Trial], steps: int, seed: int) -> dict:
    """Acceptance length in all its forms; None where there was no round.

    `accepted_by_position`: share of rounds in which the draft at position 1..steps was accepted.
    """
    generations = [trial.drafted for trial in trials]
    emitted, rounds = totals([[sum(g.emitted), len(g.emitted)] for g in generations])
    accepted = [count for g in generations for count in g.accepted]
    first = [g.emitted[0] for g in generations if g.emitted]
    free = [g for g in generations if not is_loop(g.ids)]
    return {
        "acceptance_length": ratio(emitted.sum(), rounds.sum()),
        "interval95": interval95(lambda picked: emitted[picked].sum(1) / rounds[picked].sum(1), len(trials), seed),
        "acceptance_length_loop_free": ratio(sum(sum(g.emitted) for g in free), sum(len(g.emitted) for g in free)),
        "loops": len(generations) - len(free),
        "first_round": ratio(sum(first), len(first)),
        "accepted_by_position": [ratio(sum(a >= i for a in accepted), len(accepted)) for i in range(1, steps + 1)],
    }


def speed(trials: list[Trial], seed: int) -> dict:
    """Tokens per second of decoding (the first token belongs to the prompt) with the draft and without it."""
    tokens, seconds = totals([[len(t.drafted.ids) - 1, t.drafted.decode_seconds] for t in trials])
    alone_tokens, alone_seconds = totals([[len(t.alone.ids) - 1, t.alone.decode_seconds] for t in trials])

    def speedup(picked: torch.Tensor) -> torch.Tensor:
        with_draft = tokens[picked].sum(1) / seconds[picked].sum(1)
        return with_draft * alone_seconds[picked].sum(1) / alone_tokens[picked].sum(1)

    with_draft, alone = ratio(tokens.sum(), seconds.sum()), ratio(alone_tokens.sum(), alone_seconds.sum())
    return {
        "tokens_per_second": with_draft,
        "baseline_tokens_per_second": alone,
        "speedup": ratio(with_draft, alone),
        "speedup_interval95": interval95(speedup, len(trials), seed),
    }


def simulated(drafts_at: Callable[[list[int], int], list[int]], trials: list[Trial], steps: int) -> float | None:
    """Acceptance length of a draft without a model, on what the target answers alone."""
    walks = [acceptance_of(drafts_at, t.prompt.input_ids.tolist(), t.alone.ids, steps) for t in trials]
    return ratio(sum(map(sum, walks)), sum(map(len, walks)))


def losslessness(target, trials: list[Trial]) -> dict:
    """`lossless`: True; False; or "tie" if answers differ only after near ties, `tie_gap` being the widest."""
    gaps = [first_difference(target, t) for t in trials if t.drafted.ids != t.alone.ids]
    if not gaps:
        return {"lossless": True}
    # half-precision logits of equal inputs differ by a rounding or two between shapes
    near = max(1e-4, 2 * torch.finfo(target.embedding.dtype).eps)
    return {"lossless": "tie" if max(gaps) < near else False, "tie_gap": max(gaps)}


@torch.inference_mode()
def first_difference(target, trial: Trial) -> float:
    """The first tokens that differ: how far the lower one lies below the target's best, relative to its largest
    absolute logit."""
    pairs = zip(trial.alone.ids, trial.drafted.ids, strict=False)
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return float("inf")
    text = torch.cat([trial.prompt.input_ids, torch.tensor(trial.alone.ids[:place], dtype=torch.long)])
    text = text.to(target.embedding.device)
    _, last = target.states(text, torch.arange(len(text), device=text.device))
    logits = target.lm_head(last[-1:])[0].float()
    tokens = [trial.alone.ids[place], trial.drafted.ids[place]]
    return float((logits.max() - logits[tokens].min()) / logits.abs().max())


def totals(rows: list[list[float]]) -> torch.Tensor:
    """P rows of n numbers -> float64 [n,P]."""
    return torch.tensor(rows, dtype=torch.float64).T


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return float(numerator / denominator) if denominator else None


def interval95(statistic: Callable[[torch.Tensor], torch.Tensor], prompts: int, seed: int) -> list[float] | None:
    """Bootstrap over prompts: `statistic` of int64 [R,P], the prompts of every resample -> [R]."""
    picked = torch.randint(prompts, (RESAMPLES, prompts), generator=torch.Generator().manual_seed(seed))
    values = statistic(picked)
    values = values[values.isfinite()]
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist() if len(values) else None
