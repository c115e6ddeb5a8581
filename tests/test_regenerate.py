"""Answering a dataset again: from a server that misbehaves on purpose, and built in."""

import functools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, UNSHOWN, compose_config, read_jsonl, section, spec_of, turns, write_jsonl
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from eagle3.config import Source, instantiate
from eagle3.data.chat import Chat
from eagle3.data.regenerate import (
    Dialogue,
    Journal,
    finish,
    regenerate,
    split_thinking,
    unanswered,
)  # fmt: skip
from eagle3.data.rows import Conversation
from eagle3.data.sources import Row, find_files
from eagle3.errors import ConfigError, RunError
from eagle3.runs.artefact import read_facts
from eagle3.runs.progress import Progress
from eagle3.target.hf import HFTarget
from eagle3.target.weights import load_weights

CHAT = Chat(AutoTokenizer.from_pretrained(TINY / "target"))
platform.processor()  # the openai client asks for it, which once starts a process


class Fake(ThreadingHTTPServer):
    """An OpenAI-compatible server; `behave(handler, body, n)` may answer the n-th arrival of a
    request itself, else the answer is a digest of the history, which shows what was asked.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behave=lambda handler, body, n: False, delay=0.0, models=("target",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.delay, self.models = behave, delay, models
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.lock, self.seen, self.keys, self.bodies = threading.Lock(), Counter(), set(), []
        self.in_flight = self.most_in_flight = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def send(self, status, content, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content_Length": len(data)} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        assert self.path == "/v1/models"
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
            if not fake.behave(self, body, n):
                self.send(200, completion(echo(body["messages"])))
        finally:
            with fake.lock:
                fake.in_flight -= 1


def completion(content, end="stop", **message):
    message = {"role": "assistant", "content": content, **message}
    choice = {"message": message, "finish_reason": end}
    return {"choices": [choice], "usage": {"completion_tokens": 5}}


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
    return Row(file, line, Conversation(turns(*(x for q in questions for x in (q, "old")))))


def make_rows(count, num_turns=1):
    return [row(i + 1, *(f"question {i}.{k}" for k in range(num_turns))) for i in range(count)]


@functools.cache
def asks(kind):
    composed = compose_config("model=hf", "model.path=x", f"regenerate={kind}")
    return OmegaConf.to_container(composed.regenerate)


def answer(folder, rows, kind="builtin", system_prompt=None, chat=CHAT, target=None, **options):
    """The facts of a call with conf/regenerate/<kind>.yaml and other values."""
    folder.mkdir(exist_ok=True)
    answerer = instantiate(asks(kind) | options)
    with Journal(folder / "journal.jsonl", chat, UNSHOWN) as journal:
        asking = unanswered(iter(rows), journal, system_prompt)
        answerer.answer(asking, journal, answerer.max_new_tokens or 64, chat, target)
        facts = finish(folder, iter(rows), journal, system_prompt, [])
    assert facts["rows"] == facts["answered"] + sum(facts["rejected"].values())
    return facts


def ask(folder, fakes, rows, **options):
    urls = [fake if isinstance(fake, str) else fake.url for fake in fakes]
    return answer(folder, rows, "server", urls=urls, **{"concurrency": 4, "timeout": 5.0} | options)


def number_of(body):
    """Which row of `make_rows` is asked."""
    return int(body["messages"][0]["content"].split()[1].split(".")[0])


def written(folder, name="conversations"):
    return read_jsonl(folder / f"{name}.jsonl")


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
        facts = ask(tmp_path, [fake], rows, system_prompt="be brief")
    brief = [expected(*questions, system="be brief") for questions in (["a", "b"], ["ü"])]
    conversations = enumerate([*brief, expected("c", system="mine")], start=1)
    assert written(tmp_path) == [{"id": f"data.jsonl:{i}", "messages": m} for i, m in conversations]
    assert (facts["turns"], facts["answer_tokens"], facts["retries"]) == (4, 20, 0)
    assert {**fake.bodies[0], "messages": 0} == {"model": "target", "max_tokens": 64, "messages": 0}
    assert fake.keys == {None}


def test_options_and_key_reach_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    sampling = {"temperature": 0.0, "top_k": 20, "seed": 3}
    options = {"model": "m", "max_new_tokens": 7, "extra_body": extra, **sampling}
    with Fake() as fake:
        ask(tmp_path, [fake.url + "/"], [row(1, "a")], api_key_env="MY_KEY", **options)
    asked = {"messages": turns("a"), "model": "m", "max_tokens": 7}
    assert fake.bodies == [{**asked, **sampling, **extra}] and fake.keys == {"Bearer secret"}


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    tools, calls = row(3, "a"), row(4, "a")
    tools.conversation.tools = [{"type": "function", "function": {"name": "f"}}]
    calls.conversation.messages[1]["tool_calls"] = [{"type": "function"}]
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
    handler.send(200, b'{"choices": [', Content_Length="1000")
    handler.close_connection = True


FAULTS = {
    "HTTP 500: out of order": lambda fake: fake.send(500, {"error": {"message": "out of order"}}),
    "HTTP 429: Error code: N": lambda handler: handler.send(429, {}, Retry_After="0.01"),
    "Connection error.": drop,
    "Request timed out.": lambda handler: time.sleep(1.2),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.runs
def test_faults_of_a_server_are_repeated(tmp_path, kind):
    """Questions 3.0 and 5.1 fail once; 2.0 always does, and its row is given up."""

    def behave(handler, body, n):
        question = body["messages"][-1]["content"]
        wrong = question.endswith("2.0") or (n == 1 and question.endswith(("3.0", "5.1")))
        return wrong and not FAULTS[kind](handler)

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(8, 2), timeout=1.0, retries=2)
    assert facts["rejected"] == {kind: 1} and facts["answered"] == 7 and facts["retries"] >= 2
    assert [entry["line"] for entry in written(tmp_path, "rejects")] == [3]
    assert max(fake.seen.values()) == 3
    assert [e["messages"] for e in written(tmp_path)] == [
        expected(f"question {i}.0", f"question {i}.1") for i in range(8) if i != 2
    ]


TOO_LONG = "context length is 4096, the prompt has {} tokens\nand more"
REFUSED = [{"error": {"message": TOO_LONG.format(n)}} for n in (5000, 5004)]
USELESS = {
    "malformed reply": (200, [b'{"choices": ', {"choices": [{"text": 1}]}, completion(["a"])]),
    "empty answer": (200, [completion(" "), completion("<think>a</think> ")]),
    "finish reason abort": (200, [completion("half", end="abort")]),
    "HTTP 400: context length is N, the prompt has N tokens": (400, REFUSED),
}


@pytest.mark.parametrize("reason", USELESS)
def test_replies_without_an_answer_are_counted(tmp_path, reason):
    status, replies = USELESS[reason]

    def behave(handler, body, n):
        number = number_of(body)
        return number < len(replies) and not handler.send(status, replies[number])

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(5))
    assert facts["rejected"] == {reason: len(replies)} and max(fake.seen.values()) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_model_or_address_ends_the_stage(tmp_path, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    words = {"error": {"message": "not secret-key"}}
    refuse = Fake(lambda handler, body, n: not handler.send(status, words))
    with refuse as fake, pytest.raises(RunError, match=r"regenerate\.model.*api_key_env") as error:
        ask(tmp_path, [fake], make_rows(20), model="target")
    left = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret-key" not in str(error.value) + left


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
        facts = ask(tmp_path, [dead_url, good], make_rows(60), model=model, retries=1)
    assert facts["answered"] == len(good.bodies) == 60


@pytest.mark.parametrize("way", ["dies", "fails"])
def test_servers_that_answer_no_more_end_the_stage_and_lose_no_row(tmp_path, way):
    def behave(handler, body, n):
        if number_of(body) < 8:
            return False
        return not (drop(handler) if way == "dies" else handler.send(500, {"message": "died"}))

    words = "rows in a row .*8 rows are done and kept, and the same command goes on"
    with Fake(behave) as fake, pytest.raises(RunError, match=words) as error:
        ask(tmp_path, [fake], make_rows(40), retries=1, concurrency=1)
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
    reasons = [(m["reasoning_content"], m["content"]) for m in answers]
    assert reasons == [("2 + 2", "4"), ("2 + 3", "5"), ("2 + 4", "6"), ("2 + 5 +", "")]
    assert answers[-1]["truncated"] and facts["truncated"] == 1 and facts["turns"] == 4
    assert all(set(m) == {"role", "content"} for body in fake.bodies for m in body["messages"])
    assert [m["content"] for m in fake.bodies[-1]["messages"]] == [*"a4b5c6d"]


THOUGHTS = {
    "plain": ("plain", ""),
    "<think>a</think>b": ("b", "a"),
    "a\n</think>\n\nb": ("b", "a"),
    "<think>\n\n</think>\n\nb": ("b", ""),
    "\n<think>a and": ("", "a and"),
}


@pytest.mark.parametrize("text", THOUGHTS)
def test_thinking_within_the_content_is_reasoning(text):
    assert split_thinking(text, "") == THOUGHTS[text]


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
        child = multiprocessing.get_context("fork").Process(target=ask_twice, args=(sender,))
        child.start()
        wait_for(limit[0])
        os.kill(child.pid, signal.SIGINT)
        assert receiver.recv() == "interrupted"
        limit[0] = 80
        wait_for(limit[0])
        child.kill()
        child.join()
        lines = journal.read_bytes().splitlines()
        assert len({json.loads(line)["key"] for line in lines}) == len(lines) == limit[0]
        with journal.open("ab") as stream:
            stream.write(lines[0][: len(lines[0]) // 2])
        limit[0], asked = 200, len(fake.bodies)
        facts = ask(folder, [fake], make_rows(200, 2))
        assert len(fake.bodies) - asked == 2 * (200 - len(lines))
        ask(tmp_path / "whole", [fake], make_rows(200, 2))
    assert (facts["answered"], facts["turns"], facts["answer_tokens"]) == (200, 400, 2000)
    assert written(folder) == written(tmp_path / "whole")


def handle(**identity):
    known = {"target": "weights", "dtype": "bfloat16", "aux_layer_ids": [1, 2, 3]}
    return SimpleNamespace(identity=known | identity)


def stage(folder, *paths, options=None, target=None, chat=CHAT, weights=None, **data):
    """A call of the stage on files of rows; returns what it does."""
    sources = [Source(str(path), weight=(weights or {}).get(path, 1.0)) for path in paths]
    found = [(source, find_files(source, "")) for source in sources]
    asked = section("data", **data), found, chat, target or handle(), str(folder)
    return regenerate(asks("server") | (options or {}), *asked)


def test_the_stage_answers_every_source_once(tmp_path, dead_url):
    rows = ({"messages": turns(f"question {i}", "old")} for i in range(40))
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    other = shutil.copy(path, tmp_path / "b.jsonl")
    with Fake() as fake:
        asked = {"weights": {path: 0.5, other: 2.0}}
        again, paths = stage(tmp_path, path, other, options={"urls": [fake.url]}, **asked)
    assert [source.weight for source, _ in again] == [1.0, 2.0]
    counts = [len(written(path)) for path in paths]
    assert 8 < counts[0] < 32 and counts[1] == len(fake.bodies) == 40
    names = {file.name for file in paths[0].iterdir()}
    assert names == {"artefact.json", "conversations.jsonl", "rejects.jsonl"}
    # where the answers come from changes nothing, so they are found again
    dead = {"urls": [dead_url], "retries": 0}
    assert stage(tmp_path, path, other, options=dead, **asked) == (again, paths)


KEPT = {"max_new_tokens": 32}  # for options of their own
# What changes from one call to the next, and how many of 12 rows are then asked once more.
CHANGES = {
    "nothing": ({}, 0),
    "all rows instead of the first 7": ({"num_samples": None}, 5),
    "another length": ({"max_length": 1024}, 0),
    "other layers": ({"target": handle(aux_layer_ids=[1, 2, 4])}, 0),
    "more at a time": ({"options": KEPT | {"concurrency": 2}}, 0),
    "another precision": ({"target": handle(dtype="float32")}, 7),
    "another template": ({"chat": Chat(CHAT.tokenizer, {"enable_thinking": False})}, 7),
    "another temperature": ({"options": KEPT | {"temperature": 0.5}}, 7),
    "longer answers": ({"options": {"max_new_tokens": 33}}, 7),
    "a system prompt": ({"system_prompt": "Be brief."}, 7),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_answer_is_kept_by_what_it_depends_on(tmp_path, what):
    rows = [{"question": f"question {i}"} for i in range(12)]
    path, (changes, again) = write_jsonl(tmp_path / "a.jsonl", *rows), CHANGES[what]
    with Fake() as fake:
        options = KEPT | {"urls": [fake.url]}
        stage(tmp_path, path, options=options, num_samples=7)
        assert len(fake.bodies) == 7
        options |= changes.get("options", {})
        _, paths = stage(tmp_path, path, **{"num_samples": 7} | changes | {"options": options})
        assert len(fake.bodies) == 7 + again
    count, system = changes.get("num_samples", 7) or 12, changes.get("system_prompt")
    said = [expected(row["question"], system=system) for row in rows[:count]]
    assert [entry["messages"] for entry in written(paths[0])] == said


def test_other_files_in_another_order_find_their_answers(tmp_path):
    rows = [{"question": f"question {i}"} for i in range(6)]
    mixed = [{"messages": turns("question 4", "old")}, {"prompt": "new"}, rows[1], rows[4]]
    first, second = (write_jsonl(tmp_path / f"{len(r)}.jsonl", *r) for r in (rows, mixed))
    with Fake() as fake:
        stage(tmp_path, first, options={"urls": [fake.url]})
        (path,) = stage(tmp_path, second, options={"urls": [fake.url]})[1]
    assert len(fake.bodies) == 7
    asked = ["question 4", "new", "question 1", "question 4"]
    entries = [(f"{second}:{i}", expected(words)) for i, words in enumerate(asked, start=1)]
    assert [(entry["id"], entry["messages"]) for entry in written(path)] == entries


def test_rows_that_failed_are_asked_again_when_more_are_asked_for(tmp_path):
    rows = [{"question": f"question {i}"} for i in range(6)]
    path, broken = write_jsonl(tmp_path / "a.jsonl", *rows), [2]

    def behave(handler, body, n):
        return number_of(body) in broken and not handler.send(400, {"message": "too long"})

    with Fake(behave) as fake:
        for count, rejected in ((4, {"HTTP 400: too long": 1}), (6, {})):
            options = {"urls": [fake.url]}
            (folder,) = stage(tmp_path, path, options=options, num_samples=count)[1]
            assert read_facts(folder)["rejected"] == rejected
            broken.clear()
    assert len(fake.bodies) == 4 + 1 + 2


def test_what_the_stage_says_of_its_answers(tmp_path, capsys):
    replies = {0: completion("a cut one", end="length"), 1: completion("again and again " * 30)}
    rows = [{"question": f"question {i}"} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", *rows)

    def behave(handler, body, n):
        reply = replies.get(number_of(body))
        return reply and not handler.send(200, reply)

    with Fake(behave) as fake:
        options = {"urls": [fake.url], "max_new_tokens": 96, "temperature": 0.0}
        (folder,) = stage(tmp_path, path, options=options)[1]
    assert (read_facts(folder)["truncated"], read_facts(folder)["loops"]) == (1, 1)
    said = capsys.readouterr().out
    assert "regenerate: greedy, at most 96 tokens an answer; " in said
    cut = "1 of 4 answers were cut at 96 tokens: raise regenerate.max_new_tokens"
    assert f"regenerate: {cut}\n" in said
    assert "regenerate: 1 of 4 answers (25.0%) repeat the same words again and again: set" in said
    with Fake() as fake:
        stage(tmp_path, path, options={"urls": [fake.url], "max_new_tokens": 95, "seed": 3})
    said = capsys.readouterr().out
    assert "regenerate: seed 3, at most 95 tokens an answer; " in said
    assert "answers were cut" not in said and "repeat" not in said


def test_what_counts_as_done_before(tmp_path):
    rows = [row(1, "a"), Row("data.jsonl", 2, None, "broken JSON"), row(3, "b"), row(4, "a")]
    bar = Progress("regenerate", 4, "rows", shown=False)
    with Journal(tmp_path / "journal.jsonl", CHAT, bar) as journal:
        dialogue = Dialogue(rows[0], None)
        dialogue.messages = dialogue.pending
        journal.add(dialogue)
        asked = list(unanswered(iter(rows), journal, None))
        assert [each.key for each in asked] != [dialogue.key]
        assert (bar.done, bar.before) == (4, 2), "of the rows, the two that were answered"
        asked[0].reason = "empty answer"
        journal.add(asked[0])
    assert (bar.done, bar.before) == (5, 2), "a row that failed is done too"


def test_two_calls_at_once_share_a_journal(tmp_path):
    path, entries = tmp_path / "journal.jsonl", {}
    with Journal(path, CHAT, UNSHOWN) as one, Journal(path, CHAT, UNSHOWN) as two:
        for i, journal in enumerate((one, two, two, one)):
            dialogue = Dialogue(row(i, f"question {i}"), None)
            dialogue.messages = [*dialogue.pending, {"role": "assistant", "content": "x" * i}]
            journal.add(dialogue)
            entries[dialogue.key] = dialogue.messages
        for journal in (one, two, Journal(path, CHAT, UNSHOWN)):
            assert all(journal.read(k)["messages"] == entries[k] for k in journal.offsets)
        assert len(one.offsets) == len(two.offsets) == 2
        assert journal.offsets.keys() == entries.keys()


def test_the_model_must_be_clear(tmp_path, dead_url):
    one, other, two, none = (Fake(models=models) for models in ("a", "b", "ab", ""))
    with one, other, two, none:
        for fakes, words in (
            ([two], r"different models \(a, b\)"),
            ([none], r"list no model; name one"),
            ([one, other], r"different models \(a, b\)"),
            ([dead_url], r"lists no model.*regenerate\.urls, or set regenerate=builtin"),
        ):
            with pytest.raises(RunError, match=words):
                ask(tmp_path, fakes, make_rows(1), retries=1)


LOCAL = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize("urls", [[], ["127.0.0.1:1"], ["http://a:b/v1"], [LOCAL, "http://"]])
def test_urls_that_are_none_and_a_missing_client(tmp_path, monkeypatch, urls):
    with pytest.raises(ConfigError, match=r"regenerate\.urls"):
        ask(tmp_path, urls, [])
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match="pip install"):
        ask(tmp_path, [LOCAL], [])


@pytest.fixture(scope="module")
def engine(target_folder, tokenizer):
    """A target that often ends its turn, as an untrained one with many ends does; and its chat."""
    target = HFTarget(spec_of(target_folder), torch.device("cpu"))
    target.eos_token_ids = set(range(0, len(tokenizer), 8))
    return {"target": SimpleNamespace(load=lambda: target), "chat": Chat(tokenizer)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.runs
def test_builtin_resumed_equals_uninterrupted(tmp_path, engine, temperature, monkeypatch):
    rows = [row(i + 1, *(f"explain `f{i}`" for _ in range(1 + i % 3))) for i in range(11)]
    rows[4] = Row("data.jsonl", 5, None, "broken JSON")
    rows[6] = row(7, "long " * 600)
    options = {"batch_size": 4, "max_new_tokens": 12, **engine}
    options |= {"temperature": temperature, "top_k": 50, "seed": 3}

    target = engine["target"].load()
    original = target.answer

    def interrupted(*given):
        yield from islice(original(*given), 8)
        raise KeyboardInterrupt

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    facts = answer(whole, rows, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, "answer", interrupted)
        answer(folder, rows, **options)
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert 3 <= len(lines) < 9
    journal.write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    for _ in range(2):  # the second finds what the first wrote behind half a line
        assert answer(folder, rows, **options) == facts
    for name in ("conversations.jsonl", "rejects.jsonl"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()
    answer(tmp_path / "alone", rows[:4], **options | {"batch_size": 1})
    assert written(tmp_path / "alone") == written(whole)[:4]
    too_long = "the prompt is longer than the target's context"
    assert facts["rejected"]["broken JSON"] == facts["rejected"][too_long] == 1
    messages = [[m for m in e["messages"] if m["role"] == "assistant"] for e in written(whole)]
    assert facts["turns"] == sum(map(len, messages)) > facts["answered"] > facts["truncated"]
    assert not any("truncated" in message for said in messages for message in said[:-1])


def test_a_template_that_refuses_costs_builtin_the_row(tmp_path, engine):
    template = "{% if 'no' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}"
    chat = Chat(engine["chat"].tokenizer)
    chat.template = template + chat.template
    facts = answer(tmp_path, [row(1, "a"), row(2, "no")], chat=chat, target=engine["target"])
    assert facts["rejected"] == {"refused by the chat template: not that": 1}
    assert facts["answered"] == 1


def test_builtin_reads_thinking_that_the_prompt_opens(tmp_path, engine, monkeypatch):
    chat, target = engine["chat"], engine["target"].load()
    said = [*chat.tokenize("one"), 1]
    monkeypatch.setattr(chat, "encode_prompt", lambda messages: chat.tokenize("Hello <think>\n"))
    monkeypatch.setattr(target, "answer", lambda take, *_: iter([(take()[0], said)]))
    answer(tmp_path, [row(1, "a")], **engine)
    message = written(tmp_path)[0]["messages"][1]
    assert message["reasoning_content"].startswith("one") and message["truncated"]


def test_an_answer_that_never_ends_is_asked_again(tmp_path):
    waited = []

    def behave(handler, body, n):
        if n > 1:
            return False
        handler.send(200, b" ", Content_Length="1000000000")
        with suppress(OSError):  # the client goes away
            for _ in range(3000):
                handler.wfile.write(b" ")
                time.sleep(0.01)
            waited.append(n)
        return True

    with Fake(behave) as fake:
        facts = ask(tmp_path, [fake], make_rows(2), timeout=1.0)
    assert facts["answered"] == 2 and facts["retries"] >= 2 and not waited


def test_a_server_that_asks_to_wait_longer_than_an_answer_has_failed(tmp_path):
    def busy(handler, body, n):
        return not handler.send(429, {}, Retry_After="60")

    with Fake(busy) as fake, Fake() as good:
        assert ask(tmp_path / "two", [fake, good], make_rows(40))["answered"] == 40
        with pytest.raises(RunError, match=r"rows in a row .*it asks to wait longer than regen"):
            ask(tmp_path / "one", [fake], make_rows(40))
    assert max(fake.seen.values()) <= 2, "nothing is repeated: once in each of the two stages"


CPU = torch.device("cpu")
# What a generation_config.json may ask for beside the tokens that end an answer.
RECOMMENDED = [
    {"repetition_penalty": 1.5, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "do_sample": True}
    | {"no_repeat_ngram_size": 3, "min_p": 0.5, "encoder_repetition_penalty": 2.0},
    {"exponential_decay_length_penalty": [2, 1.5], "forced_eos_token_id": 9, "min_new_tokens": 30}
    | {"bad_words_ids": [[i] for i in range(1000)], "suppress_tokens": list(range(1000, 2000))},
    {"stop_strings": ["e"], "num_return_sequences": 2, "return_dict_in_generate": True}
    | {"num_beams": 2, "max_length": 3, "watermarking_config": {"bias": 9.0}},
]


@pytest.mark.parametrize("recommended", RECOMMENDED)
def test_nothing_but_the_ends_of_a_generation_config_enters(target_folder, tmp_path, recommended):
    folder = shutil.copytree(target_folder, tmp_path / "target")
    answers = []
    for asked in ({}, recommended):
        asked = {"eos_token_id": [1, 2], **asked}
        (folder / "generation_config.json").write_text(json.dumps(asked))
        target = HFTarget(spec_of(folder), CPU)
        assert target.eos_token_ids == load_weights(target.spec, CPU).eos_token_ids == {1, 2}
        for sampling in (None, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}):
            torch.manual_seed(0)
            answers.append(target.generate([[5, 9, 30], [100, 101]], 20, sampling))
    assert answers[:2] == answers[2:]


def test_a_damaged_generation_config_is_named(target_folder, tmp_path):
    folder = shutil.copytree(target_folder, tmp_path / "target")
    (folder / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(RunError, match=r"generation_config\.json of .* is damaged; get it again"):
        HFTarget(spec_of(folder), CPU)
