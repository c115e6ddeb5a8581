"""`stages=[regenerate]`: the target answers a dataset again, so that a draft learns its words."""

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import httpx
import torch

from eagle3.config import Data, Source, Within, instantiate
from eagle3.data.chat import Chat, with_system
from eagle3.data.rows import Message, RowError
from eagle3.data.sources import DataFile, Row, SourceFiles, find_files, read_rows
from eagle3.draft.rope import max_positions
from eagle3.errors import ConfigError, RunError
from eagle3.runs.artefact import artefact, fingerprint
from eagle3.runs.logger import redact
from eagle3.runs.progress import Progress
from eagle3.target.handle import TargetHandle

ADDRESS = re.compile(r"https?://([^/@\s]+@)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/\S*)?")
LOCAL = re.compile(r"//([^/@]*@)?(localhost|127\.0\.0\.1|\[::1\]|0\.0\.0\.0)[:/]")
# What changes no answer: no part of the fingerprint, so that answers are found again.
HOW_TO_ASK = {"urls", "api_key_env", "concurrency", "retries", "timeout"}
LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")
MOST_FAILURES = 20  # rows in a row without an answer, after which servers count as dead


def regenerate(
    config: dict, data: Data, sources: SourceFiles, chat: Chat, target: TargetHandle, cache_dir: str
) -> tuple[SourceFiles, list[Path]]:
    """Answer again; returns what to prepare from and the artefact of each source."""
    answerer, again, paths = instantiate(config), [], []
    for source, files in sources:
        # Rows that an epoch would leave out need no answer; a weight above 1 is left to `prepare`.
        share = min(1.0, source.weight)
        inputs = {
            "format": 3,  # of the journal
            **{k: getattr(data, k) for k in ("num_samples", "system_prompt", "max_length")},
            "files": [file.identity for file in files],
            "share": share,
            "chat": chat.identity,
            "target": target.spec.identity,
            "dtype": target.spec.dtype,
            "answers": {k: v for k, v in config.items() if k not in HOW_TO_ASK},
        }

        def write(folder: Path, files: list[DataFile] = files, share: float = share) -> dict:
            read = read_rows(files, data.num_samples, share=share)
            with (folder / "journal.jsonl").open("a+b") as stream:
                journal = Journal(stream)
                done = len(journal.offsets)
                with Progress("regenerate", data.num_samples, "rows", done) as bar:
                    journal.count = bar.advance
                    rows = bar.follow((row.share, row) for row in read)
                    answerer.answer(rows, journal, data, chat, target)
                return finish(folder, journal)

        path = artefact(cache_dir, "regenerated", inputs, write, "regenerate")
        # only now, as a call killed before here still needs it
        (path / "journal.jsonl").unlink(missing_ok=True)
        answers = Source(str(path / "conversations.jsonl"), weight=max(1.0, source.weight))
        again.append((answers, find_files(answers, cache_dir)))
        paths.append(path)
    return again, paths


class Dialogue:
    """A row that is answered turn by turn with the answers so far; `reason` says why not."""

    def __init__(self, row: Row, system_prompt: str | None):
        self.messages, self.pending, self.reason = [], [], row.reason
        self.counts = {"retries": 0, "answer_tokens": 0}
        if row.conversation is None:
            return
        messages = with_system(row.conversation.messages, system_prompt)
        self.pending = [m for m in messages if m["role"] != "assistant"]
        # The results of tools belong to the old calls; new answers may call others.
        called = any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        if called or row.conversation.tools:
            self.reason = "tool calls cannot be answered again"
        elif any(LONE_SURROGATE.search(m["content"]) for m in self.pending):
            self.reason = "bad UTF-8"

    def prompt(self) -> list[Message] | None:
        """The messages to ask with next; None when the dialogue is through."""
        while self.pending and self.reason is None:
            message = self.pending.pop(0)
            self.messages.append({key: message[key] for key in ("role", "content")})
            if message["role"] == "user":
                # Reasoning is not sent back, as chat templates of reasoning models drop it too.
                return [{"role": m["role"], "content": m["content"]} for m in self.messages]
        return None

    def add(self, content: str | None, reasoning: str | None, truncated: bool, tokens: int) -> None:
        """Add the target's answer; one that is empty or was cut ends the dialogue."""
        content, reasoning = split_thinking(content or "", reasoning or "")
        if not content.strip() and not (truncated and reasoning.strip()):
            self.reason = "empty answer"
        answer = {"role": "assistant", "content": content}
        if reasoning.strip():
            answer["reasoning_content"] = reasoning
        if truncated:
            answer["truncated"] = True
            self.pending.clear()
        self.messages.append(answer)
        self.counts["answer_tokens"] += tokens


def split_thinking(content: str, reasoning: str) -> tuple[str, str]:
    """An answer and its reasoning, which may stand within the content."""
    # Half a character that a server cut would not be written as UTF-8.
    content, reasoning = (LONE_SURROGATE.sub("\ufffd", text) for text in (content, reasoning))
    if not reasoning and ("</think>" in content or content.lstrip().startswith("<think>")):
        reasoning, _, content = content.partition("</think>")
        reasoning, content = reasoning.strip().removeprefix("<think>").strip(), content.lstrip()
    return content, reasoning


class Journal:
    """Rows that are through, a line each as they come; `offsets` says where each line begins."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.offsets = stream, {}
        self.count: Callable = lambda rows, tokens: None  # is told of each row
        stream.seek(0)
        end = 0
        for line in stream:
            entry = {}
            # A line that is damaged, or in which the last call was killed, is answered again.
            with suppress(ValueError, TypeError, RecursionError):
                entry = dict(json.loads(line))
            if entry.pop("checksum", None) == fingerprint(entry):
                self.offsets[entry["row"]] = end
            end += len(line)
        if end and not line.endswith(b"\n"):
            stream.write(b"\n")

    def write(self, number: int, row: Row, dialogue: Dialogue) -> None:
        result = {"messages": dialogue.messages, "reason": dialogue.reason, **dialogue.counts}
        entry = {"row": number, "file": row.file, "line": row.line, **result}
        self.offsets[number] = self.stream.seek(0, os.SEEK_END)
        self.stream.write(to_line(entry | {"checksum": fingerprint(entry)}))
        self.stream.flush()
        self.count(1, dialogue.counts["answer_tokens"])


def finish(folder: Path, journal: Journal) -> dict[str, Any]:
    """Write answers and rejects in the order of the rows; returns the facts. Raises RunError."""
    counts = Counter(rows=0, answered=0, turns=0, truncated=0, retries=0, answer_tokens=0)
    rejected = Counter()
    names = "conversations.jsonl", "rejects.jsonl"
    with (folder / names[0]).open("wb") as conversations, (folder / names[1]).open("wb") as rejects:
        # Rows end in any order; read in their own, an interrupted call gives the same bytes.
        for number in sorted(journal.offsets):
            journal.stream.seek(journal.offsets[number])
            entry = json.loads(journal.stream.readline())
            counts.update(rows=1, retries=entry["retries"], answer_tokens=entry["answer_tokens"])
            if entry.get("reason") is not None:
                rejected[entry["reason"]] += 1
                rejects.write(to_line({key: entry[key] for key in ("file", "line", "reason")}))
                continue
            answers = [m for m in entry["messages"] if m["role"] == "assistant"]
            cut = sum("truncated" in m for m in answers)
            counts.update(answered=1, turns=len(answers), truncated=cut)
            place = f"{entry['file']}:{entry['line']}"
            conversations.write(to_line({"id": place, "messages": entry["messages"]}))
    if not counts["answered"]:
        journal.stream.truncate(0)  # servers that are put right may answer what they refused
        reasons = "; ".join(f"{n} x {reason}" for reason, n in rejected.most_common(3)) or "no rows"
        words = f"none of the {counts['rows']} rows could be answered again ({reasons})"
        raise RunError(f"{words}; check data and regenerate")
    return {**counts, "rejected": dict(rejected.most_common())}


def to_line(entry: dict) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


@dataclass
class BuiltIn:
    """`regenerate=builtin`: the target in this process answers; temperature 0 is greedy."""

    batch_size: Annotated[int, Within(1, 1 << 20)]
    max_new_tokens: Annotated[int | None, Within(1, 1 << 20)]
    temperature: Annotated[float, Within(0, 100)]
    top_p: Annotated[float | None, Within(1e-6, 1)]
    top_k: Annotated[int | None, Within(-1, 1 << 30)]
    seed: int

    def answer(
        self, rows: Iterator[Row], journal: Journal, data: Data, chat: Chat, target: TargetHandle
    ) -> None:
        # Batches are of rows that follow each other and have a seed of their own, so that a call
        # that goes on from a journal gives the same answers.
        numbered = enumerate(rows)
        while batch := list(islice(numbered, self.batch_size)):
            if all(number in journal.offsets for number, _ in batch):
                continue
            torch.manual_seed(self.seed + batch[0][0])
            dialogues = [Dialogue(row, data.system_prompt) for _, row in batch]
            longest = self.max_new_tokens or data.max_length
            self.answer_batch(dialogues, target.load(), chat, longest)
            for (number, row), dialogue in zip(batch, dialogues, strict=True):
                journal.write(number, row, dialogue)

    def answer_batch(self, dialogues: list[Dialogue], model: Any, chat: Chat, longest: int) -> None:
        """Dialogues side by side: one turn of all that still ask, until none does."""
        top = {"top_p": self.top_p or 1.0, "top_k": max(0, self.top_k or 0)}
        sampling = {"temperature": self.temperature, **top} if self.temperature > 0 else None
        rope = getattr(model.config, "rope_parameters", None) or {}
        context = max_positions(model.config.max_position_embeddings, rope)
        while True:
            asking, prompts = [], []
            for dialogue in dialogues:
                messages = dialogue.prompt()
                prompt = [] if messages is None else chat.encode_prompt(messages)
                if len(prompt) >= context:
                    dialogue.reason = "the prompt is longer than the target's context"
                elif messages is not None:
                    asking.append(dialogue)
                    prompts.append(prompt)
            if not asking:
                return
            answers = model.generate(prompts, longest, sampling)
            for dialogue, prompt, answer in zip(asking, prompts, answers, strict=True):
                ids = answer[: context - len(prompt)]
                # Some templates open the thinking in the prompt, and the answer only closes it.
                opened = chat.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
                text = "<think>" * opened + chat.decode(ids)
                dialogue.add(text, None, ids[-1] not in model.eos_token_ids, len(ids))


@dataclass
class Servers:
    """`regenerate=server`: OpenAI-compatible servers (SGLang, vLLM) of the target answer."""

    urls: list[str]
    model: str | None
    api_key_env: str
    concurrency: Annotated[int, Within(1, 100_000)]
    retries: Annotated[int, Within(1, 1000)]
    timeout: Annotated[float, Within(0.1, 1e6)]
    max_new_tokens: Annotated[int | None, Within(1, 1 << 20)]
    temperature: Annotated[float | None, Within(0, 100)]
    top_p: Annotated[float | None, Within(1e-6, 1)]
    top_k: Annotated[int | None, Within(-1, 1 << 30)]
    seed: int | None
    extra_body: dict[str, Any]

    def answer(
        self, rows: Iterator[Row], journal: Journal, data: Data, chat: Chat, target: TargetHandle
    ) -> None:
        if not self.urls or not all(map(ADDRESS.fullmatch, self.urls)):
            raise ConfigError("regenerate.urls must name servers, as [http://127.0.0.1:30000/v1]")
        asyncio.run(self.answer_rows(rows, journal, data))

    async def answer_rows(self, rows: Iterator[Row], journal: Journal, data: Data) -> None:
        """As many workers as requests may be in flight, each on one dialogue at a time."""
        servers = [Server(url, self) for url in self.urls]
        names = ("temperature", "top_p", "top_k", "seed")
        body = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        body["model"] = self.model or await only_model(servers)
        body = {"max_tokens": self.max_new_tokens or data.max_length, **body, **self.extra_body}
        waiting, through = enumerate(rows), []

        async def work() -> None:
            for number, row in waiting:
                await asyncio.sleep(0)  # many rows without a request would keep Ctrl-C waiting
                if number in journal.offsets:
                    continue
                dialogue = Dialogue(row, data.system_prompt)
                while (messages := dialogue.prompt()) is not None:
                    await ask(servers, dialogue, {**body, "messages": messages})
                through.append((number, row, dialogue))
                failures = min(server.failures for server in servers)
                if failures >= MOST_FAILURES:
                    errors = "; ".join(f"{server.name}: {server.error}" for server in servers)
                    words = f"no answer to {failures} rows in a row ({errors})"
                    done = f"{len(journal.offsets):,} rows are done and kept"
                    raise RunError(f"{words}; {done}, and the same command goes on from there")
                # A row is given up only where a server answers others: the rows that wait here
                # when all have died are asked again by the next call.
                while through and failures == 0:
                    journal.write(*through.pop())

        await asyncio.gather(*(work() for _ in range(self.concurrency * len(servers))))
        for entry in through:
            journal.write(*entry)


async def ask(servers: list["Server"], dialogue: Dialogue, body: dict[str, Any]) -> None:
    """Add an answer to the dialogue, or why there is none; where a server fails, ask the next."""
    # One that fails counts as busier than it is.
    for server in sorted(servers, key=lambda server: server.in_flight + server.failures):
        try:
            return await server.answer(dialogue, body)
        except RowError as error:
            reason = str(error)
        if server.failures == 0:  # it was the request's fault, and another would refuse it too
            break
    dialogue.reason = reason


async def only_model(servers: list["Server"]) -> str:
    """The one model that the servers list, as far as they answer. Raises RunError."""
    names, problem = set(), "regenerate.urls list no model; name one in .model"
    for server in servers:
        try:
            listed = await server.client.models.list(extra_headers=server.headers)
            names.update(model.id for model in listed.data)
        except server.openai.OpenAIError as error:
            problem = f"{server.name} lists no model ({error}); check regenerate.urls"
    if len(names) > 1:
        models = ", ".join(sorted(names))
        problem = f"regenerate.urls serve different models ({models}); name one in .model"
    if len(names) != 1:
        raise RunError(problem)
    return names.pop()


class Server:
    """One server, asked through the openai client; `failures` counts those since an answer."""

    def __init__(self, url: str, options: Servers):
        try:
            import openai
        except ImportError as error:
            words = "regenerate=server needs the openai client: pip install 'eagle3[regenerate]'"
            raise ConfigError(words) from error
        self.openai, self.name = openai, redact(url)
        self.in_flight, self.failures, self.error = 0, 0, ""
        self.free = asyncio.Semaphore(options.concurrency)
        self.key = os.environ.get(options.api_key_env)
        self.headers = {} if self.key else {"Authorization": openai.Omit()}
        self.timeout = options.timeout
        # proxies of the environment are for other machines than this one
        client = openai.DefaultAsyncHttpxClient(trust_env=not LOCAL.search(url + "/"))
        self.send_request, client.send = client.send, self.send
        self.client = openai.AsyncOpenAI(
            base_url=url.rstrip("/"),
            api_key=self.key or "none",
            max_retries=options.retries,
            timeout=openai.Timeout(options.timeout, connect=min(30.0, options.timeout)),
            http_client=client,
        )

    async def send(self, request: Any, **options) -> Any:
        """The response, read to its end in time: httpx limits the time between bytes alone."""
        try:
            response = await asyncio.wait_for(self.send_request(request, **options), self.timeout)
        except asyncio.TimeoutError as error:
            raise httpx.ReadTimeout("") from error  # which the client repeats
        if self.asks_to_wait(response):
            response.headers["x-should-retry"] = "false"  # as the client understands
        return response

    def asks_to_wait(self, response: Any) -> bool:
        """Whether it asks to wait longer than an answer may take."""
        with suppress(ValueError):  # a date
            return float(response.headers.get("Retry-After", 0)) > self.timeout
        return False

    async def answer(self, dialogue: Dialogue, body: dict[str, Any]) -> None:
        """Ask and add the answer. Raises RowError for none, RunError where there never would be."""
        completions = self.client.chat.completions.with_raw_response
        given = {"model": body["model"], "messages": body["messages"], "extra_body": body}
        self.in_flight += 1
        try:
            async with self.free:
                raw = await completions.create(**given, extra_headers=self.headers)
        except self.openai.APIError as error:
            status = getattr(error, "status_code", None)
            fields = error.body if isinstance(error.body, dict) else {}
            words = str(fields.get("message", error.message))
            if status and self.asks_to_wait(error.response):
                words = "it asks to wait longer than regenerate.timeout"
            words = words.replace(self.key, "<key>") if self.key else words
            # N for its numbers, so that rows count together
            self.error = re.sub("[0-9]+", "N", words.strip().partition("\n")[0][:120])
            if status in (401, 403, 404):
                words = f"{self.name} refuses every request (HTTP {status}: {self.error})"
                check = "check regenerate.model, .urls, which usually end in /v1, and .api_key_env"
                raise RunError(f"{words}: {check}") from error
            # What the client repeats may be the server's fault; what it does not is the request's.
            at_fault = status in (None, 408, 409, 429) or status >= 500
            self.failures = self.failures + 1 if at_fault else 0
            raise RowError(f"HTTP {status}: {self.error}" if status else self.error) from error
        finally:
            self.in_flight -= 1
        self.failures = 0
        dialogue.counts["retries"] += raw.retries_taken
        try:
            reply = json.loads(raw.http_response.text)
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            message, end = choice["message"], choice.get("finish_reason")
            if end in ("abort", "error", "content_filter"):
                dialogue.reason = f"finish reason {end}"
                return
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            num_tokens = int(usage.get("completion_tokens") or 0)
            dialogue.add(message.get("content"), reasoning, end == "length", num_tokens)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise RowError("malformed reply") from error
