"""Answering a dataset again: against a server that misbehaves on purpose, and with the built-in
engine.
"""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import spec_of
from eagle3.data.regenerate.journal import Journal
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate

from eagle3.data.regenerate import batches, builtin, server, servers, turns
from eagle3.data.rows import Conversation
from eagle3.data.sources import Row
from eagle3.errors import ConfigError, RunError
from eagle3.target.hf import HFTarget

ROOT = Path(__file__).parent.parent
PROBE = servers.PROBE["messages"]


class Fake(ThreadingHTTPServer):
    """An OpenAI-compatible server; `behave(handler, body, n)` may answer the n-th arrival of a
    request itself.

    Otherwise the answer is a digest of the history, so that a turn shows what it was asked with.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behave=lambda handler, body, n: False, delay=0.0, models=("target",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.delay, self.models = behave, delay, models
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.lock, self.bodies, self.probes, self.seen, self.keys = (
            threading.Lock(),
            [],
            [],
            Counter(),
            set(),
        )
        self.in_flight = self.most_in_flight = 0
        self.dead = False

    def __enter__(self):
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *error):
        self.die()

    def die(self):
        """No connection from now on, and those that are open break."""
        with self.lock:
            before, self.dead = self.dead, True
        if not before:
            self.shutdown()
            self.server_close()

    def handle_error(self, request, client_address):
        """Clients that went away are part of these tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def send(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (("Content-Length", len(data)), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.server.dead or self.path != "/v1/models":
            return self.send(404, {})
        self.send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        fake, text = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(text)
        with fake.lock:
            (fake.probes if body["messages"] == PROBE else fake.bodies).append(body)
            fake.seen[text] += 1
            fake.keys.add(self.headers.get("Authorization"))
            fake.in_flight += 1
            fake.most_in_flight = max(fake.in_flight, fake.most_in_flight)
            n = fake.seen[text]
        try:
            time.sleep(fake.delay)
            if fake.dead:
                self.close_connection = True
            elif not fake.behave(self, body, n):
                self.send(200, completion(echo(body["messages"])))
        finally:
            with fake.lock:
                fake.in_flight -= 1


def completion(content, end="stop", **message):
    message = {"role": "assistant", "content": content, **message}
    return {
        "choices": [{"message": message, "finish_reason": end}],
        "usage": {"completion_tokens": 5},
    }


def echo(messages):
    return "answer " + sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:12]


def expected(*questions, system=None):
    """The conversation that comes of an echoing server."""
    messages = [{"role": "system", "content": system}] if system else []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": echo(messages)})
    return messages


def row(line, *questions, file="data.jsonl"):
    turns = [
        m
        for q in questions
        for m in ({"role": "user", "content": q}, {"role": "assistant", "content": "old"})
    ]
    return Row(file, line, Conversation(turns))


def make_rows(count, num_turns=1):
    return [row(i + 1, *(f"question {i}.{k}" for k in range(num_turns))) for i in range(count)]


def make_run(system_prompt=None, max_length=64, **more):
    data = SimpleNamespace(system_prompt=system_prompt, max_length=max_length)
    return SimpleNamespace(
        config=SimpleNamespace(data=data, model=SimpleNamespace(path="target")), **more
    )


def ask(folder, fakes, rows, run=None, **options):
    urls = [fake if isinstance(fake, str) else fake.url for fake in fakes]
    folder.mkdir(exist_ok=True)
    facts = server(
        run or make_run(),
        iter(rows),
        folder,
        urls=urls,
        **{"concurrency": 4, "timeout": 5.0, **options},
    )
    assert facts["rows"] == facts["answered"] + sum(facts["rejected"].values())
    assert sorted(path.name for path in folder.iterdir()) == [
        "conversations.jsonl",
        "facts.json",
        "rejects.jsonl",
    ]
    return facts


def written(folder, name="conversations"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.005)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def dead_url():
    with socket.socket() as bound:  # but it does not listen, and nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


def test_turns_are_asked_with_our_own_answers_and_the_system_prompt(tmp_path):
    own_system = row(3, "c")
    own_system.conversation.messages.insert(0, {"role": "system", "content": "mine"})
    with Fake() as fake:
        facts = ask(
            tmp_path, [fake], [row(1, "a", "b"), row(2, "ü"), own_system], run=make_run("be brief")
        )
    assert [entry["id"] for entry in written(tmp_path)] == [
        "data.jsonl:1",
        "data.jsonl:2",
        "data.jsonl:3",
    ]
    assert [entry["messages"] for entry in written(tmp_path)] == [
        expected("a", "b", system="be brief"),
        expected("ü", system="be brief"),
        expected("c", system="mine"),
    ]
    assert facts["turns"] == 4 and facts["answer_tokens"] == 20 and facts["retries"] == 0
    assert fake.bodies[0]["model"] == "target" and fake.bodies[0]["max_tokens"] == 64
    assert not {"temperature", "top_p", "top_k", "seed"} & set(fake.bodies[0]) and fake.keys == {
        None
    }


def test_options_and_key_reach_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    options = {
        "model": "m",
        "max_new_tokens": 7,
        "temperature": 0.0,
        "top_k": 20,
        "seed": 3,
        "extra_body": extra,
    }
    with Fake() as fake:
        ask(tmp_path, [fake.url + "/"], [row(1, "a")], api_key_env="MY_KEY", **options)
    body = {"model": "m", "max_tokens": 7, "temperature": 0.0, "top_k": 20, "seed": 3, **extra}
    assert fake.bodies == [
        body | {"messages": [{"role": "user", "content": "a"}]}
    ] and fake.keys == {"Bearer secret"}


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    tools = row(3, "a")
    tools.conversation.tools = [{"type": "function", "function": {"name": "f"}}]
    calls = row(4, "a")
    calls.conversation.messages[1]["tool_calls"] = [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    rows = [
        Row("data.jsonl", 1, None, "broken JSON"),
        tools,
        calls,
    ]
    rows += [row(5, "fine"), row(6, "lone \ud800"), row(1, "other file", file="b.jsonl")]
    with Fake() as fake:
        facts = ask(tmp_path, [fake], rows)
    assert facts["rows"] == 6 and facts["answered"] == 2
    assert facts["rejected"] == {
        "broken JSON": 1,
        "tool calls cannot be answered again": 2,
        "bad UTF-8": 1,
    }
    assert [entry["line"] for entry in written(tmp_path, "rejects")] == [1, 3, 4, 6]
    assert written(tmp_path, "rejects")[0] == {
        "file": "data.jsonl",
        "line": 1,
        "reason": "broken JSON",
    }
    assert [entry["id"] for entry in written(tmp_path)] == ["data.jsonl:5", "b.jsonl:1"]


def drop(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


MISTAKES = {
    "HTTP 500": lambda handler: handler.send(500, {"error": {"message": "out of order"}}),
    "HTTP 429": lambda handler: handler.send(429, {}, [("Retry-After", "0.01")]),
    "malformed reply": lambda handler: handler.send(200, b'{"choices": '),
    "no choices": lambda handler: handler.send(200, {"object": "error", "message": "none"}),
    "no message": lambda handler: handler.send(200, {"choices": [{"text": "a"}]}),
    "empty answer": lambda handler: handler.send(200, completion(" ")),
    "finish reason abort": lambda handler: handler.send(200, completion("half", end="abort")),
    "connection failed": drop,
    "timed out": lambda handler: time.sleep(0.4),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_failed_attempts_are_repeated(tmp_path, kind):
    def behave(handler, body, n):
        wrong = n == 1 and body["messages"][-1]["content"].endswith(("3.0", "5.1"))
        if wrong:
            MISTAKES[kind](handler)
        return wrong

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(8, 2), timeout=0.2)
    assert facts["answered"] == 8 and facts["retries"] == 2
    assert [e["messages"] for e in written(tmp_path)] == [
        expected(f"question {i}.0", f"question {i}.1") for i in range(8)
    ]


def test_retry_after_is_honoured(tmp_path):
    def behave(handler, body, n):
        times.append(time.monotonic())
        if n == 1:
            handler.send(429, {}, [("Retry-After", "0.3")])
        return n == 1

    times = []
    with Fake(behave) as fake:
        ask(tmp_path, [fake], make_rows(1))
    assert 0.3 <= times[1] - times[0] < 1.0


def test_a_row_that_is_never_answered_is_rejected(tmp_path):
    def behave(handler, body, n):
        wrong = body["messages"][0]["content"] in ("question 2.0", "question 9.0")
        if wrong:
            handler.send(500, {"error": "it crashes me"})
        return wrong

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(10), retries=2)
    assert (
        facts["rejected"] == {"no answer after 3 attempts: HTTP 500": 2} and facts["retries"] == 4
    )
    assert [entry["line"] for entry in written(tmp_path, "rejects")] == [3, 10]


def test_requests_that_a_server_refuses_are_counted_by_its_words(tmp_path):
    def behave(handler, body, n):
        number = int(body["messages"][0]["content"].split()[1].split(".")[0])
        if number % 4 == 0:
            message = f"context length is 4096, the prompt has {5000 + number} tokens\nand more"
            handler.send(400, {"error": {"message": message}})
        return number % 4 == 0

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(10))
    assert (
        facts["rejected"] == {"HTTP 400: context length is N, the prompt has N tokens": 3}
        and facts["answered"] == 7
    )
    assert max(fake.seen.values()) == 1


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "OPENAI|api_key_env"), (403, "api_key_env"), (404, "regenerate.model")],
)
def test_wrong_key_model_or_address_ends_the_stage(tmp_path, monkeypatch, status, remedy):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    refuse = Fake(lambda handler, body, n: not handler.send(status, {"error": "not secret-key"}))
    with refuse as fake, pytest.raises(RunError, match=remedy) as error:
        ask(tmp_path, [fake], make_rows(20), model="target")
    assert "0 rows are done" in str(error.value) and "secret-key" not in str(error.value)
    assert "secret-key" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_a_refusing_server_that_answers_nothing_is_asked_again_later(tmp_path):
    with Fake(lambda handler, body, n: not handler.send(400, {"detail": "too long"})) as fake:
        with pytest.raises(RunError, match=r"none of the 5 rows .*5 x HTTP 400: too long"):
            ask(tmp_path, [fake], make_rows(5))
        fake.behave = lambda handler, body, n: False
        assert ask(tmp_path, [fake], make_rows(5))["answered"] == 5


def test_several_servers_are_used_evenly_and_within_the_bound(tmp_path):
    with Fake(delay=0.02) as first, Fake(delay=0.02) as second:
        ask(tmp_path, [first, second], make_rows(60), concurrency=3)
    assert first.most_in_flight == second.most_in_flight == 3
    assert (
        min(len(first.bodies), len(second.bodies)) >= 24 and len(first.bodies + second.bodies) == 60
    )


def test_a_dead_and_a_dying_server_cost_nothing(tmp_path, dead_url, capsys):
    def behave(handler, body, n):
        if len(dying.bodies) >= 10:
            threading.Thread(target=dying.die).start()
            time.sleep(0.05)
        return False

    with Fake(delay=0.005) as good, Fake(behave, delay=0.005) as dying:
        facts = ask(tmp_path, [dead_url, dying, good], make_rows(60))
    assert facts["answered"] == 60 and len(good.bodies) >= 40
    assert f"{dead_url} fails (connection failed" in capsys.readouterr().out


def test_a_server_that_comes_back_is_used_again_when_it_answers_a_probe(tmp_path):
    def behave(handler, body, n):
        down = len(first.bodies + first.probes) <= 3
        return down and not handler.send(503, {})

    with Fake(behave) as first, Fake(delay=0.02) as second:
        facts = ask(tmp_path, [first, second], make_rows(40), concurrency=1)
    assert facts["answered"] == 40 and facts["retries"] == 1
    assert len(first.probes) == 3 and len(first.bodies) >= 20


def test_a_server_that_is_busy_is_not_given_up(tmp_path):
    """It refuses for longer than all pauses take, while a request of ours is under way there."""

    def behave(handler, body, n):
        if body["messages"][0]["content"] == "question 0.0":
            time.sleep(0.5)
            busy.clear()
            return False
        time.sleep(0.05)
        return bool(busy) and not handler.send(429, {})

    busy = ["yes"]
    with Fake(behave) as fake:
        assert ask(tmp_path, [fake], make_rows(4), retries=2)["answered"] == 4


def test_all_servers_dead_is_one_sentence_and_resumable(tmp_path, dead_url):
    dying = Fake(
        lambda handler, body, n: (len(fake.bodies) > 8 and fake.die()) or fake.dead, delay=0.01
    )
    with dying as fake, pytest.raises(RunError, match="no server answers any more") as error:
        ask(tmp_path, [dead_url, fake], make_rows(30), timeout=1.0)
    done = len((tmp_path / "journal.jsonl").read_text().splitlines())
    assert f"{done} rows are done and kept, and the same command goes on" in str(error.value)
    assert dead_url in str(error.value) and fake.url in str(error.value) and 4 <= done <= 8
    with pytest.raises(RunError, match=r"no server names its model .*set regenerate\.urls"):
        ask(tmp_path, [dead_url], make_rows(30), retries=2)
    with Fake() as fake:
        facts = ask(tmp_path, [fake], make_rows(30))
    assert facts["answered"] == 30 and len(fake.bodies) == 30 - done


def test_servers_that_only_fail_end_the_stage(tmp_path):
    with Fake(lambda handler, body, n: not handler.send(500, {"error": "engine died"})) as fake:
        with pytest.raises(
            RunError, match=r"no server answers any more \(.*HTTP 500: engine died\); 0 rows"
        ):
            ask(tmp_path, [fake], make_rows(30), retries=2)
        fake.behave = lambda handler, body, n: False
        facts = ask(tmp_path, [fake], make_rows(30))
    assert facts["answered"] == 30 and not written(tmp_path, "rejects")


def test_reasoning_is_kept_but_not_sent_back(tmp_path):
    replies = {
        "a": completion("4", reasoning_content="2 + 2"),
        "b": completion("5", reasoning="2 + 3"),
        "c": completion("<think>\n2 + 4\n</think>\n\n6"),
        "d": completion(None, end="length", reasoning_content="2 + 5 +"),
    }
    with Fake(
        lambda handler, body, n: not handler.send(200, replies[body["messages"][-1]["content"]])
    ) as fake:
        facts = ask(tmp_path, [fake], [row(1, "a", "b", "c", "d", "never asked")])
    answers = [m for m in written(tmp_path)[0]["messages"] if m["role"] == "assistant"]
    assert [(m["reasoning_content"], m["content"]) for m in answers] == [
        ("2 + 2", "4"),
        ("2 + 3", "5"),
        ("2 + 4", "6"),
        ("2 + 5 +", ""),
    ]
    assert answers[-1]["truncated"] and facts["truncated"] == 1 and facts["turns"] == 4
    assert all(set(m) == {"role", "content"} for body in fake.bodies for m in body["messages"])
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == [
        "a",
        "4",
        "b",
        "5",
        "c",
        "6",
        "d",
    ]


def test_a_cut_answer_ends_the_conversation(tmp_path):
    with Fake(
        lambda handler, body, n: not handler.send(200, completion("and then", end="length"))
    ) as fake:
        facts = ask(tmp_path, [fake], [row(1, "a", "b")])
    last = {"role": "assistant", "content": "and then", "truncated": True}
    assert written(tmp_path)[0]["messages"] == [{"role": "user", "content": "a"}, last]
    assert facts["truncated"] == facts["turns"] == len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain", ("", "plain")),
        ("<think>a</think>b", ("a", "b")),
        ("a\n</think>\n\nb", ("a", "b")),
        ("<think>\n\n</think>\n\nb", ("", "b")),
        ("\n<think>a and", ("a and", "")),
    ],
)
def test_thinking_within_the_content_is_reasoning(text, parts):
    message = turns.answer(text, None, truncated=True)
    assert (message.get("reasoning_content", ""), message["content"]) == parts


def test_the_final_file_does_not_depend_on_the_order_of_completion(tmp_path):
    def behave(handler, body, n):
        time.sleep(int(sha256(body["messages"][0]["content"].encode()).hexdigest()[:2], 16) / 10000)
        return False

    rows = [
        row(i + 1, f"{name} {i}", file=name) for name in ("z.jsonl", "a.jsonl") for i in range(20)
    ]
    files = []
    for folder, behaviour, concurrency in (("slow", behave, 8), ("fast", lambda *_: False, 1)):
        with Fake(behaviour) as fake:
            ask(tmp_path / folder, [fake], rows, concurrency=concurrency)
        files.append((tmp_path / folder / "conversations.jsonl").read_bytes())
    assert files[0] == files[1]
    ids = [entry["id"] for entry in written(tmp_path / "fast")]
    assert ids == [f"{name}:{i + 1}" for name in ("z.jsonl", "a.jsonl") for i in range(20)]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_regenerate import make_rows, make_run, server
for name in ("interrupted", "killed"):
    try:
        server(make_run(), iter(make_rows(200, 2)), Path(sys.argv[3]), urls=[sys.argv[2]], concurrency=4)
    except KeyboardInterrupt:
        print(name, flush=True)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    folder, journal = tmp_path / "killed", tmp_path / "killed" / "journal.jsonl"
    folder.mkdir()

    def wait_for(rows):
        while not journal.exists() or len(journal.read_bytes().splitlines()) < rows:
            assert child.poll() is None, "the child ended before it was killed"
            time.sleep(0.01)

    with Fake(delay=0.01) as fake:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), fake.url, str(folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        wait_for(20)
        child.send_signal(signal.SIGINT)
        assert b"interrupted\n" in (child.stdout.readline(), child.stdout.readline())
        wait_for(80)
        child.kill()
        child.communicate()
        lines = journal.read_bytes().splitlines()
        assert len({json.loads(line)["line"] for line in lines}) == len(lines) < 150
        with journal.open("ab") as stream:
            stream.write(lines[0][: len(lines[0]) // 2])
        asked = len(fake.bodies)
        facts = ask(folder, [fake], make_rows(200, 2))
        assert len(fake.bodies) - asked == 2 * (200 - len(lines))
        ask(tmp_path / "whole", [fake], make_rows(200, 2))
    assert facts["answered"] == 200 and facts["turns"] == 400 and facts["answer_tokens"] == 2000
    assert (folder / "conversations.jsonl").read_bytes() == (
        tmp_path / "whole" / "conversations.jsonl"
    ).read_bytes()


def test_a_call_after_the_end_only_returns_the_facts(tmp_path, dead_url):
    with Fake() as fake:
        facts = ask(tmp_path, [fake], make_rows(3))
    (tmp_path / "journal.jsonl").write_text("killed before it was removed")
    assert server(make_run(), iter([]), tmp_path, urls=[dead_url]) == facts


def test_the_model_must_be_clear(tmp_path):
    with (
        Fake(models=("a",)) as first,
        Fake(models=("b",)) as second,
        pytest.raises(RunError, match=r"\(a, b\).*model"),
    ):
        ask(tmp_path, [first, second], make_rows(1))
    with (
        Fake(models=()) as none,
        pytest.raises(RunError, match=r"lists no model.* or regenerate\.model"),
    ):
        ask(tmp_path, [none], make_rows(1))


def test_progress_knows_how_much_is_left(tmp_path):
    first = row(1, "a")
    with Journal(tmp_path) as journal:
        journal.write(0, first, {"messages": []})
        assert journal.progress.tasks[0].completed == 1 and journal.progress.tasks[0].total is None
    first.share = 0.25
    with Journal(tmp_path) as journal:
        journal.write(1, first, {"messages": []})
        assert journal.progress.tasks[0].completed == 2 and journal.progress.tasks[0].total == 8


@pytest.mark.parametrize(
    "urls", [[], ["127.0.0.1:1"], ["http://a:b/v1"], ["http://127.0.0.1:1/v1", "http://"]]
)
def test_urls_that_are_none(tmp_path, urls):
    with pytest.raises(ConfigError, match=r"regenerate\.urls"):
        server(make_run(), iter([]), tmp_path, urls=urls)


@pytest.mark.parametrize("name", ["server", "builtin"])
def test_every_key_of_the_files_is_a_parameter(name):
    with initialize_config_dir(str(ROOT / "conf" / "regenerate"), version_base=None):
        config = compose(name)
    partial = instantiate(config)
    assert partial.func is get_method(f"eagle3.data.regenerate.{name}")
    parameters = partial.func.__kwdefaults__
    assert all(
        parameters[key] == value or key == "extra_body"
        for key, value in partial.keywords.items()
        if key != "urls"
    )
    assert partial.keywords.keys() == parameters.keys() | ({"urls"} if name == "server" else set())


@pytest.fixture(scope="module")
def engine(target_folder, tokenizer):
    """A run whose target often ends its turn, as an untrained one with many ends does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size more only wait for each other
    target = HFTarget(spec_of(target_folder), torch.device("cpu"))
    target.model.generation_config.eos_token_id = list(range(0, len(tokenizer), 8))

    def encode_prompt(messages, tools=None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    yield make_run(
        target=target, chat=SimpleNamespace(encode_prompt=encode_prompt, tokenizer=tokenizer)
    )
    torch.set_num_threads(threads)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_builtin_resumed_equals_uninterrupted(tmp_path, engine, temperature):
    rows = [row(i + 1, *(f"explain `f{i}`" for _ in range(1 + i % 3))) for i in range(11)]
    rows[4] = Row("data.jsonl", 5, None, "broken JSON")
    rows[6] = row(7, "long " * 600)
    options = {
        "batch_size": 4,
        "max_new_tokens": 12,
        "temperature": temperature,
        "top_k": 50,
        "seed": 3,
    }

    def interrupted():
        yield from rows[:9]
        raise KeyboardInterrupt

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for path in (whole, folder):
        path.mkdir()
    facts = builtin(engine, iter(rows), whole, **options)
    with pytest.raises(KeyboardInterrupt):
        builtin(engine, interrupted(), folder, **options)
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    journal.write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    assert builtin(engine, iter(rows), folder, **options) == facts
    for name in ("conversations.jsonl", "rejects.jsonl"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()
    assert facts["rows"] == 11 == facts["answered"] + sum(facts["rejected"].values())
    assert (
        facts["rejected"]["broken JSON"]
        == facts["rejected"]["the prompt is longer than the target's context"]
        == 1
    )
    answers = [
        [m for m in entry["messages"] if m["role"] == "assistant"] for entry in written(whole)
    ]
    assert facts["turns"] == sum(map(len, answers)) > facts["answered"] > facts["truncated"]
    assert all("truncated" not in message for answer in answers for message in answer[:-1])


def test_builtin_greedy_answers_are_those_of_one_row_alone(tmp_path, engine):
    rows = [row(i + 1, "explain " + "this " * i) for i in range(5)]
    for size in (1, 5):
        (tmp_path / str(size)).mkdir()
        builtin(engine, iter(rows), tmp_path / str(size), batch_size=size, max_new_tokens=12)
    assert written(tmp_path / "1") == written(tmp_path / "5")


def test_builtin_reads_thinking_that_the_prompt_opens(tmp_path, engine, monkeypatch):
    tokenizer = engine.chat.tokenizer
    prompt, answer = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("Hello <think>\n", "one")
    )
    chat = SimpleNamespace(encode_prompt=lambda messages: prompt, tokenizer=tokenizer)
    monkeypatch.setattr(
        batches,
        "sample",
        lambda target, prompts, longest, sampling: [[*answer, 1] for _ in prompts],
    )
    builtin(make_run(target=engine.target, chat=chat), iter([row(1, "a")]), tmp_path)
    message = written(tmp_path)[0]["messages"][1]
    assert message["reasoning_content"].startswith("one") and message["truncated"]
