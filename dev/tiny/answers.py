"""The target's own answers: training conversations, held-out questions, and how well it does."""

import random
import re
from collections import Counter, defaultdict

import torch
from rich.progress import track
from torch import multiprocessing
from transformers import AutoModelForCausalLM, DynamicCache

from dev.tiny.train import PROCESSES, SEED, write_rows
from eagle3.engines.engine import is_loop

TEMPERATURES = [(0.0, 0.40), (0.7, 0.35), (1.0, 0.25)]  # and the share of the conversations
CONVERSATIONS = 5000  # asked for; about 570,000 tokens are left
# Asked for code of its own the target loops or garbles names (10 of 26 such answers loop, 5 of the
# other 118).
TOO_HARD = {"write", "skeleton", "rename", "hints"}
MAX_NEW_TOKENS = 192
EVAL_PROMPTS = 144
EVAL_PROMPT_TOKENS = 250
EVAL_NEW_TOKENS = 128
BATCH = 96
NAME = re.compile(r"[A-Za-z_]\w{2,}")


def draw(logits, temperatures, generator):
    """One token a row [B], the most probable one where the temperature is 0."""
    greedy = logits.argmax(-1)
    scaled = logits / temperatures.clamp(min=0.01)[:, None]
    drawn = torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
    return torch.where(temperatures > 0, drawn, greedy)


@torch.no_grad()
def generate(model, prompts, temperatures, max_new_tokens, generator):
    """Prompts (lists of ids) -> answers with their end-of-turn token, if they came to it within
    `max_new_tokens`.
    """
    eot, width = model.config.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    temperatures = torch.tensor(temperatures)
    answers, alive, cache = [[] for _ in prompts], list(range(len(prompts))), DynamicCache()
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = draw(logits, temperatures, generator)[:, None]
        for row, token in zip(alive, ids[:, 0].tolist(), strict=True):
            answers[row].append(token)
        unfinished = [i for i, row in enumerate(alive) if answers[row][-1] != eot]
        if not unfinished:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if len(unfinished) < len(alive):  # finished rows leave the batch
            kept = torch.tensor(unfinished)
            alive = [alive[i] for i in unfinished]
            ids, mask, temperatures = ids[kept], mask[kept], temperatures[kept]
            cache.batch_select_indices(kept)
    return answers


def load(folder):
    """Gives a process of the pool its copy of the target."""
    global model
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answer_batch(job):
    """(prompts, temperatures, max_new_tokens, seed) -> answers; runs in the pool."""
    *arguments, seed = job
    return generate(model, *arguments, torch.Generator().manual_seed(seed))


def answer_all(pool, tokenizer, dialogues, temperatures, expected, max_new_tokens, what):
    """Messages that end in a user turn -> answers (ids). `expected`: likely lengths, so that a
    batch ends together.
    """
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in dialogues
    ]
    order = sorted(range(len(prompts)), key=lambda i: (expected[i] // 60, len(prompts[i])))
    starts = reversed(
        range(0, len(order), BATCH)
    )  # the long answers first, so that no process waits at the end
    batches = [order[start : start + BATCH] for start in starts]
    jobs = [
        (
            [prompts[i] for i in batch],
            [temperatures[i] for i in batch],
            max_new_tokens,
            SEED + number,
        )
        for number, batch in enumerate(batches)
    ]
    answers = [None] * len(prompts)
    for batch, made in zip(
        batches, track(pool.imap(answer_batch, jobs), what, len(jobs)), strict=True
    ):
        for i, answer in zip(batch, made, strict=True):
            answers[i] = answer
    return answers


def converse(pool, tokenizer, rows, temperatures, turns, what):
    """Lets the target answer the first `turns` questions of the rows (those that have fewer: all of
    theirs).

    -> [messages, or None where an answer loops or does not end by itself]
    """
    eot, dialogues = tokenizer.eos_token_id, [[] for _ in rows]
    for turn in range(turns):
        asked = [
            i
            for i, row in enumerate(rows)
            if dialogues[i] is not None and len(row["messages"]) > 2 * turn
        ]
        questions = [dialogues[i] + [rows[i]["messages"][2 * turn]] for i in asked]
        expected = [len(rows[i]["messages"][2 * turn + 1]["content"]) for i in asked]
        chosen = [temperatures[i] for i in asked]
        answers = answer_all(
            pool, tokenizer, questions, chosen, expected, MAX_NEW_TOKENS, f"{what}, turn {turn + 1}"
        )
        for i, question, ids in zip(asked, questions, answers, strict=True):
            text = tokenizer.decode(ids[:-1])
            # a special token in the text, or blanks at its ends, would not survive the chat
            # template
            fine = (
                ids[-1] == eot
                and not is_loop(ids)
                and text
                and text == text.strip()
                and "<|" not in text
            )
            dialogues[i] = [*question, {"role": "assistant", "content": text}] if fine else None
    return dialogues


def training_answers(pool, tokenizer, rows, count):
    """-> rows of conversations.jsonl in random order."""
    pick = random.Random(SEED)
    rows = pick.sample(rows, min(count, len(rows)))
    kinds, shares = zip(*TEMPERATURES, strict=True)
    temperatures = pick.choices(kinds, shares, k=len(rows))
    dialogues = converse(pool, tokenizer, rows, temperatures, 2, "training answers")
    return [
        {"id": row["id"], "messages": messages, "temperature": temperature}
        for row, messages, temperature in zip(rows, dialogues, temperatures, strict=True)
        if messages and row["kind"] not in TOO_HARD
    ]


def eval_prompts(pool, tokenizer, rows):
    """-> (rows of eval.jsonl, their reference answers): the kinds take turns, so any first N are a
    fair mix.
    """
    random.Random(SEED).shuffle(rows)
    firsts = converse(
        pool,
        tokenizer,
        [r | {"messages": r["messages"][:-2]} for r in rows],
        [0.0] * len(rows),
        1,
        "eval",
    )
    by_kind = defaultdict(list)
    for row, first in zip(rows, firsts, strict=True):
        if first is None:
            continue
        messages = [*first, row["messages"][-2]]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) <= EVAL_PROMPT_TOKENS:
            made = {
                "id": row["id"],
                "module": row["module"],
                "kind": row["kind"],
                "messages": messages,
            }
            by_kind[row["kind"]].append((made, row["messages"][-1]["content"]))
    turns = sorted((n, kind) for kind, entries in by_kind.items() for n in range(len(entries)))
    return [by_kind[kind][n] for n, kind in turns[:EVAL_PROMPTS] if kind not in TOO_HARD]


def report(pool, tokenizer, rows, references):
    """Prints, of the greedy answers to `rows`: how many loop, end, and copy the names of the
    prompt.
    """
    expected = [len(r) for r in references]
    answers = answer_all(
        pool,
        tokenizer,
        [r["messages"] for r in rows],
        [0.0] * len(rows),
        expected,
        EVAL_NEW_TOKENS,
        "measuring",
    )
    total = Counter()
    for row, reference, ids in zip(rows, references, answers, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        asked = set(NAME.findall(row["messages"][-1]["content"]))
        wanted = asked & {
            name
            for code in re.findall(r"`([^`\n]+)`|def (.+)", reference)
            for name in NAME.findall(code[0] or code[1])
        }
        total["loops"] += is_loop(ids)
        total["ends"] += ids[-1] == tokenizer.eos_token_id
        total["exact"] += text.strip() == reference.strip()
        total["wanted"] += len(wanted)
        total["copied"] += sum(bool(re.search(rf"\b{re.escape(name)}\b", text)) for name in wanted)
        total["tokens"] += len(ids)
    n = len(rows)
    print(
        f"{n} held-out prompts, greedy, at most {EVAL_NEW_TOKENS} tokens: {total['loops'] / n:.1%} loop, "
        f"{total['ends'] / n:.1%} end, {total['exact'] / n:.1%} equal the reference, "
        f"mean length {total['tokens'] / n:.0f} tokens, "
        f"{total['copied'] / total['wanted']:.1%} of the {total['wanted']} names copied"
    )


def make_answers(tokenizer, training, held_out, out, count=CONVERSATIONS):
    """Writes conversations.jsonl and eval.jsonl under `out` with the target that stands there."""
    with multiprocessing.get_context("spawn").Pool(PROCESSES, load, (out / "target",)) as pool:
        pairs = eval_prompts(pool, tokenizer, held_out)
        write_rows(out / "eval.jsonl", [row for row, _ in pairs])
        report(pool, tokenizer, [row for row, _ in pairs], [reference for _, reference in pairs])
        rows = training_answers(pool, tokenizer, training, count)
    write_rows(out / "conversations.jsonl", rows)
    sizes = [len(tokenizer.apply_chat_template(r["messages"], return_dict=False)) for r in rows]
    print(
        f"{len(rows)} of {min(count, len(training))} conversations kept, {sum(sizes)} tokens, longest {max(sizes)}"
    )
    print("at temperature", dict(Counter(r["temperature"] for r in rows)))
