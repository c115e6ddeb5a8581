"""Servers of engines: started, ready, watched, ended with all they started, and found."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from eagle3.engines import server as engine
from eagle3.engines.engine import Engine
from eagle3.engines.server import Server, choose_port, interpreter, program
from eagle3.errors import ConfigError, RunError

runs = pytest.mark.runs
SERVING = """
import http.server, subprocess, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > ready else 503)
        self.end_headers()

delay, ready = {delay}, time.monotonic() + {delay}
{first}
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CHILDREN = """
import os
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
pids = [subprocess.Popen([sys.executable, "-c", code], start_new_session=new).pid
        for new in (False, True)]
print("pids", os.getpid(), *pids, flush=True)
"""


@pytest.fixture
def serve(tmp_path):
    def make(first="", delay=0, ready_seconds=60.0):
        (tmp_path / "fake.py").write_text(SERVING.format(first=first, delay=delay))
        port = choose_port(None, "port")
        command = [sys.executable, str(tmp_path / "fake.py"), str(port)]
        url, environment = f"http://127.0.0.1:{port}", {"OF_THE_TEST": "1"}
        return Server(command, url, environment, tmp_path / "log", ready_seconds)

    return make


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def pids_in(log):
    wait_until(lambda: log.exists() and "pids" in log.read_text())
    return [int(pid) for pid in log.read_text().split("pids")[1].split("\n")[0].split()]


@runs
def test_ready_and_ended_with_all_that_it_started(serve, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(engine, "GRACE", 0.5)
    names = "os.environ.get('OF_THE_TEST'), os.environ.get('WORLD_SIZE')"
    first = f"import os, signal; print({names}, flush=True)\n"
    first += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    with serve(first + CHILDREN, delay=0.5) as server:
        server.check()
        pids = pids_in(server.log)
        assert len(pids) == 3 and all(map(alive, pids))
        assert server.log.read_text().startswith("1 None")
    assert not any(map(alive, pids)), "killed, as it ignores SIGTERM"


DEATHS = [
    ("import sgl_kernel_of_nobody", "package sgl_kernel_of_nobody is missing"),
    ("import os; os.kill(os.getpid(), 9)", "exit code 137: it was killed"),
    ("print('last words'); sys.exit(3)", r"exit code 3: see its log; .*log:\nlast words$"),
]


@runs
@pytest.mark.parametrize("dying, words", DEATHS)
def test_death_at_the_start_has_its_cause(serve, dying, words):
    with pytest.raises(RunError, match=words), serve(dying):
        pass


NO_SGLANG = (
    "Error while finding module specification for 'a.b' (ModuleNotFoundError: No module named"
)
CAUSES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", "out of memory"),
    ("RuntimeError: Not enough memory. Please try to", "change mem_fraction_static"),
    ("Free memory (3/139 GiB) on startup is less than desired GPU memory", "out of memory"),
    ("RuntimeError: The memory capacity is unbalanced. Some GPUs may be", "out of memory"),
    ("[Errno 98] error while attempting to bind: address already in use", "port is taken"),
    (f"{NO_SGLANG} 'sglang')", "package sglang is missing"),
    ("WARNING: No module named 'flash_attn', using another backend", "it was killed"),
    ("(EngineCore pid=3) ERROR ValueError: no EAGLE here", "ValueError: no EAGLE here"),
    ("Model architectures ['FooForCausalLM'] are not supported.", "model's architecture"),
    ("model type `foo` but it does not recognize this architecture.", "architecture"),
]


@pytest.mark.parametrize("line, words", CAUSES)
def test_known_causes(tmp_path, line, words):
    server = Server([], "", {}, tmp_path / "log", 1)
    last = "RuntimeError: Engine core initialization failed. See root cause above."
    server.log.write_text(f"starting\n{line}\n{last}\n")
    assert words in server.cause(137)


@runs
def test_a_command_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match=r"exit code 127.*\n.*No such file.*nobody"):
        Server(["/nobody"], "http://127.0.0.1:9", {}, tmp_path / "log", 9).__enter__()


@runs
def test_one_that_is_never_ready_is_given_up_and_ended(serve):
    first = "print('still loading', flush=True)\n" + CHILDREN
    server = serve(first, delay=600, ready_seconds=1.5)
    with pytest.raises(RunError, match=r"not ready after \d+ s: raise ready_seconds[^\n]*\n"):
        server.__enter__()
    text = server.log.read_text()
    assert "pids" not in text or not any(map(alive, pids_in(server.log)))


@runs
@pytest.mark.parametrize("victim, code", [("server", 137), ("watcher", -9)])
def test_death_after_the_start_is_noticed(serve, victim, code):
    with serve(CHILDREN) as server:
        server.check()
        pids = pids_in(server.log)
        os.kill(pids[0] if victim == "server" else server.process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=f"exit code {code}"):
            server.check(60)
    wait_until(lambda: not any(map(alive, pids[:2])))
    if victim == "watcher":
        os.kill(pids[2], signal.SIGKILL)  # of a session of its own: out of reach without it
    wait_until(lambda: not alive(pids[2]))


@runs
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_run(serve, number):
    server = serve(CHILDREN)
    code = textwrap.dedent(f"""
        from pathlib import Path
        import time
        from eagle3.engines.server import Server
        log = Path({str(server.log)!r})
        with Server({server.command!r}, {server.url!r}, {{}}, log, 60):
            print("ready", flush=True)
            time.sleep(60)
    """)
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    pids = pids_in(server.log)
    assert all(map(alive, pids))
    run.send_signal(number)
    run.wait()
    wait_until(lambda: not any(map(alive, pids)))


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"^benchmark.port={port} cannot be used .*in use"):
            choose_port(port, "benchmark.port")
    assert choose_port(0, "benchmark.port") > 0


def described(*packages, versions=">=1"):
    engine = Engine()
    engine.name, engine.packages, engine.versions = "X", packages, versions
    return engine


ABSENT = [
    (sys.executable, "no-such-engine", ">=1", "not installed .* benchmark.python="),
    (sys.executable, "pytest", "<1", r"is not one we know \(<1\)"),
    ("/nobody", "pytest", "<1", "not installed for /nobody: .* benchmark.python="),
]


@runs
@pytest.mark.parametrize("python, name, versions, words", ABSENT)
def test_an_engine_that_is_not_there(python, name, versions, words):
    with pytest.raises(ConfigError, match=words):
        described(name, versions=versions).find(python, "benchmark.python")


@runs
def test_where_an_engine_is_found(monkeypatch, tmp_path):
    found = described("no-such-engine", "pytest").find(sys.executable, "benchmark.python")
    assert found == pytest.__version__
    monkeypatch.setenv("ENGINES_DIR", str(tmp_path))
    assert interpreter("vllm", None) == sys.executable and program("vllm", "vllm") == "vllm"
    own = tmp_path / ".venv-vllm/bin/python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert interpreter("vllm", None) == program("vllm", "python") == str(own)
    assert interpreter("vllm", "/given") == "/given"
