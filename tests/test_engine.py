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
from eagle3.engines.server import Server, choose_port, find_package
from eagle3.errors import ConfigError, RunError

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
pids = [subprocess.Popen([sys.executable, "-c", code], start_new_session=new).pid for new in (False, True)]
print("pids", os.getpid(), *pids, flush=True)
"""


@pytest.fixture
def serve(tmp_path):
    def make(first="", delay=0, ready_seconds=20.0):
        (tmp_path / "fake.py").write_text(SERVING.format(first=first, delay=delay))
        port = choose_port(None, "port")
        command = [sys.executable, str(tmp_path / "fake.py"), str(port)]
        return Server(
            command,
            f"http://127.0.0.1:{port}",
            {"OF_THE_TEST": "1"},
            tmp_path / "log",
            ready_seconds,
            "/h",
        )

    return make


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=15.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def pids_in(log):
    wait_until(lambda: log.exists() and "pids" in log.read_text())
    return [int(pid) for pid in log.read_text().split("pids")[1].split("\n")[0].split()]


def test_ready_and_ended_with_all_that_it_started(serve, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    says = "import os; print(os.environ.get('OF_THE_TEST'), os.environ.get('WORLD_SIZE'), flush=True)\n"
    with serve(says + CHILDREN, delay=0.5) as server:
        server.check()
        pids = pids_in(server.log)
        assert len(pids) == 3 and all(map(alive, pids))
        assert server.log.read_text().startswith("1 None")
    assert not any(map(alive, pids))


def test_one_that_ignores_sigterm_is_killed(serve, monkeypatch):
    monkeypatch.setattr(engine, "GRACE", 0.5)
    with serve(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILDREN
    ) as server:
        pids = pids_in(server.log)
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    "dying, words",
    [
        ("import sgl_kernel_of_nobody", "package sgl_kernel_of_nobody is missing"),
        ("import os; os.kill(os.getpid(), 9)", "exit code 137: it was killed"),
        ("print('last words'); sys.exit(3)", "exit code 3: see its log"),
    ],
)
def test_death_at_the_start_is_told_with_its_cause(serve, dying, words):
    started = time.monotonic()
    with pytest.raises(RunError, match=words) as raised, serve(dying):
        pass
    assert time.monotonic() - started < 5
    if "last words" in dying:
        assert str(raised.value).endswith("log:\nlast words")


@pytest.mark.parametrize(
    "line, words",
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", "out of memory"),
        (
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "change mem_fraction_static",
        ),
        (
            "ValueError: Free memory on device (3/139 GiB) on startup is less than desired GPU memory",
            "out of memory",
        ),
        (
            "RuntimeError: The memory capacity is unbalanced. Some GPUs may be occupied by others.",
            "out of memory",
        ),
        (
            "[Errno 98] error while attempting to bind on ('127.0.0.1', 3): address already in use",
            "port is taken",
        ),
        (
            "python: Error while finding module specification for 'sglang.launch_server' "
            "(ModuleNotFoundError: No module named 'sglang')",
            "package sglang is missing",
        ),
        ("WARNING: No module named 'flash_attn', using another backend", "it was killed"),
        (
            "[06:38:57] (EngineCore pid=3) ERROR ValueError: no EAGLE in torch_native",
            "ValueError: no EAGLE in torch_nat",
        ),
        (
            "ValueError: Model architectures ['FooForCausalLM'] are not supported for now.",
            "model's architecture",
        ),
        (
            "The checkpoint has model type `foo` but Transformers does not recognize this architecture.",
            "architecture",
        ),
    ],
)
def test_known_causes(tmp_path, line, words):
    server = Server([], "", {}, tmp_path / "log", 1, "/h")
    server.log.write_text(
        f"starting\n{line}\nRuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert words in server.cause(137)


def test_a_command_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match=r"exit code 127.*\n.*No such file.*nobody"):
        Server(["/nobody"], "http://127.0.0.1:9", {}, tmp_path / "log", 9, "/h").__enter__()


def test_one_that_is_never_ready_is_given_up_and_ended(serve):
    server = serve("print('still loading', flush=True)\n" + CHILDREN, delay=60, ready_seconds=1.5)
    with pytest.raises(RunError, match=r"not ready after \d s: raise ready_seconds[^\n]*\n"):
        server.__enter__()
    assert not any(map(alive, pids_in(server.log)))


def test_death_after_the_start_is_noticed(serve):
    with serve(CHILDREN) as server:
        server.check()
        pids = pids_in(server.log)
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not any(map(alive, pids)), 5)
        with pytest.raises(RunError, match="exit code 137"):
            wait_until(lambda: server.check(), 5)


def test_a_killed_watcher_leaves_nothing(serve):
    with serve(CHILDREN) as server:
        pids = pids_in(server.log)
        server.process.kill()
        wait_until(lambda: not alive(pids[0]))
        with pytest.raises(RunError, match="exit code -9"):
            server.check()
        server.process.wait()
    wait_until(lambda: not alive(pids[1]))
    os.kill(pids[2], signal.SIGKILL)  # of a session of its own: out of reach without the watcher


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_run(serve, tmp_path, number):
    server = serve(CHILDREN)
    run = f"""
        from pathlib import Path
        import time
        from eagle3.engines.server import Server
        with Server({server.command!r}, {server.url!r}, {{}}, Path({str(server.log)!r}), 20, "/h"):
            print("ready", flush=True)
            time.sleep(60)
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(run)], stdout=subprocess.PIPE, text=True
    )
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
    assert choose_port(port, "benchmark.port") == port
    assert choose_port(0, "benchmark.port") > 0


def test_the_engine_of_an_interpreter():
    assert (
        find_package(sys.executable, ("no-such-engine", "pytest"), ">=1", "benchmark.python")
        == pytest.__version__
    )
    with pytest.raises(
        ConfigError, match=r"^no-such-engine is not installed for .* benchmark\.python="
    ):
        find_package(sys.executable, ("no-such-engine",), ">=1", "benchmark.python")
    with pytest.raises(ConfigError, match=r"^pytest .* is not one of the versions we know \(<1\)"):
        find_package(sys.executable, ("pytest",), "<1", "benchmark.python")
    with pytest.raises(ConfigError, match=r"^benchmark\.python=/nobody does not run"):
        find_package("/nobody", ("pytest",), "<1", "benchmark.python")
