"""`stages=[regenerate]`: the target answers the prompts of a dataset again, so that a draft learns
its own words.
"""

import asyncio
import json
import os
import random
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from hydra.utils import instantiate
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from eagle3.config import Data, Source
from eagle3.data.chat import Chat, with_system
from eagle3.data.rows import Message, RowError
from eagle3.data.sources import Row, SourceFiles, find_files, read_rows
from eagle3.errors import ConfigError, RunError
from eagle3.runs.artefact import artefact

if TYPE_CHECKING:
    from eagle3.target.handle import TargetHandle

JOURNAL = "journal.jsonl"
ADDRESS = re.compile(r"https?://([^/@\s]+@)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/\S*)?")
LOCAL = re.compile(r"//([^/@]*@)?(localhost|127\.0\.0\.1|\[::1\]|0\.0\.0\.0)[:/]")
PASSWORD = re.compile("//[^/@]*@")
LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")
MESSAGE = re.compile(r'"(?:message|detail|error)": *"((?:[^"\\]|\\[^n])+)')
PROBE = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64}
REST = 60.0  # seconds for which a server that failed is asked nothing


def regenerate(
    section: dict[str, Any],
    data: Data,
    sources: SourceFiles,
    chat: Chat,
    target: "TargetHandle",
    cache_dir: str,
) -> tuple[SourceFiles, list[Path]]:
    """Answer every source again; returns what to prepare from, and the artefact of each source.

    Of a source weighted below 1 only its share is answered, and all of that is used. Raises
    ConfigError, RunError.
    """
    answerer = instantiate(section)
    again, paths = [], []
    for source, files in sources:
        share = min(1.0, source.weight)
        inputs = {
            "files": [file.identity for file in files],
            "share": share,
            "num_samples": data.num_samples,
            "system_prompt": data.system_prompt,
            "max_length": data.max_length,
            "chat": chat.identity,
            "target": target.spec.identity,
            "answers": {k: v for k, v in section.items() if k not in answerer.HOW_TO_ASK},
        }
        rows = read_rows(files, data.num_samples, share=share)

        def write(folder: Path, rows: Iterator[Row] = rows) -> dict[str, Any]:
            with Journal(folder) as journal:
                answerer.answer(rows, journal, data, chat, target)
                return journal.finish()

        path = artefact(cache_dir, "regenerated", inputs, write, "regenerate")
        (path / JOURNAL).unlink(missing_ok=True)  # a call killed before here still needed it
        answers = Source(str(path / "conversations.jsonl"), weight=max(1.0, source.weight))
        again.append((answers, find_files(answers, cache_dir)))
        paths.append(path)
    return again, paths


class Dialogue:
    """A row that is answered again turn by turn, each turn with the answers so far.

    `reason` says why it was given up; `counts` has its "retries" and "answer_tokens".
    """

    def __init__(self, row: Row, system_prompt: str | None):
        self.messages: list[Message] = []
        self.counts: Counter[str] = Counter()
        self.reason, self.pending = None, deque()
        try:
            self.pending.extend(questions(row, system_prompt))
        except RowError as error:
            self.reason = str(error)

    def prompt(self) -> list[Message] | None:
        """The messages to ask with next; None when the dialogue is through."""
        while self.pending and self.reason is None:
            message = self.pending.popleft()
            self.messages.append({key: message[key] for key in ("role", "content")})
            if message["role"] == "user":
                # Reasoning is not sent back, as chat templates of reasoning models drop it too.
                return [{"role": m["role"], "content": m["content"]} for m in self.messages]
        return None

    def add(self, answer: Message) -> None:
        self.messages.append(answer)
        if answer.get("truncated"):
            self.pending.clear()


def questions(row: Row, system_prompt: str | None) -> list[Message]:
    """The system message, if any, and the user turns of a row. Raises RowError where they cannot be
    asked again.
    """
    if row.conversation is None:
        raise RowError(row.reason)
    messages, tools = row.conversation.messages, row.conversation.tools
    if tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        raise RowError("tool calls cannot be answered again")
    asked = [m for m in with_system(messages, system_prompt) if m["role"] != "assistant"]
    if any(LONE_SURROGATE.search(m["content"]) for m in asked):
        raise RowError("bad UTF-8")
    return asked


def read_answer(content: str | None, reasoning: str | None, truncated: bool) -> Message:
    """The assistant message; thinking within the content becomes `reasoning_content`. Raises
    RowError if empty.
    """
    content = LONE_SURROGATE.sub("\ufffd", content or "")
    reasoning = LONE_SURROGATE.sub("\ufffd", reasoning or "")
    if not reasoning and ("</think>" in content or content.lstrip().startswith("<think>")):
        reasoning, _, content = content.partition("</think>")
        reasoning, content = reasoning.strip().removeprefix("<think>").strip(), content.lstrip()
    if not content.strip() and not (truncated and reasoning.strip()):
        raise RowError("empty answer")
    thought = {"reasoning_content": reasoning} if reasoning.strip() else {}
    cut = {"truncated": True} if truncated else {}
    return {"role": "assistant", "content": content, **thought, **cut}


class Journal:
    """Rows that are through, a line each as they come, so that a killed call loses none; a context
    with a progress bar.

    A line has {"row", "file", "line", "messages" or "reason", "retries", "answer_tokens"}.
    `offsets` says where each row's line begins, by the row's number; memory holds no more.
    """

    def __init__(self, folder: Path):
        self.folder, self.offsets = folder, {}
        self.stream = (folder / JOURNAL).open("a+b")
        self.stream.seek(0)
        end = 0
        for line in self.stream:
            if line.endswith(b"\n"):  # else the last call was killed in the middle of it
                self.offsets[json.loads(line)["row"]] = end
                end += len(line)
        self.stream.truncate(end)
        columns = (BarColumn(), TaskProgressColumn(show_speed=True), TimeRemainingColumn())
        text = TextColumn("regenerate {task.completed:,} rows")
        self.progress = Progress(text, *columns, transient=True)
        self.task = self.progress.add_task("", total=None, completed=len(self.offsets))

    def __enter__(self) -> "Journal":
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()
        self.stream.close()

    def write(self, number: int, row: Row, dialogue: Dialogue) -> None:
        """Row `number` is through."""
        entry = {"row": number, "file": row.file, "line": row.line, **dialogue.counts}
        if dialogue.reason is None:
            entry["messages"] = dialogue.messages
        else:
            entry["reason"] = dialogue.reason
        offset = self.stream.seek(0, os.SEEK_END)
        self.stream.write(to_line(entry))
        self.stream.flush()
        self.offsets[number] = offset
        done = len(self.offsets)
        total = max(done, (number + 1) / row.share) if row.share else None
        self.progress.update(self.task, completed=done, total=total)

    def finish(self) -> dict[str, Any]:
        """Write `conversations.jsonl` and `rejects.jsonl` in the order of the rows; returns the
        facts. Raises RunError when not one row was answered.
        """
        counts = Counter(turns=0, truncated=0, retries=0, answer_tokens=0)
        rejected: Counter[str] = Counter()
        names = ("conversations.jsonl", "rejects.jsonl")
        conversations, rejects = ((self.folder / name).open("wb") for name in names)
        with conversations, rejects:
            for _, offset in sorted(self.offsets.items()):
                self.stream.seek(offset)
                entry = json.loads(self.stream.readline())
                counts["retries"] += entry.get("retries", 0)
                counts["answer_tokens"] += entry.get("answer_tokens", 0)
                if "reason" in entry:
                    rejected[entry["reason"]] += 1
                    rejects.write(to_line({key: entry[key] for key in ("file", "line", "reason")}))
                    continue
                messages = entry["messages"]
                counts["turns"] += sum(m["role"] == "assistant" for m in messages)
                counts["truncated"] += sum("truncated" in m for m in messages)
                place = f"{entry['file']}:{entry['line']}"
                conversations.write(to_line({"id": place, "messages": messages}))
        rows, bad = len(self.offsets), rejected.total()
        if rows == bad:
            self.stream.truncate(0)  # servers that are put right may answer what they refused
            reasons = "; ".join(f"{n} x {reason}" for reason, n in rejected.most_common(3))
            raise RunError(
                f"none of the {rows} rows could be answered again ({reasons or 'there are none'}); "
                "check data and regenerate"
            )
        kept = {"rows": rows, "answered": rows - bad}
        return {**kept, **counts, "rejected": dict(rejected.most_common())}


def to_line(entry: dict) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


@dataclass
class BuiltIn:
    """`regenerate=builtin`: the target in this process answers; for small targets and small data.

    Batches are of rows that follow each other and have a seed of their own, so a call that goes on
    from a journal gives the same answers. Temperature 0 is greedy.
    """

    batch_size: int = 16
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    HOW_TO_ASK: ClassVar = ()

    def answer(
        self, rows: Iterator[Row], journal: Journal, data: Data, chat: Chat, target: "TargetHandle"
    ) -> None:
        for first in count(0, self.batch_size):
            batch = list(islice(rows, self.batch_size))
            if not batch:
                return
            numbers = range(first, first + len(batch))
            if all(number in journal.offsets for number in numbers):
                continue
            torch.manual_seed(self.seed + first)
            dialogues = [Dialogue(row, data.system_prompt) for row in batch]
            longest = self.max_new_tokens or data.max_length
            self.answer_batch(dialogues, target.load(), chat, longest)
            for number, row, dialogue in zip(numbers, batch, dialogues, strict=True):
                journal.write(number, row, dialogue)

    def answer_batch(
        self, dialogues: list[Dialogue], model: Any, chat: Chat, max_new_tokens: int
    ) -> None:
        """Dialogues side by side: one turn of all that still ask, until none does."""
        top = {"top_p": self.top_p or 1.0, "top_k": self.top_k or 0}
        sampled = {"temperature": self.temperature, **top}
        context = model.config.max_position_embeddings
        while True:
            asking: list[tuple[Dialogue, list[int]]] = []
            for dialogue in dialogues:
                messages = dialogue.prompt()
                prompt = [] if messages is None else chat.encode_prompt(messages)
                if len(prompt) >= context:
                    dialogue.reason = "the prompt is longer than the target's context"
                elif messages is not None:
                    asking.append((dialogue, prompt))
            if not asking:
                return
            prompts = [prompt for _, prompt in asking]
            sampling = sampled if self.temperature > 0 else None
            answers = model.generate(prompts, max_new_tokens, sampling)
            for (dialogue, prompt), answer in zip(asking, answers, strict=True):
                ids = answer[: context - len(prompt)]
                dialogue.counts["answer_tokens"] += len(ids)
                opened = chat.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
                text = "<think>" * opened + chat.decode(ids)
                try:
                    dialogue.add(read_answer(text, None, ids[-1] not in model.eos_token_ids))
                except RowError as error:
                    dialogue.reason = str(error)


@dataclass
class Servers:
    """`regenerate=server`: OpenAI-compatible servers (SGLang, vLLM) of the target answer."""

    urls: list[str]
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 64
    retries: int = 6
    timeout: float = 600.0
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)

    HOW_TO_ASK: ClassVar = ("urls", "api_key_env", "concurrency", "retries", "timeout")

    def answer(
        self, rows: Iterator[Row], journal: Journal, data: Data, chat: Chat, target: "TargetHandle"
    ) -> None:
        if not self.urls or not all(map(ADDRESS.fullmatch, self.urls)):
            raise ConfigError(
                f"regenerate.urls={PASSWORD.sub('//', str(self.urls))} must name servers, such as "
                "[http://127.0.0.1:30000/v1]"
            )
        sampling = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        body = {"model": self.model, "max_tokens": self.max_new_tokens or data.max_length}
        body |= {name: value for name, value in sampling.items() if value is not None}
        try:
            asyncio.run(self.answer_rows(rows, journal, data.system_prompt, body | self.extra_body))
        except RunError as error:
            raise RunError(
                f"{error}; {len(journal.offsets):,} rows are done and kept, and the same command "
                "goes on from there"
            ) from error

    async def answer_rows(
        self, rows: Iterator[Row], journal: Journal, system_prompt: str | None, body: dict[str, Any]
    ) -> None:
        """As many workers as requests may be in flight, each on one dialogue at a time."""
        servers = [Server(url, self) for url in self.urls]
        pool = Pool(servers, body, self.timeout, journal.progress.console.print)
        waiting = enumerate(rows)

        async def work() -> None:
            for number, row in waiting:
                await asyncio.sleep(0)  # many rows without a request would keep Ctrl-C waiting
                if number in journal.offsets:
                    continue
                dialogue = Dialogue(row, system_prompt)
                while (messages := dialogue.prompt()) is not None:
                    try:
                        dialogue.add(await pool.ask(messages, dialogue.counts))
                    except RowError as error:
                        dialogue.reason = str(error)
                journal.write(number, row, dialogue)

        workers: list[asyncio.Task] = []
        try:
            body["model"] = body["model"] or await pool.only_model()
            workers += [asyncio.create_task(work()) for _ in range(self.concurrency * len(servers))]
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await asyncio.gather(*(server.client.close() for server in servers))


class ServerError(Exception):
    """A request has no answer after all attempts, which may be the server's fault or the row's."""


class Server:
    """One server through the openai client, which repeats what fails and ends what takes too long.

    `in_flight` counts the requests that it has or that wait for it. It is asked nothing until
    `rests_until`, and last answered at `answered_at`: seconds of the monotonic clock.
    """

    def __init__(self, url: str, options: Servers):
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "regenerate=server needs the openai client: pip install openai"
            ) from error
        self.openai, self.url, self.retries = openai, PASSWORD.sub("//", url), options.retries
        self.free = asyncio.Semaphore(options.concurrency)
        self.in_flight, self.error, self.rests_until, self.answered_at = 0, "", 0.0, 0.0
        self.key = os.environ.get(options.api_key_env)
        self.headers = {} if self.key else {"Authorization": openai.Omit()}
        self.client = openai.AsyncOpenAI(
            base_url=url.rstrip("/"),
            api_key=self.key or "none",
            max_retries=options.retries,
            timeout=openai.Timeout(options.timeout, connect=min(30.0, options.timeout)),
            # proxies of the environment are for other machines than this one
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not LOCAL.search(url + "/")),
        )

    async def send(self, request: Awaitable[Any]) -> Any:
        """The client's reply. Raises ServerError, RowError when the request is refused, RunError
        when every one would be.
        """
        try:
            return await request
        except self.openai.APITimeoutError as error:
            raise ServerError("timed out") from error
        except self.openai.APIConnectionError as error:
            raise ServerError("connection failed") from error
        except self.openai.APIStatusError as error:
            status, text = error.status_code, error.response.text
        text = text.replace(self.key, "<key>") if self.key else text
        message = MESSAGE.search(text)
        words = (message[1] if message else text.strip()).partition("\n")[0][:120]
        if status in (408, 409, 429) or status >= 500:
            raise ServerError(f"HTTP {status}", words)
        if status in (401, 403, 404):
            raise RunError(
                f"{self.url} refuses every request (HTTP {status}: {words}): check "
                "regenerate.model, regenerate.urls, which usually end in /v1, and the key in the "
                "environment variable that regenerate.api_key_env names"
            )
        raise RowError(f"HTTP {status}: {re.sub('[0-9]+', 'N', words)}")

    async def ask(self, body: dict[str, Any], counts: Counter[str]) -> Message:
        """The answer of a chat completion; a reply that is none is asked for again, as often as the
        client repeats a request. Raises what `send` raises.
        """
        given = {"model": body["model"], "messages": body["messages"], "extra_body": body}
        completions = self.client.chat.completions.with_raw_response
        for attempt in range(self.retries + 1):
            counts["retries"] += attempt > 0
            raw = await self.send(completions.create(**given, extra_headers=self.headers))
            counts["retries"] += raw.retries_taken
            try:
                reply = json.loads(raw.http_response.text)
                choice, usage = reply["choices"][0], reply.get("usage") or {}
                message, end = choice["message"], choice.get("finish_reason")
                if end in ("abort", "error", "content_filter"):
                    raise RowError(f"finish reason {end}")
                reasoning = message.get("reasoning_content") or message.get("reasoning")
                answer = read_answer(message.get("content"), reasoning, end == "length")
                counts["answer_tokens"] += int(usage.get("completion_tokens") or 0)
                return answer
            except RowError as error:
                fault = str(error)
            except (ValueError, LookupError, TypeError, AttributeError):
                fault = "malformed reply"
        raise ServerError(fault)

    async def is_well(self, body: dict[str, Any]) -> bool:
        """Whether it answers a short request at once, or refuses it."""
        once = self.client.with_options(max_retries=0).chat.completions
        given = {**PROBE, "model": body["model"], "extra_body": body | PROBE}
        try:
            await self.send(once.with_raw_response.create(**given, extra_headers=self.headers))
        except RowError:
            return True
        except ServerError:
            return False
        return True


@dataclass
class Pool:
    """Servers that share the requests, with `body` in each of them; `report` prints."""

    servers: list[Server]
    body: dict[str, Any]
    timeout: float
    report: Callable[..., None]

    async def ask(self, messages: list[Message], counts: Counter[str]) -> Message:
        """The answer of the server with the least in flight. Raises RowError when a server refuses
        the request or fails on it alone, RunError when no server answers.
        """
        started = time.monotonic()
        while True:
            awake = [s for s in self.servers if s.rests_until <= time.monotonic()]
            if not awake:
                raise RunError(f"no server answers any more ({self.errors()})")
            server = min(awake, key=lambda s: (s.in_flight, random.random()))
            server.in_flight += 1
            try:
                async with server.free:
                    if server.rests_until > time.monotonic():
                        continue  # it has failed while this waited for it
                    answer = await server.ask(self.body | {"messages": messages}, counts)
                    server.answered_at = time.monotonic()
                    return answer
            except ServerError as error:
                await self.judge(server, error, started)
            finally:
                server.in_flight -= 1

    async def judge(self, server: Server, error: ServerError, started: float) -> None:
        """A row that a well server cannot answer is rejected (RowError); a server that fails rests,
        and the row is asked elsewhere.
        """
        now, kind = time.monotonic(), error.args[0]
        # A busy server refuses while it works on others, of which it ends one within the timeout.
        busy = now - max(started, server.answered_at) < self.timeout
        if server.rests_until > now or (kind == "HTTP 429" and busy):
            return
        if await server.is_well(self.body):
            raise RowError(f"no answer after {server.retries + 1} attempts: {kind}")
        server.error, server.rests_until = ": ".join(error.args), time.monotonic() + REST
        line = f"regenerate: {server.url} fails ({server.error}); it is tried again now and then"
        self.report(line, markup=False, soft_wrap=True)

    async def only_model(self) -> str:
        """The one model that the servers list. Raises RunError."""
        names = set()
        for server in self.servers:
            server.error = "it lists no model"
            try:
                request = server.client.models.list(extra_headers=server.headers)
                names |= {model.id for model in (await server.send(request)).data}
            except ServerError as error:
                server.error = ": ".join(error.args)
            except (AttributeError, TypeError):
                continue  # a reply that is no list of models
        if len(names) != 1:
            several = f"several models ({', '.join(sorted(names))})"
            raise RunError(
                f"the servers list {several if names else f'no model ({self.errors()})'}: name one "
                "in regenerate.model, and check regenerate.urls"
            )
        return names.pop()

    def errors(self) -> str:
        return "; ".join(f"{server.url}: {server.error}" for server in self.servers)
