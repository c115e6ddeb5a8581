"""SGLang: the one place that spells its flags, request bodies and replies."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from eagle3.engines.engine import Answer, Drafting, Engine, Launch, answer_of_rounds
from eagle3.errors import ConfigError, RunError

# With these a prompt's hidden states come in another order, from another process or not at all.
CAPTURE_CONFLICTS = {"--enable-dp-attention", "--enable-mixed-chunk", "--pp-size"}
CAPTURE_CONFLICTS |= {"--pipeline-parallel-size"}
# By method, the flags of steps, topk and verify_tokens. The number of slots is that of the tokens
# to verify in DFlash; in DSpark it is one less, and 0.5.23 wants it beside them.
DRAFTING = {
    "eagle3": ("num-steps", "eagle-topk", "num-draft-tokens"),
    "dflash": (None, None, "num-draft-tokens"),
    "dspark": ("dspark-block-size", None, "num-draft-tokens"),
}


@dataclass(frozen=True)
class Capture:
    """What a server that leaves hidden states to a forward hook is asked for."""

    hook_factory: str  # module:name
    hook_config: dict[str, Any]  # its argument
    layer_ids: list[int] | None  # None: the ones SGLang captures by default
    device: str
    batch_tokens: int  # that go through it at once
    dp_size: int = 1
    ep_size: int = 1
    quantization: str | None = None


class SGLang(Engine):
    """A new engine needs the facts and the methods that have a docstring here."""

    name = "SGLang"
    packages = ("sglang",)
    versions = ">=0.5.23,<0.6"  # 0.5.23 is the one tested
    module = "sglang.launch_server"
    launch_flags = ("--model-path", "--tp-size", "--mem-fraction-static")
    generate_path = "/generate"
    drafts_trees = True
    reads_speculators = False

    def benchmark_command(self, launch: Launch, drafting: dict, batch: int, seed: int) -> list[str]:
        """A server that reports what each request took and accepted; `drafting`: `draft_options`"""
        options = {"--random-seed": seed, "--max-running-requests": batch, "--enable-metrics": True}
        options["--disable-radix-cache"] = True  # a cached prompt would cost the next batch nothing
        return self.server_command(launch, options | drafting)

    def capture_command(self, launch: Launch, capture: Capture) -> list[str]:
        """Raises ConfigError where the launch's `server_args` would spoil the capture."""
        for argument in launch.server_args:
            if argument.split("=")[0] in CAPTURE_CONFLICTS:
                raise ConfigError(f"target.server_args: {argument} does not go with target=sglang")
        # Of a model's modules it alone is given the last and the auxiliary hidden states.
        hook = {"name": "eagle3", "target_modules": ["*logits_processor"]}
        hook |= {"hook_factory": capture.hook_factory, "config": capture.hook_config}
        options = {
            "--device": capture.device,
            "--dp-size": capture.dp_size,
            "--ep-size": capture.ep_size,
            "--quantization": capture.quantization,
            "--max-prefill-tokens": capture.batch_tokens,
            "--chunked-prefill-size": -1,
            "--speculative-algorithm": "EAGLE3",  # names how layers are numbered; loads no draft
            "--return-hidden-states-mode": "last",
            "--forward-hooks": json.dumps([hook]),
            "--enable-return-aux-hidden-states": True,
            "--disable-radix-cache": True,  # a cached position would never reach the hook
            "--skip-tokenizer-init": True,
            "--disable-prefill-cuda-graph": True,  # a replayed graph calls no hook
            "--disable-decode-cuda-graph": True,
            "--attention-backend": "torch_native" if capture.device == "cpu" else None,
            "--return-aux-hidden-state-layer-ids": capture.layer_ids,
        }
        return self.server_command(launch, options)

    def capture_environment(self, device: str) -> dict[str, str]:
        """What `capture_command` needs in its environment."""
        return {"SGLANG_USE_CPU_ENGINE": "1"} if device == "cpu" else {}

    def samples_drafts(self, method: str, topk: int, whole_vocabulary: bool) -> bool:
        """Whether it can draw drafts from their distribution, as it does the target's tokens."""
        chains = topk == 1 and whole_vocabulary  # else 0.5.23 does not start
        return {"eagle3": chains, "dflash": False, "dspark": True}[method]

    def draft_options(self, draft: str, method: str, drafting: Drafting, sampled=False) -> dict:
        """The flags of a server with a draft, whose config names the `method`; `sampled`: drawn,
        not the likeliest, where it can.
        """
        options = {"--speculative-algorithm": method.upper()}
        options["--speculative-draft-model-path"] = draft
        for flag, value in zip(DRAFTING[method], drafting, strict=True):
            options |= {f"--speculative-{flag}": value} if flag else {}
        # DSpark is always drawn at a temperature.
        asked = sampled and method == "eagle3"
        return options | ({"--speculative-use-rejection-sampling": True} if asked else {})

    def request_body(self, prompt: list[int], max_new_tokens: int, sampling: dict) -> dict:
        """The JSON posted to `generate_path`; `sampling`: what engines spell alike."""
        more = {"top_k": -1, "max_new_tokens": max_new_tokens}
        return {"input_ids": prompt, "sampling_params": sampling | more}

    def read_ids(self, reply: dict[str, Any]) -> list[int]:
        """The new tokens. Raises RunError where the server broke the request off."""
        reason = reply["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            raise RunError(f"SGLang broke off a request: {reason.get('message')}")
        return reply["output_ids"]

    def read_reply(self, reply: dict[str, Any], steps: int) -> Answer:
        """Raises RunError where the reply lacks the counters of the request."""
        ids, text, meta = self.read_ids(reply), reply["text"], reply["meta_info"]
        truncated = meta["finish_reason"]["type"] == "length"
        if len(ids) < 2:  # the prefill gave all there is, and no round was needed
            return answer_of_rounds(ids, text, [], steps, 0.0, truncated)
        if "decode_throughput" not in meta:
            raise RunError("SGLang does not report its speed: start it with --enable-metrics")
        seconds = (len(ids) - 1) / meta["decode_throughput"]
        if steps == 0:
            return answer_of_rounds(ids, text, [], 0, seconds, truncated)
        # How many rounds accepted 0, 1, ... drafts; of the last round also those that lie behind
        # the end of the answer.
        histogram = meta["spec_correct_drafts_histogram"]
        accepted_at = [sum(histogram[position:]) for position in range(1, steps + 1)]
        return Answer(ids, meta["spec_verify_ct"], accepted_at, seconds, text, None, truncated)

    def read_drafting(self, get: Callable[[str], httpx.Response], method: str) -> Drafting:
        """How a running server drafts, asked by `get(path)`. Raises RunError where it is none, or
        drafts by another method than the draft's.
        """
        response = get("/server_info")
        if response.status_code != 200:
            raise RunError(f"{response.url} is no SGLang server; check benchmark.url")
        info = response.json()
        algorithm = info.get("speculative_algorithm")
        if algorithm is None:
            return 0, 0, 0
        if algorithm != method.upper():
            # By another one it would run, and accept nothing.
            needed = f"the draft needs {method.upper()}"
            raise RunError(f"{response.url} drafts by {algorithm}; {needed}")
        names = ("num_steps", "eagle_topk", "num_draft_tokens")
        steps, topk, verify_tokens = (info[f"speculative_{name}"] for name in names)
        return (verify_tokens - 1 if topk == 1 else steps), topk, verify_tokens  # of a block: 1
