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
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.text import Text

from eagle3.errors import ConfigError, RunError

PAUSE = 0.3  # seconds between two looks at a server that starts
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
QUIET = 30.0  # seconds between two lines where there is no terminal
SHOWN_LINES, SEARCHED_LINES = 15, 300  # at the end of the log
EXCEPTION = re.compile(
    r"^(?:.*\s)?((?:\w+\.)*\w*(?:Error|Exception): (?!.*root cause).+)$", re.MULTILINE
)
# Under torchrun an engine would take these as its own and wait for our ranks.
WORKER_VARIABLE = re.compile(
    "(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_.*|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)"
)

KNOWN_CAUSES = [  # what a log contains and what that means, the cause before its consequences
    (
        r"(?i)OutOfMemoryError|out of memory|not enough memory|cannot allocate memory"
        r"|no available memory|less than desired GPU memory|estimated maximum model length"
        r"|memory capacity is unbalanced",
        "it is out of memory: change mem_fraction_static, raise tp_size, or free the device of "
        "other processes",
    ),
    (
        r"(?i)address already in use|EADDRINUSE|port \d+ .{0,20}in use",
        "its port is taken: choose another port",
    ),
    (
        r"(?:ModuleNotFoundError|Error while finding module).{0,80}No module named '?([\w.]+)",
        "the package {} is missing in the engine's environment: install it there, or name another "
        "interpreter",
    ),
    (
        r"(?i)(architectures? \S+|model type `?\S+).{0,60}"
        r"(not supported|unsupported|does not recogni[sz]e)"
        r"|does not recognize this architecture|unsupported (model )?architecture",
        "it does not know the model's architecture: use a version of the engine that does, or "
        "another engine",
    ),
]


@dataclass
class Server:
    """`command` serves HTTP at `url`; ready as soon as GET `health_path` answers 200.

    That must be within `ready_seconds`. `environment` is added to this process's own; the output
    goes to `log`. Leaving the context ends the server with all that it started; so does the end of
    this process, whatever ends it. Raises RunError.
    """

    command: list[str]
    url: str
    environment: dict[str, str]
    log: Path
    ready_seconds: float
    health_path: str
    name: str = "the engine"
    process: subprocess.Popen | None = field(default=None, init=False)

    def __enter__(self) -> "Server":
        inherited = {
            name: value for name, value in os.environ.items() if not WORKER_VARIABLE.fullmatch(name)
        }
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

    def __exit__(self, *raised) -> None:
        self.close()

    def wait(self) -> None:
        """Until the server is ready."""
        console = Console(stderr=True)
        started = time.monotonic()
        next_line = QUIET
        # No proxy of the user's environment may stand between us and this machine: trust_env.
        with (
            console.status("") as status,
            httpx.Client(base_url=self.url, trust_env=False, timeout=5) as client,
        ):
            while not self.is_ready(client):
                elapsed = time.monotonic() - started
                if elapsed > self.ready_seconds:
                    raise RunError(
                        f"{self.name} is not ready after {elapsed:,.0f} s: raise ready_seconds if "
                        f"it is still loading; {self.end_of_log()}"
                    )
                line = (
                    f"{self.name} starts, {elapsed:,.0f} s (at most {self.ready_seconds:,.0f} s, "
                    f"{self.log})"
                )
                if console.is_terminal:
                    newest = "".join(self.last_lines(1))
                    status.update(Text(f"{line}: {newest}"[: console.width - 4]))
                elif elapsed >= next_line:
                    console.print(line, soft_wrap=True, markup=False, highlight=False)
                    next_line = elapsed + QUIET
                time.sleep(PAUSE)

    def is_ready(self, client: httpx.Client) -> bool:
        """Raises RunError where it has ended instead."""
        answered = False
        with suppress(httpx.HTTPError):
            answered = client.get(self.health_path).status_code == 200
        self.check()  # behind the answer, which may be that of another server at this port
        return answered

    def check(self) -> None:
        """Raises RunError, with the cause if it is a known one, when the server ended by itself."""
        code = self.process.poll() if self.process else None
        if code is not None:
            raise RunError(
                f"{self.name} ended with exit code {code}: {self.cause(code)}; {self.end_of_log()}"
            )

    def cause(self, code: int) -> str:
        """Of an exit code and the log.

        The last exception in the log comes before the code, because SGLang kills itself when one of
        its processes fails.
        """
        text = "\n".join(self.last_lines(SEARCHED_LINES))
        for pattern, meaning in KNOWN_CAUSES:
            if found := re.search(pattern, text):
                return meaning.format(*found.groups()[:1])
        exceptions = EXCEPTION.findall(text)
        if exceptions:
            return exceptions[-1]
        if code in (128 + signal.SIGKILL, -signal.SIGKILL):
            return "it was killed, mostly for want of main memory"
        return "see its log"

    def end_of_log(self) -> str:
        return f"the end of {self.log}:\n" + "\n".join(self.last_lines(SHOWN_LINES))

    def last_lines(self, number: int) -> list[str]:
        """Of the log, without blank ones."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 1000 * number))
            lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-number:]

    def close(self) -> None:
        """End the server and all that it started."""
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


def choose_port(port: int | None, key: str) -> int:
    """`port` of 127.0.0.1, or any free one if it is None or 0.

    Raises RunError, naming `key`, when it is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise RunError(
                f"{key}={port} cannot be used ({error.strerror}): choose another one, or null for "
                "any that is free"
            ) from error
        return probe.getsockname()[1]


def environment(engine: str) -> Path:
    """Where launch/engines.sh makes the environment of `sglang` or `vllm`."""
    return Path(os.environ.get("ENGINES_DIR", Path(__file__).parents[2])) / f".venv-{engine}"


def program(engine: str, name: str, otherwise: str | None = None) -> str:
    """`name` in the engine's own environment if it is there, else `otherwise`, or on the PATH."""
    path = environment(engine) / "bin" / name
    return str(path) if path.exists() else otherwise or name


def interpreter(engine: str, given: str | None) -> str:
    """The Python of an engine: the given one, else its environment's if that exists, else ours."""
    return given or program(engine, "python", sys.executable)


def find_package(python: str, names: tuple[str, ...], versions: str, key: str) -> str:
    """Version of the first of these distributions that the interpreter `python` has.

    Raises ConfigError, naming `key` (which chooses the interpreter), when it has none or not one of
    `versions`.
    """
    script = (
        "import sys\nfrom importlib.metadata import version, PackageNotFoundError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(version(name)); break\n"
        "    except PackageNotFoundError: pass"
    )
    try:
        answer = subprocess.run(
            [python, "-c", script, *names], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{key}={python} does not run ({error}): give the path of a Python interpreter"
        ) from error
    found = answer.stdout.strip()
    if not found:
        raise ConfigError(
            f"{names[0]} is not installed for {python}: make its environment with "
            f"launch/engines.sh and set {key}=<environment>/bin/python"
        )
    if not SpecifierSet(versions).contains(found, prereleases=True):
        raise ConfigError(
            f"{names[0]} {found} of {python} is not one of the versions we know ({versions})"
        )
    return found
