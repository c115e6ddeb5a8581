"""The target behind OpenAI-compatible servers (SGLang, vLLM) answers a dataset again."""

import asyncio
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle3.data.rows import RowError
from eagle3.data.sources import Row
from eagle3.errors import ConfigError, RunError
from eagle3.regenerate.journal import Journal
from eagle3.regenerate.pool import Pool, connect
from eagle3.regenerate.turns import history, prompts

ADDRESS = re.compile(r"https?://([^/@\s]+@)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/\S*)?")


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
) -> dict[str, Any]:
    """Write `conversations.jsonl` and `rejects.jsonl` into `folder`; returns the facts. Raises ConfigError, RunError.

    An interrupted call leaves a journal from which the next one goes on.
    """
    if not urls or not all(map(ADDRESS.fullmatch, urls)):
        raise ConfigError(f"regenerate.urls={urls} must be addresses such as [http://127.0.0.1:30000/v1]")
    options = {"model": model, "max_tokens": max_new_tokens or run.config.data.max_length}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    options |= {name: value for name, value in sampling.items() if value is not None} | (extra_body or {})

    async def answer_rows() -> None:
        """As many workers as requests may be in flight, each on one conversation, until `rows` is through."""
        servers = [connect(url.rstrip("/"), os.environ.get(api_key_env), timeout) for url in urls]
        pool = Pool(servers, concurrency, retries, journal.progress.console.print)
        waiting = journal.unfinished(rows)
        workers: list[asyncio.Task] = []
        try:
            options["model"] = options["model"] or await pool.only_model()
            arguments = (pool, journal, waiting, options, run.config.data.system_prompt)
            workers += [asyncio.create_task(work(*arguments)) for _ in range(concurrency * len(urls))]
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await asyncio.gather(*(s.client.aclose() for s in servers))

    with Journal(folder) as journal:
        try:
            if not journal.complete:
                asyncio.run(answer_rows())
        except RunError as error:
            kept = f"{len(journal.offsets):,} rows are done and kept, and the same command goes on from there"
            raise RunError(f"{error}; {kept}") from error
        return journal.finish()


async def work(
    pool: Pool,
    journal: Journal,
    waiting: Iterator[tuple[int, Row]],
    options: dict[str, Any],
    system_prompt: str | None,
) -> None:
    """Ask row after row, turn by turn, each with the answers so far, up to the first that was cut."""
    for number, row in waiting:
        await asyncio.sleep(0)  # many rows without a request would keep Ctrl-C waiting
        spoken, counts, reason = [], Counter(), None
        try:
            for message in prompts(row, system_prompt):
                spoken.append(message)
                if message["role"] == "user":
                    spoken.append(await pool.complete({**options, "messages": history(spoken)}, counts))
                    if spoken[-1].get("truncated"):
                        break
        except RowError as error:
            reason = str(error)
        journal.write(number, row, spoken, reason, counts)
