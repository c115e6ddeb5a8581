"""`stages=[regenerate]`: the target answers a dataset again, so that a draft learns its words."""

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import httpx

from eagle3.config import Data, Source, Within, instantiate
from eagle3.data.chat import Chat, with_system
from eagle3.data.rows import Message, RowError
from eagle3.data.sources import DataFile, Row, SourceFiles, find_files, read_rows, why_none
from eagle3.engines.engine import is_loop
from eagle3.errors import ConfigError, RunError
from eagle3.runs.artefact import artefact, fingerprint, read_facts
from eagle3.runs.logger import redact
from eagle3.runs.progress import Progress
from eagle3.target.handle import TargetHandle
from eagle3.target.loading import context_length

ADDRESS = re.compile(r"https?://([^/@\s]+@)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/\S*)?")
LOCAL = re.compile(r"//([^/@]*@)?(localhost|127\.0\.0\.1|\[::1\]|0\.0\.0\.0)[:/]")
# What changes no answer: no part of the fingerprint, so that answers are found again.
HOW_TO_ASK = {"urls", "api_key_env", "concurrency", "retries", "timeout", "batch_size"}
SAMPLING = ("temperature", "top_p", "top_k", "seed")
LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")
LONGEST_LINE = 1 << 20  # bytes of a journal's line that are written as one piece
MOST_FAILURES = 20  # rows in a row without an answer, after which servers count as dead


def regenerate(
    config: dict, data: Data, sources: SourceFiles, chat: Chat, target: TargetHandle, cache_dir: str
) -> tuple[SourceFiles, list[Path]]:
    """Answer again; returns what to prepare from and the artefact of each source."""
    answerer, again, paths = instantiate(config), [], []
    longest = config["max_new_tokens"] or data.max_length
    asked = {k: v for k, v in config.items() if k not in HOW_TO_ASK} | {"max_new_tokens": longest}
    # What an answer depends on beside its row. Which layers a draft reads changes none.
    known = {k: v for k, v in target.identity.items() if k != "aux_layer_ids"}
    known |= {"chat": chat.identity, "regenerate": asked, "format": 4}  # of the journal
    kept = Path(cache_dir, "answers", f"{fingerprint(known)}.jsonl")
    for source, files in sources:
        # Rows that an epoch would leave out need no answer; a weight above 1 is left to `prepare`.
        share = min(1.0, source.weight)
        inputs = {
            **known,
            "data.num_samples": data.num_samples,
            "data.system_prompt": data.system_prompt,
            "share of the rows": share,
            "files": [file.identity for file in files],
        }

        def write(folder: Path, files: list[DataFile] = files, share: float = share) -> dict:
            read = partial(read_rows, files, data.num_samples, share=share)

            def answered() -> str:
                # Those of other data too: not all rows of this one are read when a signal comes.
                return f"{len(journal.offsets):,} answered rows in {kept}"

            bar = Progress("regenerate", data.num_samples, "rows", kept=answered)
            with Journal(kept, chat, bar) as journal, bar:
                print(f"regenerate: {describe(asked)}; {answered()}")
                rows = bar.follow((row.share, row) for row in read())
                asking = unanswered(rows, journal, data.system_prompt)
                answerer.answer(asking, journal, longest, chat, target)
                return finish(folder, read(), journal, data.system_prompt, files)

        path = artefact(cache_dir, "regenerated", inputs, write, "regenerate")
        warn(read_facts(path), asked)
        answers = Source(str(path / "conversations.jsonl"), weight=max(1.0, source.weight))
        again.append((answers, find_files(answers, cache_dir)))
        paths.append(path)
    return again, paths


def describe(asked: dict[str, Any]) -> str:
    """The sampling in words."""
    given = [f"{name} {asked[name]}" for name in SAMPLING if asked[name] is not None]
    sampling = ", ".join(given) or "the sampling of the server"
    if asked["temperature"] == 0:
        sampling = "greedy"
    return f"{sampling}, at most {asked['max_new_tokens']:,} tokens an answer"


def warn(facts: dict[str, Any], asked: dict[str, Any]) -> None:
    """Print how many answers were cut, and how many repeat themselves."""
    turns, longest = facts["turns"], asked["max_new_tokens"]
    if cut := facts["truncated"]:
        remedy = "raise regenerate.max_new_tokens"
        print(f"regenerate: {cut:,} of {turns:,} answers were cut at {longest:,} tokens: {remedy}")
    if loops := facts["loops"]:
        remedy = "" if asked["temperature"] else ": set a regenerate.temperature above 0"
        share = f"{loops:,} of {turns:,} answers ({loops / turns:.1%})"
        print(f"regenerate: {share} repeat the same words again and again{remedy}")


class Dialogue:
    """A row that is answered turn by turn with the answers so far; `reason` says why not.

    `key` depends on the messages alone that are to be answered, wherever the row stands.
    """

    def __init__(self, row: Row, system_prompt: str | None):
        self.messages, self.pending, self.reason = [], [], row.reason
        self.counts = {"retries": 0, "answer_tokens": 0}
        if row.conversation is None:
            return
        messages = with_system(row.conversation.messages, system_prompt)
        given = (m for m in messages if m["role"] != "assistant")
        self.pending = [{key: m[key] for key in ("role", "content")} for m in given]
        self.key = fingerprint({"messages": self.pending})
        # The results of tools belong to the old calls; new answers may call others.
        called = any(m["role"] == "tool" or "tool_calls" in m for m in messages)
        if called or row.conversation.tools:
            self.reason = "tool calls cannot be answered again"
        elif any(LONE_SURROGATE.search(m["content"]) for m in self.pending):
            self.reason = "bad UTF-8"

    @property
    def ended(self) -> bool:
        return self.reason is not None or not self.pending

    def prompt(self) -> list[Message]:
        """The messages to ask with next."""
        while not self.messages or self.messages[-1]["role"] != "user":
            self.messages.append(self.pending.pop(0))
        # Reasoning is not sent back, as chat templates of reasoning models drop it too.
        return [{"role": m["role"], "content": m["content"]} for m in self.messages]

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


class Journal(AbstractContextManager):
    """Answered dialogues, a line each as they come, of all runs that ask the same target alike.

    `offsets` says by a dialogue's key where its line begins, `failed` why it has no answer; what
    has none is asked again by the next call. Several processes may append.
    """

    def __init__(self, path: Path, chat: Chat, bar: Progress):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.chat, self.bar, self.offsets, self.failed = chat, bar, {}, {}
        # A line goes to the disk as one piece, or other processes would write into it.
        self.stream, self.reader = path.open("ab", LONGEST_LINE), path.open("rb")
        end, line = 0, b"\n"
        for line in self.reader:
            entry = {}
            # A line that is damaged, or in which a call was killed, is answered again.
            with suppress(ValueError, TypeError, RecursionError):
                entry = dict(json.loads(line))
            if entry.pop("checksum", None) == fingerprint(entry):
                self.offsets[entry["key"]] = end
            end += len(line)
        if not line.endswith(b"\n"):
            self.stream.write(b"\n")

    def __exit__(self, *error: Any) -> None:
        self.stream.close()
        self.reader.close()

    def add(self, dialogue: Dialogue) -> None:
        """Note a dialogue that has ended."""
        if dialogue.reason is not None:
            self.failed[dialogue.key] = dialogue.reason
            self.bar.advance()
            return
        said = (m for m in dialogue.messages if m["role"] == "assistant")
        texts = [m.get("reasoning_content", "") + m["content"] for m in said]
        loops = sum(is_loop(self.chat.tokenize(text)) for text in texts)
        entry = {"key": dialogue.key, "messages": dialogue.messages, "loops": loops}
        entry |= dialogue.counts
        line = to_line(entry | {"checksum": fingerprint(entry)})
        self.stream.write(line)
        self.stream.flush()
        self.bar.complete(dialogue.counts["answer_tokens"], len(texts))
        self.offsets[dialogue.key] = self.stream.tell() - len(line)

    def read(self, key: str) -> dict[str, Any]:
        self.reader.seek(self.offsets[key])
        return json.loads(self.reader.readline())


def unanswered(
    rows: Iterator[Row], journal: Journal, system_prompt: str | None
) -> Iterator[Dialogue]:
    """What is to be asked: what the journal lacks, once however often it comes."""
    asked = set()
    for row in rows:
        dialogue = Dialogue(row, system_prompt)
        if dialogue.reason is not None:
            journal.bar.advance()
        elif dialogue.key in journal.offsets or dialogue.key in asked:
            journal.bar.skip()
        else:
            asked.add(dialogue.key)
            yield dialogue


def finish(
    folder: Path, rows: Iterator[Row], journal: Journal, system_prompt: str | None,
    files: list[DataFile],
) -> dict[str, Any]:  # fmt: skip
    """Write answers and rejects in the order of the rows; returns the facts. Raises RunError."""
    counts = Counter(rows=0, answered=0, turns=0, truncated=0, loops=0, retries=0, answer_tokens=0)
    rejected, names = Counter(), ("conversations.jsonl", "rejects.jsonl")
    with (folder / names[0]).open("wb") as conversations, (folder / names[1]).open("wb") as rejects:
        for row in rows:
            dialogue = Dialogue(row, system_prompt)
            reason = dialogue.reason or journal.failed.get(dialogue.key)
            counts["rows"] += 1
            if reason is not None:
                rejected[reason] += 1
                rejects.write(to_line({"file": row.file, "line": row.line, "reason": reason}))
                continue
            entry = journal.read(dialogue.key)
            answers = [m for m in entry["messages"] if m["role"] == "assistant"]
            cut = sum("truncated" in m for m in answers)
            counts.update(answered=1, turns=len(answers), truncated=cut)
            counts.update({name: entry[name] for name in ("loops", "retries", "answer_tokens")})
            place = f"{row.file}:{row.line}"
            conversations.write(to_line({"id": place, "messages": entry["messages"]}))
    if not counts["answered"]:
        words = f"none of the {counts['rows']} rows could be answered again"
        raise RunError(f"{words} ({why_none(rejected, files)}); check data and regenerate")
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
        self, dialogues: Iterator[Dialogue], journal: Journal, longest: int, chat: Chat,
        target: TargetHandle,
    ) -> None:  # fmt: skip
        """As many dialogues side by side as `batch_size` says, each turn by turn."""
        top = {"top_p": self.top_p or 1.0, "top_k": max(0, self.top_k or 0), "seed": self.seed}
        sampling = {"temperature": self.temperature, **top} if self.temperature > 0 else None
        asking: dict[str, tuple[Dialogue, str]] = {}
        goes_on: list[Dialogue] = []
        first = next(dialogues, None)
        if first is None:  # the target need not be loaded
            return
        model, waiting = target.load(), chain([first], dialogues)
        context = context_length(model.config)

        def take() -> tuple[str, list[int]] | None:
            """The next turn of a dialogue that goes on, or of a new one."""
            while dialogue := goes_on.pop() if goes_on else next(waiting, None):
                try:
                    prompt = chat.encode_prompt(dialogue.prompt())
                    if len(prompt) >= context:
                        raise RowError("the prompt is longer than the target's context")
                except RowError as error:
                    dialogue.reason = str(error)
                    journal.add(dialogue)
                    continue
                # Some templates open the thinking in the prompt, and the answer only closes it.
                opened = chat.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
                asking[dialogue.key] = dialogue, "<think>" * opened
                return dialogue.key, prompt
            return None

        given = self.batch_size, longest, sampling, journal.bar.count_tokens
        for key, ids in model.answer(take, *given):
            dialogue, opening = asking.pop(key)
            truncated = ids[-1] not in model.eos_token_ids
            dialogue.add(opening + chat.decode(ids), None, truncated, len(ids))
            if dialogue.ended:
                journal.add(dialogue)
            else:
                goes_on.append(dialogue)


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
        self, dialogues: Iterator[Dialogue], journal: Journal, longest: int, chat: Chat,
        target: TargetHandle,
    ) -> None:  # fmt: skip
        if not self.urls or not all(map(ADDRESS.fullmatch, self.urls)):
            raise ConfigError("regenerate.urls must name servers, as [http://127.0.0.1:30000/v1]")
        asyncio.run(self.answer_all(dialogues, journal, longest))

    async def answer_all(
        self, dialogues: Iterator[Dialogue], journal: Journal, longest: int
    ) -> None:
        """As many workers as requests may be in flight, each on one dialogue at a time."""
        servers = [Server(url, self, journal.bar.count_tokens) for url in self.urls]
        body = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        body["model"] = self.model or await only_model(servers)
        body = {"max_tokens": longest, **body, **self.extra_body}

        async def work() -> None:
            for dialogue in dialogues:
                while not dialogue.ended:
                    await ask(servers, dialogue, {**body, "messages": dialogue.prompt()})
                journal.add(dialogue)
                failures = min(server.failures for server in servers)
                if failures >= MOST_FAILURES:
                    errors = "; ".join(f"{server.name}: {server.error}" for server in servers)
                    words = f"no answer to {failures} rows in a row ({errors})"
                    done = f"{len(journal.offsets):,} rows are done and kept"
                    raise RunError(f"{words}; {done}, and the same command goes on from there")

        await asyncio.gather(*(work() for _ in range(self.concurrency * len(servers))))


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
            problem = f"{server.name} lists no model ({error})"
            problem += "; check regenerate.urls, or set regenerate=builtin"
    if len(names) > 1:
        models = ", ".join(sorted(names))
        problem = f"regenerate.urls serve different models ({models}); name one in .model"
    if len(names) != 1:
        raise RunError(problem)
    return names.pop()


class Server:
    """One server, asked through the openai client; `failures` counts those since an answer."""

    def __init__(self, url: str, options: Servers, count_tokens: Callable[[int], None]):
        try:
            import openai
        except ImportError as error:
            words = "regenerate=server needs the openai client: pip install 'eagle3[regenerate]'"
            raise ConfigError(words) from error
        self.openai, self.name, self.count_tokens = openai, redact(url), count_tokens
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
            self.count_tokens(num_tokens)
            dialogue.add(message.get("content"), reasoning, end == "length", num_tokens)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise RowError("malformed reply") from error
