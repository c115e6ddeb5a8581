"""Answering a dataset again: against a server that misbehaves on purpose, and with the built-in
engine.
"""

import functools
import json
import multiprocessing
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import compose_config, section, spec_of
from hydra.utils import instantiate
from omegaconf import OmegaConf

from eagle3.config import Source
from eagle3.data.chat import Chat
from eagle3.data.regenerate import Journal, finish, regenerate, split_thinking
from eagle3.data.rows import Conversation
from eagle3.data.sources import Row, find_files
from eagle3.errors import ConfigError, RunError
from eagle3.target.hf import HFTarget

platform.processor()  # the openai client asks for it, which once starts a process


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
        self.lock, self.seen, self.keys = threading.Lock(), Counter(), set()
        self.bodies = []
        self.in_flight = self.most_in_flight = 0
        self.dead = False

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
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
        length, kind = ("Content-Length", len(data)), ("Content-Type", "application/json")
        for name, value in (length, kind, *headers):
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
            fake.bodies.append(body)
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
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": "old"})
    return Row(file, line, Conversation(messages))


def make_rows(count, num_turns=1):
    return [row(i + 1, *(f"question {i}.{k}" for k in range(num_turns))) for i in range(count)]


@functools.cache
def asks(kind):
    composed = compose_config("model=hf", "model.path=x", f"regenerate={kind}")
    return OmegaConf.to_container(composed.regenerate)


def answerer(kind, **options):
    """conf/regenerate/<kind>.yaml with other values."""
    return instantiate(asks(kind) | options)


def answer(answerer, folder, rows, system_prompt=None, chat=None, target=None):
    folder.mkdir(exist_ok=True)
    data = section("data", system_prompt=system_prompt, max_length=64)
    with (folder / "journal.jsonl").open("a+b") as stream:
        journal = Journal(stream)
        answerer.answer(iter(rows), journal, data, chat, target)
        facts = finish(folder, journal)
    assert facts["rows"] == facts["answered"] + sum(facts["rejected"].values())
    return facts


def ask(folder, fakes, rows, system_prompt=None, **options):
    urls = [fake if isinstance(fake, str) else fake.url for fake in fakes]
    servers = answerer("server", urls=urls, **{"concurrency": 4, "timeout": 5.0, **options})
    return answer(servers, folder, rows, system_prompt)


def number_of(body):
    """Which row of `make_rows` is asked."""
    return int(body["messages"][0]["content"].split()[1].split(".")[0])


def written(folder, name="conversations"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def dead_url():
    with socket.socket() as bound:  # but it does not listen, and nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


def test_turns_are_asked_with_our_own_answers_and_the_system_prompt(tmp_path):
    own_system = row(3, "c")
    own_system.conversation.messages.insert(0, {"role": "system", "content": "mine"})
    rows = [row(1, "a", "b"), row(2, "ü"), own_system]
    with Fake() as fake:
        facts = ask(tmp_path, [fake], rows, "be brief")
    assert [entry["id"] for entry in written(tmp_path)] == [f"data.jsonl:{i}" for i in (1, 2, 3)]
    assert [entry["messages"] for entry in written(tmp_path)] == [
        expected("a", "b", system="be brief"),
        expected("ü", system="be brief"),
        expected("c", system="mine"),
    ]
    assert facts["turns"] == 4 and facts["answer_tokens"] == 20 and facts["retries"] == 0
    assert fake.bodies[0]["model"] == "target" and fake.bodies[0]["max_tokens"] == 64
    assert not {"temperature", "top_p", "top_k", "seed"} & set(fake.bodies[0])
    assert fake.keys == {None}


def test_options_and_key_reach_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    sampling = {"temperature": 0.0, "top_k": 20, "seed": 3}
    options = {"model": "m", "max_new_tokens": 7, "extra_body": extra, **sampling}
    with Fake() as fake:
        ask(tmp_path, [fake.url + "/"], [row(1, "a")], api_key_env="MY_KEY", **options)
    asked = {"messages": [{"role": "user", "content": "a"}], "model": "m", "max_tokens": 7}
    assert fake.bodies == [{**asked, **sampling, **extra}] and fake.keys == {"Bearer secret"}


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tools, calls = row(3, "a"), row(4, "a")
    tools.conversation.tools = [{"type": "function", "function": {"name": "f"}}]
    calls.conversation.messages[1]["tool_calls"] = [call]
    rows = [Row("data.jsonl", 1, None, "broken JSON"), tools, calls]
    rows += [row(5, "fine"), row(6, "lone \ud800"), row(1, "other file", file="b.jsonl")]
    with Fake() as fake:
        facts = ask(tmp_path, [fake], rows)
    no_calls = "tool calls cannot be answered again"
    assert facts["rejected"] == {"broken JSON": 1, no_calls: 2, "bad UTF-8": 1}
    rejects = written(tmp_path, "rejects")
    assert [entry["line"] for entry in rejects] == [1, 3, 4, 6]
    assert rejects[0] == {"file": "data.jsonl", "line": 1, "reason": "broken JSON"}
    assert [entry["id"] for entry in written(tmp_path)] == ["data.jsonl:5", "b.jsonl:1"]


def drop(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


FAULTS = {
    "HTTP 500: out of order": lambda handler: handler.send(
        500, {"error": {"message": "out of order"}}
    ),
    "HTTP 429: {}": lambda handler: handler.send(429, {}, [("Retry-After", "0.01")]),
    "Connection error.": drop,
    "Request timed out.": lambda handler: time.sleep(1.5),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_of_a_server_are_repeated(tmp_path, kind):
    def behave(handler, body, n):
        wrong = n == 1 and body["messages"][-1]["content"].endswith(("3.0", "5.1"))
        if wrong:
            FAULTS[kind](handler)
        return wrong

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(8, 2), timeout=1.0)
    assert facts["answered"] == 8 and facts["retries"] >= 2
    assert [e["messages"] for e in written(tmp_path)] == [
        expected(f"question {i}.0", f"question {i}.1") for i in range(8)
    ]


USELESS = {
    "malformed reply": [b'{"choices": ', {"choices": [{"text": "a"}]}, completion(["a"])],
    "empty answer": [completion(" "), completion("<think>a</think> ")],
    "finish reason abort": [completion("half", end="abort")],
}


@pytest.mark.parametrize("reason", USELESS)
def test_replies_without_an_answer_are_counted(tmp_path, reason):
    replies = USELESS[reason]

    def behave(handler, body, n):
        number = number_of(body)
        return number < len(replies) and not handler.send(200, replies[number])

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(5))
    assert facts["rejected"] == {reason: len(replies)} and max(fake.seen.values()) == 1


@pytest.mark.parametrize("kind", ["HTTP 500: out of order", "Connection error."])
def test_a_row_that_is_never_answered_is_rejected(tmp_path, kind):
    fault = FAULTS[kind]

    def behave(handler, body, n):
        wrong = body["messages"][0]["content"] in ("question 2.0", "question 9.0")
        return wrong and not fault(handler)

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(10), retries=2)
    assert facts["rejected"] == {kind: 2}
    assert [entry["line"] for entry in written(tmp_path, "rejects")] == [3, 10]
    assert max(fake.seen.values()) == 3


def test_requests_that_a_server_refuses_are_counted_by_its_words(tmp_path):
    def behave(handler, body, n):
        number = number_of(body)
        message = f"context length is 4096, the prompt has {5000 + number} tokens\nand more"
        return number % 4 == 0 and not handler.send(400, {"error": {"message": message}})

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(10))
    assert facts["rejected"] == {"HTTP 400: context length is N, the prompt has N tokens": 3}
    assert max(fake.seen.values()) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_model_or_address_ends_the_stage(tmp_path, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    refuse = Fake(lambda handler, body, n: not handler.send(status, {"error": "not secret-key"}))
    with refuse as fake, pytest.raises(RunError, match=r"regenerate\.model.*api_key_env") as error:
        ask(tmp_path, [fake], make_rows(20), model="target")
    assert "secret-key" not in str(error.value)
    assert "secret-key" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_a_refusing_server_that_answers_nothing_is_asked_again_later(tmp_path):
    with Fake(lambda handler, body, n: not handler.send(400, {"message": "too long"})) as fake:
        with pytest.raises(RunError, match=r"none of the 5 rows .*5 x HTTP 400: too long"):
            ask(tmp_path, [fake], make_rows(5))
        fake.behave = lambda handler, body, n: False
        assert ask(tmp_path, [fake], make_rows(5))["answered"] == 5


def test_several_servers_share_the_requests_within_the_bound(tmp_path):
    with Fake(delay=0.02) as first, Fake(delay=0.02) as second:
        ask(tmp_path, [first, second], make_rows(60), concurrency=3)
    assert max(first.most_in_flight, second.most_in_flight) <= 3
    assert min(len(first.bodies), len(second.bodies)) >= 10
    assert len(first.bodies + second.bodies) == 60


@pytest.mark.parametrize("model", ["target", None])
def test_a_dead_server_costs_no_row(tmp_path, dead_url, model):
    with Fake(delay=0.005) as good:
        facts = ask(tmp_path, [dead_url, good], make_rows(200), model=model, retries=1)
    assert facts["answered"] == len(good.bodies) == 200


@pytest.mark.parametrize("way", ["dies", "fails"])
def test_servers_that_answer_no_more_end_the_stage_and_lose_no_row(tmp_path, way):
    def behave(handler, body, n):
        if number_of(body) < 8:
            return False
        return not (drop(handler) if way == "dies" else handler.send(500, {"message": "died"}))

    with Fake(behave) as fake, pytest.raises(RunError, match="rows in a row") as error:
        ask(tmp_path, [fake], make_rows(40), retries=1, concurrency=1)
    assert "8 rows are done and kept, and the same command goes on" in str(error.value)
    assert fake.url in str(error.value)
    with Fake() as fake:
        facts = ask(tmp_path, [fake], make_rows(40))
    assert facts["answered"] == 40 and len(fake.bodies) == 32


def test_reasoning_is_kept_but_not_sent_back(tmp_path):
    replies = {
        "a": completion("4", reasoning_content="2 + 2"),
        "b": completion("5", reasoning="2 + 3"),
        "c": completion("<think>\n2 + 4\n</think>\n\n6"),
        "d": completion(None, end="length", reasoning_content="2 + 5 +"),
    }

    def behave(handler, body, n):
        return not handler.send(200, replies[body["messages"][-1]["content"]])

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], [row(1, "a", "b", "c", "d", "never asked")])
    answers = [m for m in written(tmp_path)[0]["messages"] if m["role"] == "assistant"]
    assert [(m["reasoning_content"], m["content"]) for m in answers] == [
        ("2 + 2", "4"), ("2 + 3", "5"), ("2 + 4", "6"), ("2 + 5 +", ""),
    ]  # fmt: skip
    assert answers[-1]["truncated"] and facts["truncated"] == 1 and facts["turns"] == 4
    assert all(set(m) == {"role", "content"} for body in fake.bodies for m in body["messages"])
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == [*"a4b5c6d"]


def test_a_cut_answer_ends_the_conversation(tmp_path):
    def behave(handler, body, n):
        return not handler.send(200, completion("and then", end="length"))

    with Fake(behave) as fake:
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
    assert split_thinking(text, "") == parts[::-1]


def test_the_final_file_does_not_depend_on_the_order_of_completion(tmp_path):
    def behave(handler, body, n):
        time.sleep(int(sha256(body["messages"][0]["content"].encode()).hexdigest()[:2], 16) / 10000)
        return False

    names = ("z.jsonl", "a.jsonl")
    rows = [row(i + 1, f"{name} {i}", file=name) for name in names for i in range(20)]
    for folder, behaviour, concurrency in (("slow", behave, 8), ("fast", lambda *_: False, 1)):
        with Fake(behaviour) as fake:
            ask(tmp_path / folder, [fake], rows, concurrency=concurrency)
    slow, fast = (tmp_path / folder / "conversations.jsonl" for folder in ("slow", "fast"))
    assert slow.read_bytes() == fast.read_bytes()
    ids = [entry["id"] for entry in written(tmp_path / "fast")]
    assert ids == [f"{name}:{i + 1}" for name in names for i in range(20)]


@pytest.mark.runs
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    folder, journal = tmp_path / "killed", tmp_path / "killed" / "journal.jsonl"

    limit = [20]  # from this row on the server waits, so that the child cannot get through

    def behave(handler, body, n):
        while number_of(body) >= limit[0]:
            time.sleep(0.01)
        return False

    def ask_twice(pipe):
        for _ in range(2):
            try:
                ask(folder, [fake], make_rows(200, 2), timeout=600)
            except KeyboardInterrupt:
                pipe.send("interrupted")

    def wait_for(rows):
        while not journal.exists() or len(journal.read_bytes().splitlines()) < rows:
            assert child.is_alive(), "the child ended before it was killed"
            time.sleep(0.01)

    with Fake(behave) as fake:
        receiver, sender = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        child = context.Process(target=ask_twice, args=(sender,))
        child.start()
        wait_for(limit[0])
        os.kill(child.pid, signal.SIGINT)
        assert receiver.recv() == "interrupted"
        limit[0] = 80
        wait_for(limit[0])
        child.kill()
        child.join()
        lines = journal.read_bytes().splitlines()
        assert len({json.loads(line)["line"] for line in lines}) == len(lines) == limit[0]
        with journal.open("ab") as stream:
            stream.write(lines[0][: len(lines[0]) // 2])
        limit[0], asked = 200, len(fake.bodies)
        facts = ask(folder, [fake], make_rows(200, 2))
        assert len(fake.bodies) - asked == 2 * (200 - len(lines))
        ask(tmp_path / "whole", [fake], make_rows(200, 2))
    assert facts["answered"] == 200 and facts["turns"] == 400 and facts["answer_tokens"] == 2000
    whole = tmp_path / "whole" / "conversations.jsonl"
    assert (folder / "conversations.jsonl").read_bytes() == whole.read_bytes()


def test_the_stage_answers_every_source_once(tmp_path, tokenizer, dead_url):
    rows = [{"messages": row(1, f"question {i}").conversation.messages} for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    files = find_files(Source(str(path)), "")
    sources = [(Source(str(path), weight=weight), files) for weight in (0.5, 2.0)]
    target = SimpleNamespace(spec=SimpleNamespace(identity="target", dtype="bfloat16"))
    with Fake() as fake:
        asked = (section("data"), sources, Chat(tokenizer), target, str(tmp_path))
        again, paths = regenerate(asks("server") | {"urls": [fake.url]}, *asked)
    assert [source.weight for source, _ in again] == [1.0, 2.0]
    counts = [len(written(path)) for path in paths]
    assert 8 < counts[0] < 32 and counts[1] == 40
    names = {file.name for file in paths[0].iterdir()}
    assert names == {"artefact.json", "conversations.jsonl", "rejects.jsonl"}
    # where the answers come from changes nothing, so they are found again
    assert regenerate(asks("server") | {"urls": [dead_url], "retries": 0}, *asked) == (again, paths)
    target.spec.dtype = "float32"  # which decides over answers
    with pytest.raises(RunError, match="lists no model"):
        regenerate(asks("server") | {"urls": [dead_url], "retries": 0}, *asked)


def test_the_model_must_be_clear(tmp_path, dead_url):
    for models, words in (("a", "b"), "the models a, b"), ((), "the models none"):
        with Fake(models=models) as fake, pytest.raises(RunError, match=words):
            ask(tmp_path, [fake], make_rows(1))
    differ = pytest.raises(RunError, match=r"different models \(a, b\)")
    with Fake(models=("a",)) as a, Fake(models=("b",)) as b, differ:
        ask(tmp_path, [a, b], make_rows(1))
    with pytest.raises(RunError, match=r"lists no model.*regenerate\.urls"):
        ask(tmp_path, [dead_url], make_rows(1), retries=1)


@pytest.mark.parametrize(
    "urls", [[], ["127.0.0.1:1"], ["http://a:b/v1"], ["http://127.0.0.1:1/v1", "http://"]]
)
def test_urls_that_are_none(tmp_path, urls):
    with pytest.raises(ConfigError, match=r"regenerate\.urls"):
        ask(tmp_path, urls, [])


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match="pip install"):
        ask(tmp_path, ["http://127.0.0.1:1/v1"], [])


@pytest.fixture(scope="module")
def engine(target_folder, tokenizer):
    """A target that often ends its turn, as an untrained one with many ends does; and its chat."""
    target = HFTarget(spec_of(target_folder), torch.device("cpu"))
    target.eos_token_ids = set(range(0, len(tokenizer), 8))
    return {"target": SimpleNamespace(load=lambda: target), "chat": Chat(tokenizer)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_builtin_resumed_equals_uninterrupted(tmp_path, engine, temperature):
    rows = [row(i + 1, *(f"explain `f{i}`" for _ in range(1 + i % 3))) for i in range(11)]
    rows[4] = Row("data.jsonl", 5, None, "broken JSON")
    rows[6] = row(7, "long " * 600)
    sampling = {"temperature": temperature, "top_k": 50, "seed": 3}
    builtin = answerer("builtin", batch_size=4, max_new_tokens=12, **sampling)

    def interrupted():
        yield from rows[:9]
        raise KeyboardInterrupt

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    facts = answer(builtin, whole, rows, **engine)
    with pytest.raises(KeyboardInterrupt):
        answer(builtin, folder, interrupted(), **engine)
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    journal.write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    assert answer(builtin, folder, rows, **engine) == facts
    for name in ("conversations.jsonl", "rejects.jsonl"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()
    too_long = "the prompt is longer than the target's context"
    assert facts["rejected"]["broken JSON"] == facts["rejected"][too_long] == 1
    messages = [[m for m in e["messages"] if m["role"] == "assistant"] for e in written(whole)]
    assert facts["turns"] == sum(map(len, messages)) > facts["answered"] > facts["truncated"]
    assert not any("truncated" in message for said in messages for message in said[:-1])


def test_builtin_greedy_answers_are_those_of_one_row_alone(tmp_path, engine):
    rows = [row(i + 1, "explain " + "this " * i) for i in range(5)]
    for size in (1, 5):
        builtin = answerer("builtin", batch_size=size, max_new_tokens=12)
        answer(builtin, tmp_path / str(size), rows, **engine)
    assert written(tmp_path / "1") == written(tmp_path / "5")


def test_builtin_reads_thinking_that_the_prompt_opens(tmp_path, engine, monkeypatch):
    chat = engine["chat"]
    said = [*chat.tokenize("one"), 1]
    monkeypatch.setattr(chat, "encode_prompt", lambda messages: chat.tokenize("Hello <think>\n"))
    target = engine["target"].load()
    monkeypatch.setattr(target, "generate", lambda prompts, *_: [said for _ in prompts])
    answer(answerer("builtin"), tmp_path, [row(1, "a")], **engine)
    message = written(tmp_path)[0]["messages"][1]
    assert message["reasoning_content"].startswith("one") and message["truncated"]
