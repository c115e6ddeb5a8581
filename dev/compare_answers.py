"""How fast a target in this process answers prompts, beside transformers' own two ways.

    python dev/compare_answers.py MODEL PROMPTS [--count 128] [--batch 64] [--new-tokens 96]

MODEL is a folder or hub id, PROMPTS a file of rows that data.path takes. Contenders answer the same
prompts greedily, one after another in this process, with the threads of OMP_NUM_THREADS: `answer`
(eagle3/target/generation.py), `generate` on batches padded on the left, in the order of the rows,
and `generate_batch`, transformers' continuous batching over a paged cache. Tokens are those that
are kept: an answer up to its end. Equal answers are counted against `answer`; in half precision
other shapes of a batch round differently, and so may choose differently.
"""

import argparse
import logging
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

from eagle3.config import Model, Source
from eagle3.data.sources import find_files, read_rows
from eagle3.target.hf import HFTarget
from eagle3.target.spec import read_spec

# Of the paged cache.
PAGE, BATCH_TOKENS, MEMORY = 32, 512, 1 << 33


def read_prompts(path: str, folder: str, count: int) -> list[list[int]]:
    """The first user turns of `count` rows, through the model's template."""
    tokenizer, prompts = AutoTokenizer.from_pretrained(folder), []
    rows = read_rows(find_files(Source(path), ".cache"), None)
    for row in islice((row for row in rows if row.conversation), count):
        first = next(m for m in row.conversation.messages if m["role"] == "user")
        ids = tokenizer.apply_chat_template([first], add_generation_prompt=True)
        prompts.append(list(ids["input_ids"]))
    return prompts


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """An answer up to its end, without the padding behind it."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def answer(target: HFTarget, prompts: list, batch: int, length: int) -> list[list[int]]:
    waiting = iter(enumerate(prompts))
    found = dict(target.answer(lambda: next(waiting, None), batch, length))
    return [found[number] for number in range(len(prompts))]


def padded(target: HFTarget, prompts: list, batch: int, length: int) -> list[list[int]]:
    ends, found = sorted(target.eos_token_ids), []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        output = target.generate_padded(some, max_new_tokens=length, eos_token_id=ends)
        found += output[:, max(map(len, some)) :].tolist()
    return found


def paged(target: HFTarget, prompts: list, batch: int, length: int) -> list[list[int]]:
    ends = sorted(target.eos_token_ids)
    options = {"max_new_tokens": length, "eos_token_id": ends, "pad_token_id": ends[0]}
    pages = sum(-(-(max(map(len, prompts)) + length) // PAGE) for _ in range(batch))
    limits = {"max_batch_tokens": BATCH_TOKENS, "max_requests_per_batch": batch}
    section = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, **limits)
    model, before = target.model, target.model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    # It counts a GPU's memory only, and refuses to run where there is none.
    PagedAttentionMemoryHandler.get_available_memory = lambda handler: MEMORY
    try:
        results = model.generate_batch(prompts, GenerationConfig(**options), section)
    finally:
        model.set_attn_implementation(before)
    # Results come in the order of requests, whose names end in a number.
    numbered = sorted(results.items(), key=lambda item: int(item[0].rsplit("_", 1)[1]))
    return [result.generated_tokens for _, result in numbered]


CONTENDERS: dict[str, Callable] = {"answer": answer, "generate": padded, "generate_batch": paged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    unset = dict.fromkeys(Model.__dataclass_fields__)
    model = Model(**unset | {"path": given.model, "dtype": given.dtype, "trust_remote_code": False})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = HFTarget(read_spec(model), device)
    prompts = read_prompts(given.prompts, given.model, given.count)
    target.generate(prompts[:2], 4)  # the first call sets up kernels
    read = sum(map(len, prompts))
    title = f"{Path(given.model).name}, {model.dtype}, {torch.get_num_threads()} threads, "
    title += f"{len(prompts)} prompts of {read / len(prompts):.0f} tokens, batch {given.batch}"
    table = Table("contender", "tokens/s", "with prompts", "seconds", "equal answers", title=title)
    first = None
    for name in given.only:
        began = time.perf_counter()
        answers = CONTENDERS[name](target, prompts, given.batch, given.new_tokens)
        seconds = time.perf_counter() - began
        answers = [until_end(ids, target.eos_token_ids) for ids in answers]
        first = first or answers
        made = sum(map(len, answers))
        same = sum(one == other for one, other in zip(answers, first, strict=True))
        rates = f"{made / seconds:.0f}", f"{(made + read) / seconds:.0f}"
        table.add_row(name, *rates, f"{seconds:.1f}", f"{same} of {len(prompts)}")
    Console().print(table)


if __name__ == "__main__":
    main()
