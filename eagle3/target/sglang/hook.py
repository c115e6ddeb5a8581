"""A forward hook inside SGLang's model processes that leaves hidden states in shared memory.

SGLang finds it as HOOK (its `forward_hooks` argument) and calls it after every forward pass of the
logits processor. Requests whose `rid` is `<folder>:<number>` (see `blocks.Blocks`) are ours: their
rows go to a file in that folder, one for each pass:

    argmax int64 [n], logsumexp fp32 [n], aux_hidden_states [A,n,H] of A layers, last_hidden_states
    [n,H] (after the final norm)

with `requests`, a list of [number, tokens before, tokens here], as metadata. This file imports
nothing that SGLang's environment lacks: torch and safetensors.
"""

import contextlib
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

HOOK = "eagle3.target.sglang.hook:Hook"  # what SGLang is told
OURS = re.compile(r"(eagle3-\w+):(\d+)")
ERROR = "error"
CHUNK_BYTES = 1 << 28  # of logits at a time

logger = logging.getLogger(__name__)


class Hook:
    """Made once in each model process and called with what the logits processor was called with.

    It returns None always, or the model's output would change, and raises nothing, or the engine
    would end: what is wrong is written to the client's folder.
    """

    def __init__(self, config: dict[str, Any]):
        self.root, self.blocks = Path(config["root"]), 0  # clients' folders are in `root`
        self.num_layers = config["num_layers"]
        self.writer = ThreadPoolExecutor(1)  # the engine computes on while a block is written

    def __call__(self, module: Any, inputs: tuple, output: Any) -> None:
        ours: dict[str, list[tuple[int, int]]] = {}
        try:
            # LogitsProcessor.forward(input_ids, hidden_states, lm_head, metadata, aux)
            _, last, lm_head, batch, *more = inputs
            if not batch.forward_mode.is_extend() or not batch.rids:
                return  # decoding: hidden states are wanted of prompts only
            for place, rid in enumerate(batch.rids):
                found = OURS.fullmatch(str(rid))
                if found is not None:
                    ours.setdefault(found[1], []).append((place, int(found[2])))
            aux = more[0] if more else None
            for folder, requests in ours.items():
                self.capture(self.root / folder, requests, last, lm_head, batch, aux)
        except Exception as error:
            logger.exception("eagle3: the hook failed")
            for folder in ours:
                report_error(self.root / folder, f"{error!r} (see its log)")

    @torch.no_grad()
    def capture(self, folder: Path, requests: list, last, lm_head, batch, aux) -> None:
        """Write the rows of these requests, (place in the batch, number), to `folder`."""
        if isinstance(aux, torch.Tensor):
            aux = aux.split(last.shape[-1], dim=-1)
        # A block names no layers: with fewer the client would take one for another.
        if aux is None or len(aux) != self.num_layers:
            problem = f"the model did not capture {self.num_layers} auxiliary hidden states"
            raise RuntimeError(problem)
        lengths, before = list(batch.extend_seq_lens_cpu), list(batch.extend_prefix_lens_cpu)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        rows = slice(0, ends[-1])  # behind them there may be padding
        if len(requests) < len(lengths):
            parts = [torch.arange(ends[p] - lengths[p], ends[p]) for p, _ in requests]
            rows = torch.cat(parts).to(last.device)
        last, aux = last[rows], [tensor[rows] for tensor in aux]
        # Every process of a split model computes its part of the head; the first of them writes.
        group = None
        if getattr(lm_head, "tp_size", 1) > 1:
            from sglang.srt.distributed import get_tp_group

            group = get_tp_group().device_group
        argmax, logsumexp = statistics(last, lm_head, group)
        if group is not None and dist.get_rank(group) != 0:
            return
        tensors = {"argmax": to_host(argmax)[0], "logsumexp": to_host(logsumexp)[0]}
        tensors |= {"aux_hidden_states": to_host(*aux), "last_hidden_states": to_host(last)[0]}
        # Only the writer's thread waits for the copies; the engine goes on to its next pass.
        copied = torch.cuda.current_stream().record_event() if last.is_cuda else None
        listed = [[number, int(before[place]), int(lengths[place])] for place, number in requests]
        self.blocks += 1  # names order the blocks of a prompt that comes in parts
        path = folder / f"{os.getpid()}-{self.blocks:08d}.safetensors"
        self.writer.submit(write_block, path, tensors, listed, copied)


def statistics(last: torch.Tensor, lm_head: Any, group: dist.ProcessGroup | None) -> tuple:
    """argmax int64 [n] and logsumexp fp32 [n] of `last` [n,H] over the whole vocabulary, of which
    each process of `group` has some rows; padding and tokens of adapters do not count.
    """
    shard = getattr(lm_head, "shard_indices", None)
    first = shard.org_vocab_start_index if shard else 0
    size = shard.num_org_elements if shard else len(lm_head.weight)
    head = lm_head.weight[:size]
    if not head.is_floating_point() or head.shape[-1:] != last.shape[-1:]:
        raise RuntimeError("the head of the model is quantised, which is not supported")
    parts = []
    for rows in last.split(max(1, CHUNK_BYTES // (4 * size))):
        logits = (rows.to(head.dtype) @ head.T).float()
        parts.append((*logits.max(-1), logits.logsumexp(-1)))
    best, token, logsumexp = (torch.cat(part) for part in zip(*parts, strict=True))
    token = token + first
    if group is None:
        return token, logsumexp
    # float64 carries token ids exactly, so that one all_gather moves all three.
    mine = torch.stack([best.double(), token.double(), logsumexp.double()])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    best, token, logsumexp = torch.stack(gathered, 1)
    # Else a row that is not finite has no best token; of equals the first, as argmax says.
    best = best.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    token = torch.where(best == best.amax(0), token, torch.inf).amin(0)
    return token.long(), logsumexp.logsumexp(0).float()


def to_host(*tensors: torch.Tensor) -> torch.Tensor:
    """Tensors, stacked, in main memory; from a GPU the copy is only under way."""
    first = tensors[0]
    host = torch.empty((len(tensors), *first.shape), dtype=first.dtype, pin_memory=first.is_cuda)
    for place, tensor in zip(host, tensors, strict=True):
        place.copy_(tensor, non_blocking=True)
    return host


def write_block(path: Path, tensors: dict, requests: list[list[int]], copied: Any) -> None:
    """One block, complete once it has its name. None is written for a client that is gone."""
    partial = path.with_suffix(".partial")
    try:
        if copied is not None:
            copied.synchronize()
        save_file(tensors, partial, {"requests": json.dumps(requests)})
        partial.rename(path)
    except Exception as error:
        partial.unlink(missing_ok=True)  # shared memory is what may have run out
        if path.parent.exists():
            report_error(path.parent, f"{path} was not written ({error}); see target.batch_tokens")


def report_error(folder: Path, sentence: str) -> None:
    """Leave an error for the client, who waits for it as for a block."""
    with contextlib.suppress(OSError):
        partial = folder / f"{ERROR}.{os.getpid()}"
        partial.write_text(sentence)
        partial.rename(folder / ERROR)
