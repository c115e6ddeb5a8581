"""An inference engine's HTTP server as a child process that never outlives the run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console

from eagle3.errors import RunError

PAUSE = 0.3  # seconds between two looks at a server that starts
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
SHOWN_LINES, SEARCHED_LINES = 15, 300  # at the end of the log
# Under torchrun an engine would take these as its own and wait for our ranks.
WORKER_VARIABLE = re.compile(
    "(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_.*|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)"
)
# How an end shows in the log, and what it means; a cause stands before its consequences.
KNOWN_CAUSES = {
    r"(?i)out ?of ?memory|(not enough|cannot allocate|no available|than desired GPU) memory"
    r"|estimated maximum model length|memory capacity is unbalanced": (
        "it is out of memory: change mem_fraction_static, raise tp_size, or free the device"
    ),
    r"(?i)address already in use|EADDRINUSE|port \d+ .{0,20}in use": "its port is taken",
    r"(?:ModuleNotFoundError|Error while finding module).{0,80}No module named '?([\w.]+)": (
        "the package {} is missing in the engine's environment: install it, or name another python"
    ),
    r"(?i)(?:architectures? \S+|model type `?\S+).{0,60}(?:not supported|does not recogni)"
    r"|unsupported (?:model )?architecture": (
        "it does not know the model's architecture: take another version of the engine"
    ),
    r"(?m)^(?:.*\s)?((?:\w+\.)*\w*(?:Error|Exception): (?!.*root cause).+)$": "{}",
}


@dataclass
class Server:
    """Ended, with all it started, where the context or this process ends. Raises RunError."""

    command: list[str]
    url: str
    environment: dict[str, str]  # added to this process's own
    log: Path
    ready_seconds: float
    name: str = "the engine"
    process: subprocess.Popen | None = field(default=None, init=False)

    def __enter__(self) -> "Server":
        inherited = {k: v for k, v in os.environ.items() if not WORKER_VARIABLE.fullmatch(k)}
        watcher = str(Path(__file__).with_name("watcher.py"))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", watcher, str(os.getpid()), str(GRACE), *self.command],
                env=inherited | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: we end the server in order
            )
        try:
            self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def wait(self) -> None:
        """Until the server is ready. Raises RunError where it ends instead."""
        console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        console.print(f"{self.name} starts, at most {self.ready_seconds:,.0f} s ({self.log})")
        started = time.monotonic()
        # No proxy of the user's environment may stand between us and this machine: trust_env.
        with httpx.Client(base_url=self.url, trust_env=False, timeout=5) as client:
            while True:
                answered = False
                with suppress(httpx.HTTPError):
                    answered = client.get("/health").status_code == 200  # in every engine
                self.check()  # behind the answer, which may be another server's at this port
                if answered:
                    return
                elapsed = time.monotonic() - started
                if elapsed > self.ready_seconds:
                    remedy = f"raise ready_seconds if it is still loading; {self.end_of_log()}"
                    raise RunError(f"{self.name} is not ready after {elapsed:,.0f} s: {remedy}")
                time.sleep(PAUSE)

    def check(self, seconds: float = 0) -> None:
        """Raises RunError if the server ended by itself, or does so within `seconds`."""
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(seconds)
            reason = f"{self.cause(code)}; {self.end_of_log()}"
            raise RunError(f"{self.name} ended with exit code {code}: {reason}")

    def cause(self, code: int) -> str:
        """By the log first, and only then by the code: SGLang kills itself where a part fails."""
        text = "\n".join(self.last_lines(SEARCHED_LINES))
        for pattern, meaning in KNOWN_CAUSES.items():
            if found := list(re.finditer(pattern, text)):
                return meaning.format(*found[-1].groups())
        if code in (128 + signal.SIGKILL, -signal.SIGKILL):
            return "it was killed, mostly for want of main memory"
        return "see its log"

    def end_of_log(self) -> str:
        return f"the end of {self.log}:\n" + "\n".join(self.last_lines(SHOWN_LINES))

    def last_lines(self, number: int) -> list[str]:
        # Progress bars rewrite their line; a log may have grown to gigabytes.
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 1000 * number))
            lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-number:]

    def close(self, *raised) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(GRACE + 5)
        # A watcher that hangs or was killed ends nobody: then its process group is ours to end.
        if process.poll() is None or process.returncode < 0:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    __exit__ = close


def choose_port(port: int | None, key: str) -> int:
    """`port`, or any free one for None or 0. Raises RunError, naming `key`, when it is taken."""
    with socket.socket() as probe:
        # As servers bind: a port that was left a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            remedy = "choose another, or null for a free one"
            raise RunError(f"{key}={port} cannot be used ({error.strerror}): {remedy}") from error
        return probe.getsockname()[1]


def program(engine: str, name: str, otherwise: str | None = None) -> str:
    """`name` in the environment of launch/engines.sh, else `otherwise` or the one on the PATH."""
    folder = Path(os.environ.get("ENGINES_DIR", Path(__file__).parents[2]))
    path = folder / f".venv-{engine}" / "bin" / name
    return str(path) if path.exists() else otherwise or name


def interpreter(engine: str, given: str | None) -> str:
    """The Python of an engine: the given one, else its environment's if that exists, else ours."""
    return given or program(engine, "python", sys.executable)
