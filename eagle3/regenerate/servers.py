"""The target behind OpenAI-compatible servers (SGLang, vLLM) answers a dataset again."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from eagle3.data.rows import Message, RowError
from eagle3.data.sources import Row
from eagle3.errors import ConfigError, RunError
from eagle3.regenerate.journal import Journal
from eagle3.regenerate.meter import Meter
from eagle3.regenerate.pool import NoAnswerError, Pool, connect
from eagle3.regenerate.turns import history, prompts


def server(
    run,
    rows: Iterator[Row],
    folder: Path,
    *,
    urls: list[str],
    model: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    concurrency: int = 64,
    retries: int = 6,
    timeout: float = 600.0,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    extra_body: dict[str, Any] | None = None,
    total: int | None = None,
) -> dict[str, Any]:
    """Write `conversations.jsonl` and `rejects.jsonl` into `folder`; returns the facts. Raises ConfigError, RunError.

    An interrupted call leaves a journal from which the next one goes on; `total` rows are only for the progress bar.
    """
    check(urls, concurrency, retries, timeout, max_new_tokens)
    options = {"max_tokens": max_new_tokens or run.config.data.max_length}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    options |= {name: value for name, value in sampling.items() if value is not None} | (extra_body or {})
    journal = Journal(folder)
    try:
        if journal.facts is None:
            with Meter(total, journal.done) as meter:
                servers = [connect(url.rstrip("/"), os.environ.get(api_key_env), timeout) for url in urls]
                pool = Pool(servers, concurrency, retries, meter.say)
                try:
                    asyncio.run(answer_rows(pool, journal, meter, rows, model, options, run.config.data.system_prompt))
                except RunError as error:
                    of = f" of {total}" if total is not None else ""
                    kept = f"{journal.done}{of} rows are done and kept, and the same command goes on from there"
                    raise RunError(f"{error}; {kept}") from error
        return journal.finish()
    finally:
        journal.close()


def check(urls: list[str], concurrency: int, retries: int, timeout: float, max_new_tokens: int | None) -> None:
    """Raises ConfigError for values that cannot work."""
    if not urls:
        raise ConfigError("regenerate.urls is empty: give at least one, such as http://127.0.0.1:30000/v1")
    for url in urls:
        if not is_address(url):
            raise ConfigError(f"regenerate.urls has {url}, which is no address such as http://127.0.0.1:30000/v1")
    if len(set(urls)) < len(urls):
        raise ConfigError("regenerate.urls names a server twice: raise regenerate.concurrency instead")
    if concurrency < 1:
        raise ConfigError(f"regenerate.concurrency={concurrency} must be at least 1")
    if retries < 0:
        raise ConfigError(f"regenerate.retries={retries} must be at least 0")
    if timeout <= 0:
        raise ConfigError(f"regenerate.timeout={timeout} must be above 0 seconds")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"regenerate.max_new_tokens={max_new_tokens} must be at least 1, or null")


def is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


async def answer_rows(
    pool: Pool,
    journal: Journal,
    meter: Meter,
    rows: Iterator[Row],
    model: str | None,
    options: dict[str, Any],
    system_prompt: str | None,
) -> None:
    """As many workers as requests may be in flight, each on one conversation, until `rows` is through."""
    waiting = journal.once(rows)

    async def work() -> None:
        for row, finished in waiting:
            await asyncio.sleep(0)  # millions of rows without a request would keep Ctrl-C waiting
            if finished:
                continue
            try:
                messages = prompts(row, system_prompt)
            except RowError as error:
                journal.reject(row, str(error))
                meter.row()
                continue
            await answer_row(pool, journal, meter, row, messages, {"model": model, **options})

    workers: list[asyncio.Task] = []
    try:
        model = model or await pool.only_model()
        workers += [asyncio.create_task(work()) for _ in range(pool.concurrency * len(pool.servers))]
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await pool.close()


async def answer_row(
    pool: Pool, journal: Journal, meter: Meter, row: Row, messages: list[Message], options: dict[str, Any]
) -> None:
    """Ask turn by turn, each with the answers so far, up to the first that was cut; journal what came of it."""
    spoken: list[Message] = []
    servers: Counter[str] = Counter()
    tokens = retries = 0
    try:
        for message in messages:
            spoken.append(message)
            if message["role"] != "user":
                continue
            reply = await pool.complete({**options, "messages": history(spoken)})
            spoken.append(reply.message)
            servers[reply.server] += 1
            tokens, retries = tokens + (reply.tokens or 0), retries + reply.retries
            if reply.message.get("truncated"):
                break
    except RowError as error:
        retries += error.retries if isinstance(error, NoAnswerError) else 0
        journal.reject(row, str(error), again=True, retries=retries)
        meter.row()
        if not journal.was_given_up(row):
            pool.give_up(error)
        return
    journal.answer(row, spoken, {"retries": retries, "answer_tokens": tokens}, servers)
    meter.row(sum(servers.values()), tokens)
