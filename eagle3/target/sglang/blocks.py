"""The client's end of `hook`: a private folder in shared memory, and what is read from it."""

import fcntl
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
        self.folder, self.close, self.numbers = Path(made.name), made.cleanup, 0
        # Under another name until it is locked, or another process would take us for dead.
        self.alive = (self.folder / "locking").open("w")
        fcntl.flock(self.alive, fcntl.LOCK_EX)
        (self.folder / "locking").rename(self.folder / ALIVE)

    def new_numbers(self, count: int) -> list[int]:
        """Numbers for `count` requests, none of which was used before."""
        self.numbers += count
        return list(range(self.numbers - count, self.numbers))

    def request_id(self, number: int) -> str:
        """What a request is called so that its hidden states land here."""
        return f"{self.folder.name}:{number}"

    def wait(self, reply: Future) -> Path:
        """The oldest block, once there is one.

        Raises RunError where the hook reports an error, or none comes although the server answered,
        and what `reply` raises.
        """
        answered = None
        while True:
            # A name ends in the block's number, and the blocks of a prompt come from one process.
            found = min(self.folder.glob("*.safetensors"), default=None)
            if found is not None:
                return found
            if (self.folder / ERROR).exists():
                reported = (self.folder / ERROR).read_text()
                self.clear()
                raise RunError(f"the hook in SGLang's model process failed: {reported}")
            if reply.done():
                reply.result()
                # The hook writes in a thread of its own, so the last block may come a little later.
                answered = answered or time.monotonic()
                if time.monotonic() > answered + SILENT_SECONDS:
                    raise RunError(
                        f"SGLang answered, but no hidden states came to {SHARED}: its forward hook "
                        "does not fire (use target=hf for this model), or it runs in another "
                        "container than this process"
                    )
            time.sleep(PAUSE)

    def clear(self) -> None:
        """Delete what was left by requests that nobody waits for any more."""
        for path in [*self.folder.glob("*.safetensors"), self.folder / ERROR]:
            path.unlink(missing_ok=True)

    def receive(self, prompts: dict[int, slice], features: Features, reply: Future) -> None:
        """Fill the rows of `features` that each of `prompts`, by its number, stands for.

        All its rows are teacher rows. Raises RunError where a part is missing, and what `wait`
        raises.
        """
        received = dict.fromkeys(prompts, 0)
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
                    whole = prompts[number]
                    length = whole.stop - whole.start
                    if before != received[number] or before + count > length:
                        raise RunError(
                            f"SGLang computed tokens {before} to {before + count} of a prompt of "
                            f"{length} after {received[number]} others: its prefix cache is on; "
                            "start it with --disable-radix-cache"
                        )
                    first = whole.start + before
                    copy_rows(block, part, features, slice(first, first + count))
                    received[number] += count
                    if received[number] == length:
                        del received[number]
            path.unlink()


def copy_rows(block: safe_open, part: slice, features: Features, rows: slice) -> None:
    """The rows `part` of a block to `rows` of `features`."""
    aux = features.aux_hidden_states[rows].unflatten(1, (3, -1)).transpose(0, 1)
    aux.copy_(block.get_slice("aux_hidden_states")[:, part])
    for name in ("last_hidden_states", "argmax", "logsumexp"):
        getattr(features, name)[rows] = block.get_slice(name)[part].to(features.argmax.device)


def delete_stale(root: Path) -> None:
    """Delete folders in `root` whose processes were killed: the memory is lost until then."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / ALIVE).open() as alive:
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while its owner lives
                shutil.rmtree(folder, ignore_errors=True)
