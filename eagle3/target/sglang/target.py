"""`target=sglang`: hidden states from a stock SGLang server, through shared memory of this machine.

T packed tokens, U teacher rows, H the target's hidden size.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import httpx
import torch

from eagle3.batch import Batch, Features
from eagle3.engines.server import Server, interpreter
from eagle3.errors import ConfigError, RunError
from eagle3.target.sglang.blocks import SHARED, Blocks
from eagle3.target.sglang.serve import (
    ENGINE,
    ServerOptions,
    capture_server,
    check_capturable,
    log_path,
)
from eagle3.target.sglang.verify import verify_head, verify_layers, verify_server
from eagle3.target.spec import TargetSpec, check_supported
from eagle3.target.weights import TargetWeights, load_weights

# Seconds between an answer of the server and the hidden states that should have come before it.
SILENT_SECONDS = 20.0
DYING_SECONDS = 5.0  # a server that hangs up is given to end, so that its log can be shown
PROBE = (5, 11)  # tokens of the first prompts


@dataclass(eq=False)
class SGLangTarget(ServerOptions):
    """`target(batch) -> Features` like HFTarget's, from an SGLang server that this process starts
    and ends, or from one that runs here already, at `url`.

    `url` is the server's address in any case, for the other processes of this machine. The
    embedding and the head are read from the checkpoint. Raises ConfigError and RunError.
    """

    spec: TargetSpec
    device: torch.device
    url: str | None = field(default=None, kw_only=True)

    in_process: ClassVar[bool] = False

    def __post_init__(self):
        self.config, self.aux_layer_ids = self.spec.config, self.spec.aux_layer_ids
        check_supported(self.config)
        check_capturable(self.spec)
        self.server: Server | None = None
        self.blocks = Blocks()
        self.resources = ExitStack()
        self.resources.callback(self.blocks.close)
        try:
            self.check_space()
            if self.url is None:
                self.start()
            timeout = httpx.Timeout(None, connect=10)  # a long prefill is no error
            client = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)
            self.client = self.resources.enter_context(client)
            self.sender = ThreadPoolExecutor(1)
            self.resources.callback(self.sender.shutdown, wait=False, cancel_futures=True)
            self.verify()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def check_settings(section: dict[str, Any], spec: TargetSpec) -> None:
        """Raise ConfigError for what the section `target` asks for and this class cannot do."""
        check_capturable(spec)
        if section.get("url") is None:
            ENGINE.find(interpreter("sglang", section.get("python")), "target.python")

    @staticmethod
    def for_processes(section: dict[str, Any], processes: int) -> dict[str, Any]:
        """The section `target`, a null `dp_size` filled with what these processes' GPUs hold."""
        if section.get("dp_size") is not None:
            return section
        gpus = min(torch.cuda.device_count(), processes)
        return section | {"dp_size": max(1, gpus // section.get("tp_size", 1))}

    def check_space(self) -> None:
        """Raise ConfigError where shared memory cannot hold what is in flight."""
        row = 4 * self.config.hidden_size * getattr(torch, self.spec.dtype).itemsize
        # Each process of this machine has so many tokens in flight, and they share the memory.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        needed, free = self.batch_tokens * row * processes, shutil.disk_usage(SHARED).free
        if free < needed:
            raise ConfigError(
                f"target.batch_tokens={self.batch_tokens} needs {needed / 1e9:.2f} GB of shared "
                f"memory, but {SHARED} has {free / 1e9:.2f} GB free; lower it, or start the "
                "container with more, such as --shm-size=16g"
            )

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        server = capture_server(self.spec, self.device, self.blocks.folder, self)
        self.server = self.resources.enter_context(server)
        self.url = server.url

        def delete_log(kind: type | None, *error: Any) -> None:
            if kind is None:  # else the error may name it
                server.log.unlink(missing_ok=True)

        self.resources.push(delete_log)

    def close(self) -> None:
        """End the server, if this process started it, and free the shared memory.

        Its log is deleted too, unless an error is under way, which may name it.
        """
        self.resources.__exit__(*sys.exc_info())

    def check_alive(self) -> None:
        """Raise RunError with the cause where the server that this process started has ended."""
        if self.server is not None:
            self.server.check()

    def verify(self) -> None:
        """Raise RunError unless the server was started for this and a first request shows it."""
        try:
            info = self.client.get("/server_info").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise RunError(
                f"target.url={self.url} is no SGLang server that answers: {error}"
            ) from error
        verify_server(info, self.url, self.spec)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.config.vocab_size, (sum(PROBE),), generator=generator)
        prompts = [part.tolist() for part in tokens.split(PROBE)]
        features, replies = self.prefill(prompts, max_new_tokens=1)
        ends = [PROBE[0] - 1, sum(PROBE) - 1]
        verify_head(features, self.head, ends, [r["output_ids"][0] for r in replies])
        verify_layers(prompts[0], features.aux_hidden_states[: PROBE[0]], self.spec)

    @cached_property
    def weights(self) -> TargetWeights:
        return load_weights(self.spec, self.device)

    def free_weights(self) -> None:
        """Give up embedding and head, for ranks that train on this GPU; read again when needed."""
        self.__dict__.pop("weights", None)
        torch.cuda.empty_cache()

    @property
    def embedding(self) -> torch.Tensor:
        return self.weights.embedding

    @property
    def head(self) -> torch.Tensor:
        return self.weights.head

    @property
    def eos_token_ids(self) -> set[int]:
        return self.weights.eos_token_ids

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        prompts = [ids.tolist() for ids in batch.input_ids.cpu().split(batch.documents.lengths)]
        features, _ = self.prefill(prompts, max_new_tokens=0)
        rows = batch.teacher_rows.to(self.device)
        last, argmax, logsumexp = features.last_hidden_states, features.argmax, features.logsumexp
        return Features(features.aux_hidden_states, last[rows], argmax[rows], logsumexp[rows])

    def prefill(
        self, prompts: list[list[int]], max_new_tokens: int
    ) -> tuple[Features, list[dict[str, Any]]]:
        """Features of the packed prompts, each token a teacher row, and the server's replies.

        The prompts are sent `batch_tokens` at a time: what is not read yet fills shared memory.
        """
        tokens, size = sum(map(len, prompts)), self.config.hidden_size
        kind = {"dtype": getattr(torch, self.spec.dtype), "device": self.device}
        features = Features(
            torch.empty(tokens, 3 * size, **kind),
            torch.empty(tokens, size, **kind),
            torch.empty(tokens, dtype=torch.int64, device=self.device),
            torch.empty(tokens, dtype=torch.float32, device=self.device),
        )
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0.0}
        replies, first = [], 0
        for group in split_prompts(prompts, self.batch_tokens):
            numbers, rows = self.blocks.new_numbers(len(group)), {}
            for number, prompt in zip(numbers, group, strict=True):
                rows[number] = slice(first, first + len(prompt))
                first += len(prompt)
            body = {"input_ids": group, "rid": list(map(self.blocks.request_id, numbers))}
            reply = self.sender.submit(self.post, body | {"sampling_params": sampling})
            self.blocks.receive(rows, features, self.check_arriving(reply))
            replies += reply.result()
        return features, replies

    def check_arriving(self, reply: Future) -> Callable[[], None]:
        """A function that raises RunError once no hidden states can come any more."""
        answered: list[float] = []

        def check() -> None:
            self.check_alive()
            if not reply.done():
                return
            reply.result()
            answered.append(time.monotonic())
            if answered[-1] - answered[0] > SILENT_SECONDS:
                raise RunError(
                    f"SGLang answered, but no hidden states came within {SILENT_SECONDS:.0f} s: "
                    f"its forward hook does not fire, or it does not share {SHARED} with this "
                    "process; use target=hf for this model, or run both in one container"
                )

        return check

    def post(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A reply for each prompt. Raises RunError where the server refuses, or is gone."""
        try:
            response = self.client.post(ENGINE.generate_path, json=body)
        except httpx.HTTPError as error:
            until = time.monotonic() + DYING_SECONDS
            while self.server is not None and time.monotonic() < until:
                self.check_alive()  # it knows the cause
                time.sleep(0.1)
            log = log_path(httpx.URL(self.url).port)
            named = f"; its log: {log}" if log.exists() else ""
            raise RunError(
                f"the SGLang server at {self.url} does not answer any more ({error}){named}"
            ) from error
        if response.status_code != 200:
            raise RunError(
                f"SGLang refuses a request (HTTP {response.status_code}): {response.text[:500]}"
            )
        return response.json()

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        eos_token_id: list[int] | None = None,
        pad_token_id: int = 0,
        **sampling: Any,
    ) -> torch.Tensor:
        """As transformers: int64 [B,n], padded on the left -> [B,n+m], padded on the right.

        Of `sampling` it knows what shapes the distribution of a single beam.
        """
        assert sampling.get("num_beams", 1) == 1
        given = {name: value for name, value in sampling.items() if value is not None}
        chosen = {
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": eos_token_id or [],
            "temperature": given.get("temperature", 1.0) if given.get("do_sample") else 0.0,
            "top_p": given.get("top_p", 1.0),
            "top_k": given.get("top_k", 0) or -1,  # 0 means all tokens there, -1 here
            "repetition_penalty": given.get("repetition_penalty", 1.0),
        }
        pairs = zip(input_ids, attention_mask, strict=True)
        prompts = [ids[mask.bool()].tolist() for ids, mask in pairs]
        replies = self.post({"input_ids": prompts, "sampling_params": chosen})
        answers = [torch.tensor(r["output_ids"], dtype=torch.int64) for r in replies]
        padded = torch.nn.utils.rnn.pad_sequence(answers, True, pad_token_id)
        return torch.cat([input_ids, padded.to(input_ids.device)], 1)


def split_prompts(prompts: list[list[int]], most: int) -> Iterator[list[list[int]]]:
    """In order, as many at a time as have at most `most` tokens together; a longer one alone."""
    group, tokens = [], 0
    for prompt in prompts:
        if group and tokens + len(prompt) > most:
            yield group
            group, tokens = [], 0
        group.append(prompt)
        tokens += len(prompt)
    if group:
        yield group
