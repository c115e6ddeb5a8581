"""The client's end of `hook`: a private folder in shared memory, and what is read from it."""

import fcntl
import itertools
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from eagle3.batch import Features
from eagle3.errors import RunError
from eagle3.target.sglang.hook import ERROR

SHARED = Path("/dev/shm")
PREFIX = "eagle3-"
ALIVE = ".alive"  # locked as long as the process that made the folder lives
PAUSE = 0.003  # seconds between two looks
# Seconds between an answer of the server and the hidden states that should have come before it.
SILENT_SECONDS = 20.0


class Blocks:
    """A folder under `root`, gone when it is closed, collected, or its process ends in order."""

    def __init__(self, root: Path = SHARED):
        delete_stale(root)
        made = tempfile.TemporaryDirectory(prefix=PREFIX, dir=root, ignore_cleanup_errors=True)
        self.folder, self.close, self.numbers = Path(made.name), made.cleanup, itertools.count()
        # Under another name until it is locked, or another process would take us for dead.
        self.alive = (self.folder / "locking").open("w")
        fcntl.flock(self.alive, fcntl.LOCK_EX)
        (self.folder / "locking").rename(self.folder / ALIVE)

    def request_id(self, number: int) -> str:
        """What a request, one of `numbers`, is called so that its hidden states land here."""
        return f"{self.folder.name}:{number}"

    def wait(self, reply: Future) -> Path:
        """The oldest block, once there is one. Raises what `reply` raises, and RunError where the
        hook reports an error, or none comes although the server answered.
        """
        answered = None
        while True:
            # A name ends in the block's number, and the blocks of a prompt come from one process.
            found = min(self.folder.glob("*.safetensors"), default=None)
            if found is not None:
                return found
            if (self.folder / ERROR).exists():
                reported = (self.folder / ERROR).read_text()
                (self.folder / ERROR).unlink()
                raise RunError(f"the hook in SGLang's model process failed: {reported}")
            if reply.done():
                reply.result()
                # The hook writes in a thread of its own, so the last block may come a little later.
                answered = answered or time.monotonic()
                if time.monotonic() > answered + SILENT_SECONDS:
                    reason = "SGLang runs in another container, or its forward hook does not fire"
                    remedy = "use target=hf for this model"
                    raise RunError(f"no hidden states came to {SHARED}: {reason} ({remedy})")
            time.sleep(PAUSE)

    def receive(self, prompts: dict[int, range], features: Features, reply: Future) -> None:
        """Fill the rows of `features` (all are teacher rows) that belong to each of `prompts`, by
        number. Raises RunError where a part is missing, and what `wait` raises.
        """
        received, size = dict.fromkeys(prompts, 0), features.last_hidden_states.shape[1]
        while received:
            path = self.wait(reply)
            with safe_open(path, "pt") as block:
                start = 0
                # SGLang may compute a prompt in parts, and parts of several prompts in one pass.
                for number, before, count in json.loads(block.metadata()["requests"]):
                    part = slice(start, start + count)
                    start += count
                    if number not in received:
                        continue  # of a call that was given up
                    first, length = prompts[number].start, len(prompts[number])
                    if before != received[number] or before + count > length:
                        problem = f"tokens {before} to {before + count} after {received[number]}"
                        reason = "its prefix cache is on (--disable-radix-cache)"
                        raise RunError(f"SGLang computed {problem}: {reason}")
                    rows = slice(first + before, first + before + count)
                    aux = features.aux_hidden_states[rows].unflatten(1, (-1, size)).transpose(0, 1)
                    aux.copy_(block.get_slice("aux_hidden_states")[:, part])
                    for name in ("last_hidden_states", "argmax", "logsumexp"):
                        read = block.get_slice(name)[part]
                        getattr(features, name)[rows] = read.to(features.argmax.device)
                    received[number] += count
                    if received[number] == length:
                        del received[number]
            path.unlink()


def delete_stale(root: Path) -> None:
    """Delete folders in `root` whose processes were killed: the memory is lost until then."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / ALIVE).open() as alive:
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while its owner lives
                shutil.rmtree(folder, ignore_errors=True)
