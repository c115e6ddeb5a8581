"""The benchmark in SGLang: a stock server, chains and trees; acceptance from its counters of every
request.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import httpx

from eagle3.benchmark import served
from eagle3.benchmark.statistics import Answer
from eagle3.engines.server import find_package, interpreter
from eagle3.errors import RunError

VERSIONS = ">=0.5.23,<0.6"  # 0.5.23 is the one tested


def check_settings(benchmark: dict[str, Any]) -> None:
    """What can be told of the section `benchmark` before anything starts. Raises ConfigError."""
    if not (benchmark.get("url") and benchmark.get("alone_url")):
        find_package(
            interpreter("sglang", benchmark.get("python")),
            ("sglang",),
            VERSIONS,
            "benchmark.python",
        )


def run(
    job,
    configs: list[list[int]],
    suites: list[str],
    max_new_tokens: int | None,
    temperature: float,
    system_prompt: str | None = None,
    protocol: str = "chat",
    execute_code: bool = False,
    paths: dict[str, str] | None = None,
    url: str | None = None,
    alone_url: str | None = None,
    python: str | None = None,
    port: int | None = None,
    tp_size: int = 1,
    mem_fraction_static: float | None = None,
    server_args: list[str] | tuple[str, ...] = (),
    ready_seconds: float = 1800.0,
    timeout: float = 1800.0,
) -> dict:
    """The stage `benchmark` of `job`, an `eagle3.pipeline.Run`: writes benchmark.json and returns
    what it holds.

    The interpreter `python` (this one if null) has SGLang; `server_args` go to its server as they
    are. `url` is a running server with the draft, `alone_url` one without, both with
    --enable-metrics; those that are null are started. Raises ConfigError, RunError.
    """
    model, python = job.config.model, interpreter("sglang", python)
    served.check_draft(job.draft_folder, job.target_config, "SGLang", speculators=False)
    version = (
        find_package(python, ("sglang",), VERSIONS, "benchmark.python")
        if not (url and alone_url)
        else None
    )
    batch = max(config[0] for config in configs)
    options = ["--model-path", model.path, "--dtype", job.target_dtype, "--tp-size", str(tp_size)]
    options += [
        "--random-seed",
        str(job.config.seed),
        "--max-running-requests",
        str(batch),
        "--enable-metrics",
    ]
    options += [
        "--disable-radix-cache"
    ]  # else a prompt costs nothing when the next batch asks it again
    options += ["--revision", model.revision] if model.revision else []
    options += ["--trust-remote-code"] if model.trust_remote_code else []
    options += ["--mem-fraction-static", str(mem_fraction_static)] if mem_fraction_static else []

    def command(port: int, drafting: list[int]) -> list[str]:
        whole = [python, "-m", "sglang.launch_server", *options, "--host", "127.0.0.1"]
        return [
            *whole,
            "--port",
            str(port),
            *drafting_options(str(job.draft_folder), *drafting),
            *server_args,
        ]

    dialect = served.Dialect("SGLang", "/generate", partial(body, temperature), read, drafting_of)
    facts = {
        "runner": "sglang",
        "version": version,
        "tp_size": tp_size,
        "server_args": list(server_args),
    }
    servers = served.Servers(
        dialect, command, url, alone_url, port, job.run_dir, ready_seconds, timeout
    )
    asked = (
        configs,
        suites,
        max_new_tokens,
        temperature,
        system_prompt,
        protocol,
        execute_code,
        paths,
    )
    return served.run(job, servers, *asked, facts)


def drafting_options(draft: str, steps: int, topk: int, verify_tokens: int) -> list[str]:
    if steps == 0:
        return []
    drafting = ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", draft]
    drafting += ["--speculative-num-steps", str(steps), "--speculative-eagle-topk", str(topk)]
    return [*drafting, "--speculative-num-draft-tokens", str(verify_tokens)]


def body(
    temperature: float, prompt: list[int], max_new_tokens: int, stop: tuple[str, ...]
) -> dict[str, Any]:
    """Nothing but the temperature shapes the distribution, whatever generation_config.json
    recommends.
    """
    sampling = {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    return {
        "input_ids": prompt,
        "sampling_params": sampling | {"max_new_tokens": max_new_tokens, "stop": list(stop)},
    }


def read(reply: dict[str, Any], steps: int) -> Answer:
    """A reply of /generate.

    The histogram holds how many rounds accepted 0, 1, ... drafts, those of the last round also
    behind the answer's end.
    """
    ids, meta = reply["output_ids"], reply["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        raise RunError(f"SGLang broke off a request: {meta['finish_reason'].get('message')}")
    if len(ids) < 2:
        return Answer(ids, 0, [0] * steps, 0.0, reply["text"], [])
    if "decode_throughput" not in meta:
        raise RunError("SGLang does not tell how long it decoded: start it with --enable-metrics")
    seconds = (len(ids) - 1) / meta["decode_throughput"]
    if steps == 0:
        return Answer(ids, len(ids) - 1, [], seconds, reply["text"])
    histogram = meta["spec_correct_drafts_histogram"]
    accepted_at = [sum(histogram[position:]) for position in range(1, steps + 1)]
    return Answer(ids, meta["spec_verify_ct"], accepted_at, seconds, reply["text"])


def drafting_of(get: Callable[[str], httpx.Response]) -> list[int]:
    """[steps, topk, verify_tokens] of a running server. Raises RunError."""
    response = get("/server_info")
    if response.status_code != 200:
        raise RunError(
            f"{response.url} is no SGLang server (HTTP {response.status_code}); check benchmark.url"
        )
    info = response.json()
    algorithm = info.get("speculative_algorithm")
    if algorithm is None:
        return [0, 0, 0]
    if algorithm != "EAGLE3":
        raise RunError(
            f"{response.url} drafts with --speculative-algorithm {algorithm}; an EAGLE3 draft needs EAGLE3 there, "
            "or nothing it drafts is ever accepted"
        )
    return [info[f"speculative_{name}"] for name in ("num_steps", "eagle_topk", "num_draft_tokens")]


run.in_process, run.check_settings = False, check_settings
