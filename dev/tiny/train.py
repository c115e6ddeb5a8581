"""Trains the tiny target: a Llama of 7.9 M weights on the conversations, resumable, on a CPU."""

import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress
from torch import distributed, multiprocessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from dev.tiny.tokenizer import VOCAB_SIZE, encode, save_tokenizer

SEED = 0
PROMPT_WEIGHT = 0.3  # of a prompt token's loss, an answer token counting 1
MAX_TOKENS = 420  # longer conversations are left out
BATCH_TOKENS = 3072  # of a step, padding included
SAVE_EVERY = 180  # seconds
PROCESSES = 2


def new_model(tokenizer):
    """The untrained target; 10 layers, so that three auxiliary layers lie well apart."""
    torch.manual_seed(SEED)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=640,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        **{f"{name}_token_id": number for name, number in ids.items()},
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, **{f"{n}_token_id": i for n, i in ids.items()}
    )
    return model


def encode_rows(tokenizer, rows):
    """-> [(input_ids, loss weights)] of the conversations that are short enough."""
    encoded = [encode(tokenizer, row["messages"]) for row in rows]
    return [
        (ids, [m or PROMPT_WEIGHT for m in mask]) for ids, mask in encoded if len(ids) <= MAX_TOKENS
    ]


def batches(rows, epoch):
    """Batches of rows (numbers) of similar length in random order; causal attention ignores padding
    on the right.
    """
    shuffle = random.Random(f"{SEED}:{epoch}")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + 12 * shuffle.random())
    made, batch = [], []
    for i in order:
        if (len(batch) + 1) * len(rows[i][0]) > BATCH_TOKENS:
            made.append(batch)
            batch = []
        batch.append(i)
    made += [batch] if len(batch) >= PROCESSES else []
    shuffle.shuffle(made)
    return made


def losses(model, rows):
    """-> (per-token loss [n], weight [n]) of a batch of (ids, weights)."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows])[:, 1:].flatten()
    kept = weights > 0
    hidden = (
        model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)[kept]
    )
    return F.cross_entropy(
        model.lm_head(hidden), ids[:, 1:].flatten()[kept], reduction="none"
    ), weights[kept]


@torch.no_grad()
def evaluate(model, rows, limit=200):
    """Mean loss (nats a token) of the answers of up to `limit` conversations."""
    total = count = 0.0
    rows = sorted(rows[:limit], key=lambda row: len(row[0]))
    for start in range(0, len(rows), 25):
        loss, weights = losses(model, rows[start : start + 25])
        total, count = total + loss[weights == 1].sum().item(), count + (weights == 1).sum().item()
    return total / count


def schedule(progress):
    """Learning-rate factor at `progress` (0..1): 2 % warm-up, then a straight line to zero."""
    return min(progress / 0.02, (1 - progress) / 0.98)


def add_gradients(model):
    """Sums the gradients over the processes."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def rename_into(path, write):
    """`write(temporary)` and then the rename, so that nobody sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.rename(path)


def write_rows(path, rows):
    """One JSON object a line."""
    rename_into(
        path,
        lambda p: p.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
    )


def save_target(model, tokenizer, folder):
    """Writes the model as bf16 safetensors with its tokenizer; each file is replaced at once."""
    staging = Path(f"{folder}.staging")
    dtype = next(model.parameters()).dtype
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(staging, state_dict=weights)
    model.config.dtype = dtype
    save_tokenizer(tokenizer, staging)
    config = json.loads((staging / "config.json").read_text()) | {"dtype": "bfloat16"}
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        file.rename(folder / file.name)
    staging.rmdir()


def train(tokenizer, training, held_out, work, target, epochs=4, lr=2e-3):
    """Trains up to `epochs` and writes `target`; continues from `work`/state.pt.

    One process a core, each with its part of every batch: threads that meet after every operation
    get little done on a busy machine.
    """
    work.mkdir(parents=True, exist_ok=True)
    rendezvous = f"file://{work.resolve()}/rendezvous.{time.time_ns()}"
    shared = (
        tokenizer,
        encode_rows(tokenizer, training),
        encode_rows(tokenizer, held_out),
        work,
        target,
    )
    multiprocessing.spawn(worker, (rendezvous, *shared, epochs, lr), nprocs=PROCESSES)


def worker(rank, rendezvous, tokenizer, rows, unseen, work, target, epochs, lr):
    """The training loop of one process; the first one logs and saves."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    steps = [(epoch, batch) for epoch in range(math.ceil(epochs)) for batch in batches(rows, epoch)]
    steps = steps[: round(len(steps) * epochs / math.ceil(epochs))]
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    done, spent, state_path = 0, 0.0, work / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, spent = state["done"], state["spent"]
    started, saved_at, seen, recent, first = time.time(), time.time(), 0, None, done

    def save():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
        state["spent"] = spent + time.time() - started  # seconds
        rename_into(state_path, lambda path: torch.save(state, path))
        save_target(model, tokenizer, target)

    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), disable=rank > 0
    ) as progress:
        bar = progress.add_task("training", total=len(steps), completed=done)
        while done < len(steps):
            epoch, batch = steps[done]
            optimizer.param_groups[0]["lr"] = lr * schedule((done + 1) / len(steps))
            loss, weights = losses(model, [rows[i] for i in batch[rank::PROCESSES]])
            total = sum(sum(rows[i][1][1:]) for i in batch)
            ((loss * weights).sum() / total).backward()
            add_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done, seen = done + 1, seen + sum(len(rows[i][0]) for i in batch)
            answer_loss = loss.detach()[weights == 1].mean().item()
            recent = answer_loss if recent is None else 0.96 * recent + 0.04 * answer_loss
            progress.update(bar, completed=done, description=f"training, loss {recent:.3f}")
            if rank > 0:
                continue
            ends_epoch = done == len(steps) or steps[done][0] != epoch
            if done % 25 == 0 or ends_epoch:
                seconds = time.time() - started
                line = f"step {done}/{len(steps)} epoch {epoch} answer loss {recent:.4f} {seen / seconds:.0f} tokens/s"
                line += f" ETA {(len(steps) - done) * seconds / (done - first):.0f} s"
                line += f" held-out {evaluate(model, unseen):.4f}" if ends_epoch else ""
                progress.console.print(line, soft_wrap=True)
            if time.time() - saved_at > SAVE_EVERY or done == len(steps):
                save()
                saved_at = time.time()
    if rank == 0:
        print(
            f"{done}/{len(steps)} steps, {(spent + time.time() - started) / 60:.1f} minutes in all"
        )
    distributed.destroy_process_group()
