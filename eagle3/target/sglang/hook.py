"""The part that runs inside SGLang's model processes: a forward hook that leaves hidden states in
shared memory.

SGLang finds it as `eagle3.target.sglang.hook:factory` (its `forward_hooks` argument) and calls it
after every forward pass of the logits processor. Requests whose `rid` is `<folder>:<number>` (see
`blocks.Blocks`) are ours: their rows go to a file in that folder, one for each pass, in the
safetensors format:

    argmax int64 [n], logsumexp fp32 [n], aux_hidden_states [3,n,H], last_hidden_states [n,H] (after
    the final norm)

with `requests`, a list of [number, tokens before, tokens here], as metadata. Nothing but torch is
needed here.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

OURS = re.compile(r"(eagle3-\w+):(\d+)")
ALIVE = ".alive"  # locked as long as the process that made the folder lives
ERROR = "error"
CHUNK_BYTES = 1 << 28  # of logits at a time
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}

logger = logging.getLogger(__name__)


def factory(config: dict[str, Any]) -> Callable[..., None]:
    """What SGLang calls once in each model process; `config` has `root`, where the clients' folders
    are.
    """
    return Tap(Path(config["root"]), sglang_group)


def sglang_group() -> dist.ProcessGroup:
    from sglang.srt.distributed import get_tp_group

    return get_tp_group().device_group


class Tap:
    """The hook. It returns None always, or the model's output would change, and raises nothing, or
    the engine ends.
    """

    def __init__(self, root: Path, group: Callable[[], dist.ProcessGroup]):
        self.root, self.group = root, group
        self.writer = ThreadPoolExecutor(1)
        self.watched: set[str] = set()
        self.blocks = 0

    def __call__(self, module: Any, inputs: tuple, output: Any) -> None:
        ours: dict[str, list[tuple[int, int]]] = {}
        try:
            batch = inputs[3]
            if not batch.forward_mode.is_extend() or not batch.rids:
                return
            for place, rid in enumerate(batch.rids):
                if found := OURS.fullmatch(str(rid)):
                    ours.setdefault(found[1], []).append((place, int(found[2])))
            aux = inputs[4] if len(inputs) > 4 else None
            for folder, requests in ours.items():
                self.take(self.root / folder, requests, inputs[1], inputs[2], batch, aux)
        except Exception as error:
            logger.exception("eagle3: the hook failed")
            for folder in ours:
                report(
                    self.root / folder,
                    f"{error} ({traceback.extract_tb(error.__traceback__)[-1].line})",
                )

    @torch.no_grad()
    def take(
        self, folder: Path, requests: list[tuple[int, int]], last, lm_head, batch, aux
    ) -> None:
        """Write the rows of these requests, (place in the batch, number), to `folder`."""
        if aux is None:
            raise RuntimeError("the model gave no auxiliary hidden states to its logits processor")
        if isinstance(aux, torch.Tensor):
            aux = aux.split(last.shape[-1], dim=-1)
        if len(aux) != 3:
            raise RuntimeError(f"the model captured {len(aux)} auxiliary hidden states, not 3")
        lengths, before = list(batch.extend_seq_lens_cpu), list(batch.extend_prefix_lens_cpu)
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        if len(requests) == len(lengths):
            rows = slice(0, sum(lengths))  # behind them there may be padding
        else:
            rows = torch.cat(
                [torch.arange(starts[p], starts[p] + lengths[p]) for p, _ in requests]
            ).to(last.device)
        last, aux = last[rows], [tensor[rows] for tensor in aux]
        split = getattr(lm_head, "tp_size", 1) > 1
        group = self.group() if split else None
        argmax, logsumexp = statistics(last, lm_head, group)
        if split and dist.get_rank(group) != 0:
            return
        tensors = {"argmax": to_host([argmax])[0], "logsumexp": to_host([logsumexp])[0]}
        tensors |= {"aux_hidden_states": to_host(aux), "last_hidden_states": to_host([last])[0]}
        copied = torch.cuda.current_stream().record_event() if last.is_cuda else None
        listed = [[number, int(before[place]), int(lengths[place])] for place, number in requests]
        self.watch(folder)
        self.blocks += 1
        self.writer.submit(
            write, folder, f"{os.getpid()}-{self.blocks:08d}", tensors, listed, copied
        )

    def watch(self, folder: Path) -> None:
        """Delete `folder` as soon as its client is gone, however that ended."""
        if folder.name not in self.watched:
            self.watched.add(folder.name)
            threading.Thread(target=outlive, args=(folder,), daemon=True).start()


def statistics(
    last: torch.Tensor, lm_head: Any, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmax int64 [n] and logsumexp fp32 [n] of the logits of `last` [n,H] over the whole
    vocabulary.

    Each process of `group` has some of the head's rows; padding and tokens added for adapters do
    not count.
    """
    shard = getattr(lm_head, "shard_indices", None)
    first, size = (
        (shard.org_vocab_start_index, shard.num_org_elements) if shard else (0, len(lm_head.weight))
    )
    head = lm_head.weight[:size]
    if not head.is_floating_point() or head.shape[-1:] != last.shape[-1:]:
        raise RuntimeError("the head of the model is quantised, which is not supported")
    best, token, logsumexp = [], [], []
    for rows in last.split(max(1, CHUNK_BYTES // (4 * max(1, size)))):
        if size == 0:  # a small vocabulary can leave a process without a token
            lowest = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)
            best, token, logsumexp = (
                [*best, lowest],
                [*token, lowest.new_zeros(len(rows))],
                [*logsumexp, lowest],
            )
            continue
        logits = (rows.to(head.dtype) @ head.T).float()
        values, places = logits.max(-1)
        best.append(values)
        token.append(places + first)
        logsumexp.append(logits.logsumexp(-1))
    best, token, logsumexp = torch.cat(best), torch.cat(token).long(), torch.cat(logsumexp)
    if group is None:
        return token, logsumexp
    mine = torch.stack([best.double(), token.double(), logsumexp.double()])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    best, token, logsumexp = torch.stack(every, 1)
    best = best.nan_to_num(
        -torch.inf, torch.inf, -torch.inf
    )  # else a row that is not finite has no best token
    token = torch.where(best == best.amax(0), token, torch.inf).amin(
        0
    )  # the first of equals, as argmax says
    return token.long(), logsumexp.logsumexp(0).float()


def to_host(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Equal tensors, stacked in main memory; from a GPU the copy is only under way."""
    first = tensors[0]
    host = torch.empty((len(tensors), *first.shape), dtype=first.dtype, pin_memory=first.is_cuda)
    for place, tensor in zip(host, tensors, strict=True):
        place.copy_(tensor, non_blocking=True)
    return host


def write(
    folder: Path, name: str, tensors: dict[str, torch.Tensor], requests: list, copied: Any
) -> None:
    """One block: complete as soon as its name ends in .safetensors. Nothing is written for a client
    that is gone.
    """
    try:
        if copied is not None:
            copied.synchronize()
        header: dict[str, Any] = {"__metadata__": {"requests": json.dumps(requests)}}
        end = 0
        for key, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            header[key] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        partial = folder / f"{name}.partial"
        with contextlib.suppress(FileNotFoundError):
            with partial.open("wb", buffering=0) as file:
                file.write(len(encoded).to_bytes(8, "little") + encoded)
                for tensor in tensors.values():
                    left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                    while left:
                        left = left[file.write(left) :]
            partial.rename(partial.with_suffix(".safetensors"))
    except Exception as error:
        logger.exception("eagle3: a block was not written")
        report(folder, f"a block of hidden states was not written to {folder}: {error}")


def report(folder: Path, sentence: str) -> None:
    """Leave an error for the client, who waits for it as for a block."""
    with contextlib.suppress(OSError):
        partial = folder / f"{ERROR}.{os.getpid()}"
        partial.write_text(sentence)
        partial.rename(folder / ERROR)


def outlive(folder: Path) -> None:
    """Wait until the process that made `folder` is gone, then delete it."""
    with contextlib.suppress(OSError), (folder / ALIVE).open() as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
    shutil.rmtree(folder, ignore_errors=True)
