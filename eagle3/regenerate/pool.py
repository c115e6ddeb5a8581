"""OpenAI-compatible servers as one: requests shared evenly, repeated when they fail, failing servers rested."""

import asyncio
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from eagle3.data.rows import Message, RowError
from eagle3.errors import RunError
from eagle3.regenerate import turns

FIRST_PAUSE = 0.5  # seconds; doubled with every failure in a row
LONGEST_PAUSE = 30.0
LONGEST_RETRY_AFTER = 600.0
LONGEST_CONNECT = 30.0
UNANSWERED_ROWS = 3  # so many rows without an answer, and none answered in between, end the stage
REFUSED_ROWS = 100
UNUSABLE_ENDS = ("abort", "error", "content_filter")


class AttemptError(Exception):
    """An attempt that may go better next time. `connected`: the server took the request, so the row may be at fault."""

    def __init__(self, kind: str, detail: str = "", connected: bool = True, retry_after: float = 0.0):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.connected, self.retry_after = kind, connected, retry_after


class NoAnswerError(RowError):
    """A row used up its attempts, `retries` of them after a failure."""

    def __init__(self, reason: str, retries: int):
        super().__init__(reason)
        self.retries = retries


@dataclass
class Server:
    """`url` ends in /v1. `failures` counts those since its last answer; `listening` is false until /models answers."""

    url: str
    client: httpx.AsyncClient
    in_flight: int = 0
    asked: int = 0
    failures: int = 0
    failed_at: float = 0.0
    rests_until: float = 0.0
    listening: bool = True
    last_error: str = ""


@dataclass
class Reply:
    """An answer to one request, who gave it, and how many attempts failed before."""

    message: Message
    tokens: int | None
    server: str
    retries: int


@dataclass
class Pool:
    """`complete` asks; `say` prints one line. Times are in seconds."""

    servers: list[Server]
    concurrency: int
    retries: int
    say: Callable[[str], None]
    unanswered: int = 0
    refused: int = 0
    broken: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    revivals: set[asyncio.Task] = field(default_factory=set)

    async def complete(self, body: dict[str, Any]) -> Reply:
        """Raises RowError when a server refuses the request, NoAnswerError after too many failures, or RunError."""
        failed = attempts = 0
        avoid = None
        while True:
            server = await self.acquire(avoid)
            started = time.monotonic()
            try:
                message, tokens = await ask(server, body)
            except AttemptError as failure:
                self.note_failure(server, failure, started)
                failed, attempts, avoid = failed + 1, attempts + failure.connected, server
                if attempts > self.retries:
                    reason = f"no answer after {attempts} attempts: {failure.kind}"
                    raise NoAnswerError(reason, failed - 1) from failure
            else:
                server.failures = self.unanswered = self.refused = 0
                return Reply(message, tokens, server.url, failed)
            finally:
                server.in_flight -= 1
                self.changed.set()
            await asyncio.sleep(pause(attempts))

    async def acquire(self, avoid: Server | None) -> Server:
        """The free server with the least in flight; `avoid` only where every other one is out of service."""
        while True:
            if self.broken:
                raise RunError(self.broken)
            now = time.monotonic()
            ready = [s for s in self.servers if s.listening and s.rests_until <= now]
            ready = [s for s in ready if s is not avoid] or ready
            free = [s for s in ready if s.in_flight < self.concurrency]
            if free:
                server = min(free, key=lambda s: (s.in_flight, s.asked))
                server.in_flight += 1
                server.asked += 1
                return server
            self.changed.clear()
            await self.changed.wait()

    def note_failure(self, server: Server, failure: AttemptError, started: float) -> None:
        """Rest the server, longer each time; requests that were under way at its last failure count as that one."""
        server.last_error = str(failure)
        now = time.monotonic()
        if started >= server.failed_at:
            server.failures, server.failed_at = server.failures + 1, now
            self.rest(server, pause(server.failures))
        self.rest(server, failure.retry_after)
        if not failure.connected and server.listening:
            server.listening = False
            task = asyncio.create_task(self.revive(server))
            self.revivals.add(task)
            task.add_done_callback(self.revivals.discard)

    def rest(self, server: Server, seconds: float) -> None:
        server.rests_until = max(server.rests_until, time.monotonic() + seconds)
        asyncio.get_running_loop().call_later(seconds + 0.001, self.changed.set)

    async def revive(self, server: Server) -> None:
        """Wait until the server answers /models; when all are gone for `retries` tries each, the pool is broken."""
        self.say(f"regenerate: {server.url} cannot be reached ({server.last_error}); it is tried again now and then")
        while not await self.models(server):
            server.failures += 1
            if all(not s.listening and s.failures > self.retries for s in self.servers):
                self.broken = f"no server can be reached any more: {self.last_errors()}"
                self.changed.set()
                return
            await asyncio.sleep(pause(server.failures))
        self.say(f"regenerate: {server.url} is back")
        server.listening = True
        self.changed.set()

    async def models(self, server: Server) -> httpx.Response | None:
        """What /models says; None where nothing does."""
        try:
            response = await server.client.get("models", timeout=min(LONGEST_CONNECT, server.client.timeout.read))
        except httpx.RequestError as error:
            server.last_error = str(error) or type(error).__name__
            return None
        if response.status_code < 500:
            return response
        server.last_error = f"HTTP {response.status_code}"
        return None

    async def only_model(self) -> str:
        """The one model that the servers list, asked until one of them answers. Raises RunError."""
        names: set[str] = set()
        for attempt in range(self.retries + 1):
            await asyncio.sleep(pause(attempt))
            for server, response in zip(self.servers, await asyncio.gather(*map(self.models, self.servers))):
                if response is not None:
                    check_access(server, response)
                    names.update(listed(server, response))
            if names:
                break
        else:
            raise RunError(f"no server can be reached: {self.last_errors()}; start one, or set regenerate.urls")
        if len(names) > 1:
            raise RunError(
                f"the servers offer several models ({', '.join(sorted(names))}): name one in regenerate.model"
            )
        return names.pop()

    def give_up(self, error: RowError) -> None:
        """Called for each row without an answer; raises RunError once that is no single row's fault."""
        if isinstance(error, NoAnswerError):
            self.unanswered += 1
        else:
            self.refused += 1
        if self.unanswered >= UNANSWERED_ROWS:
            raise RunError(f"the servers answer nothing any more: {self.last_errors()}") from error
        if self.refused >= REFUSED_ROWS:
            raise RunError(f"the servers refuse one row after the other ({error})") from error

    def last_errors(self) -> str:
        return "; ".join(f"{s.url}: {s.last_error}" for s in self.servers if s.last_error)

    async def close(self) -> None:
        for task in self.revivals:
            task.cancel()
        await asyncio.gather(*self.revivals, return_exceptions=True)
        await asyncio.gather(*(server.client.aclose() for server in self.servers))


def connect(url: str, key: str | None, timeout: float) -> Server:
    """A server by its url; proxies of the environment are for other machines than this one."""
    local = httpx.URL(url).host in ("localhost", "127.0.0.1", "::1", "0.0.0.0")
    client = httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(timeout, connect=min(LONGEST_CONNECT, timeout)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=not local,
    )
    return Server(re.sub("//[^/@]*@", "//", url), client)


def pause(failures: int) -> float:
    """Seconds to wait after `failures` in a row: exponential, with jitter."""
    if failures == 0:
        return 0.0
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)


async def ask(server: Server, body: dict[str, Any]) -> tuple[Message, int | None]:
    """One attempt: the answer and its tokens. Raises AttemptError, RowError (the request is refused) or RunError."""
    try:
        response = await server.client.post("chat/completions", json=body)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise AttemptError("no connection", str(error) or "timed out", connected=False) from error
    except httpx.TimeoutException as error:
        raise AttemptError("timed out", f"after {server.client.timeout.read:g} s") from error
    except httpx.RequestError as error:
        raise AttemptError("connection dropped", str(error)) from error
    status = response.status_code
    if status in (408, 409, 425, 429) or status >= 500:
        raise AttemptError(f"HTTP {status}", said(response), retry_after=retry_after(response))
    check_access(server, response)
    if status >= 400:
        raise RowError(f"HTTP {status}: {re.sub(r'[0-9]+', 'N', said(response))}")
    return read_reply(response)


def check_access(server: Server, response: httpx.Response) -> None:
    """Raises RunError where the key, the model or the address is wrong, which no other row changes."""
    status = response.status_code
    if status in (401, 403):
        raise RunError(
            f"{server.url} refuses the key (HTTP {status}: {said(response)}): "
            "set the right one in the environment variable that regenerate.api_key_env names"
        )
    if status == 404 or 300 <= status < 400:
        raise RunError(
            f"{server.url} has no such model or address (HTTP {status}: {said(response)}): "
            "check regenerate.model, and regenerate.urls, which usually end in /v1"
        )


def read_reply(response: httpx.Response) -> tuple[Message, int | None]:
    """The answer and its tokens in a chat completion. Raises AttemptError."""
    try:
        reply = response.json()
    except ValueError as error:
        raise AttemptError("malformed reply", said(response)) from error
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise AttemptError("reply without choices", said(response))
    message, end = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise AttemptError("reply without a message", said(response))
    if end in UNUSABLE_ENDS:
        raise AttemptError(f"finish reason {end}")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    answer = turns.answer(
        message.get("content"), reasoning if isinstance(reasoning, str) else None, truncated=end == "length"
    )
    if answer is None:
        raise AttemptError("empty answer")
    usage = reply.get("usage")
    return answer, usage.get("completion_tokens") if isinstance(usage, dict) else None


def said(response: httpx.Response) -> str:
    """The server's message: its first line, at most 120 characters, without the key that was sent."""
    text = response.text
    try:
        content = response.json()
    except ValueError:
        content = None
    if isinstance(content, dict):
        error = content.get("error", content)
        text = error.get("message") or error.get("detail") or text if isinstance(error, dict) else error
    key = response.request.headers.get("Authorization", "").removeprefix("Bearer ")
    text = str(text).replace(key, "<key>") if key else str(text)
    return next(iter(text.strip().splitlines()), "")[:120]


def retry_after(response: httpx.Response) -> float:
    """Seconds from now that Retry-After asks for, as a number or a date."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def listed(server: Server, response: httpx.Response) -> list[str]:
    """The ids of a reply to /models. Raises RunError."""
    try:
        names = [model["id"] for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise RunError(f"{server.url}/models lists no model: name it in regenerate.model")
    return names
