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
from functools import cached_property
from typing import Any

import httpx
import torch

from eagle3.batch import Batch, Features
from eagle3.engines.server import Server, choose_port, interpreter
from eagle3.errors import ConfigError, RunError
from eagle3.target.sglang import blocks, proof, serve
from eagle3.target.spec import TargetSpec, check_supported
from eagle3.target.weights import TargetWeights, load_weights

SILENT_SECONDS = (
    20.0  # between an answer of the server and the hidden states that should have come before it
)
DYING_SECONDS = 5.0  # a server that hangs up is given to end, so that its log can be shown
LOOK_SECONDS = 0.2
PROBE = (5, 11)  # tokens of its prompts


class SGLangTarget:
    """`target(batch) -> Features` like HFTarget's, from an SGLang server that this process starts
    and ends.

    On a machine with several of our processes, one starts the server and the others share it. `url`
    names a server that already runs here (`python -m eagle3.target.sglang.serve`). The model is
    split over `tp_size` GPUs and copied `dp_size` times (null: for as many processes as are here).
    `batch_tokens` tokens at most are in flight, which bounds the shared memory. `python` is the
    interpreter of SGLang's environment, `server_args` more of its options. The embedding and the
    head are read from the checkpoint. Raises ConfigError and RunError.
    """

    in_process = False

    def __init__(
        self,
        spec: TargetSpec,
        device: torch.device,
        tp_size: int = 1,
        dp_size: int | None = None,
        ep_size: int = 1,
        quantization: str | None = None,
        mem_fraction_static: float | None = None,
        batch_tokens: int = 16384,
        python: str | None = None,
        url: str | None = None,
        port: int | None = None,
        ready_seconds: float = 1800.0,
        server_args: list[str | int | float] | None = None,
    ):
        self.spec, self.config, self.dtype = spec, spec.config, spec.dtype
        check_supported(self.config)
        self.device, self.batch_tokens, self.aux_layer_ids = (
            device,
            batch_tokens,
            spec.aux_layer_ids,
        )
        serve.check_capturable(spec.path, spec.revision, spec.trust_remote_code, self.aux_layer_ids)
        self.blocks = blocks.Blocks()
        self.server: Server | None = None
        self.resources = ExitStack()
        self.resources.callback(self.blocks.close)
        try:
            self.check_space()
            settings = {
                "tp_size": tp_size,
                "dp_size": dp_size or copies(tp_size),
                "ep_size": ep_size,
            }
            settings |= {"quantization": quantization, "mem_fraction_static": mem_fraction_static}
            settings |= {
                "python": interpreter("sglang", python),
                "server_args": tuple(map(str, server_args or ())),
            }
            self.url = url or self.share(
                lambda: self.start(settings, port, ready_seconds), ready_seconds
            )
            self.client = self.resources.enter_context(
                httpx.Client(
                    base_url=self.url, timeout=httpx.Timeout(None, connect=10), trust_env=False
                )
            )
            self.sender = ThreadPoolExecutor(1)
            self.resources.callback(self.sender.shutdown, wait=False, cancel_futures=True)
            self.check_server()
            self.prove()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server, if this process started it, and free the shared memory.

        Its log is deleted too, unless an error is under way, which may name it.
        """
        self.resources.__exit__(*sys.exc_info())

    def check_space(self) -> None:
        """Raise ConfigError where shared memory cannot hold what is in flight."""
        row = 4 * self.config.hidden_size * getattr(torch, self.dtype).itemsize
        needed = self.batch_tokens * row * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = shutil.disk_usage(self.blocks.folder).free
        if free < needed:
            raise ConfigError(
                f"target.batch_tokens={self.batch_tokens} needs {needed / 1e9:.2f} GB of shared memory, but "
                f"{blocks.SHARED} has {free / 1e9:.2f} GB free; lower it, or start the container with more, such as "
                "--shm-size=16g"
            )

    def start(self, settings: dict[str, Any], port: int | None, ready_seconds: float) -> str:
        """Start the server and wait until it is ready; returns its address."""
        port = choose_port(port, "target.port")
        line = serve.command(
            self.spec.path,
            port,
            self.aux_layer_ids,
            self.config.num_hidden_layers,
            self.device,
            self.dtype,
            self.spec.revision,
            self.spec.trust_remote_code,
            batch_tokens=self.batch_tokens,
            **settings,
        )
        self.server = serve.server(line, port, self.blocks, self.device, ready_seconds)
        self.resources.enter_context(self.server)
        self.resources.push(self.forget_log)
        return self.server.url

    def forget_log(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if kind is None:
            self.server.log.unlink(missing_ok=True)

    def share(self, start: Callable[[], str], ready_seconds: float) -> str:
        """The address of the one server of this launcher's processes here: the first of them starts
        it.

        It is the last that needs it: on the first machine it runs the stages that the others have
        no part in.
        """
        name = f"serves-{os.getppid()}"
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            url = start()
            (self.blocks.folder / f".{name}").write_text(url)
            (self.blocks.folder / f".{name}").rename(self.blocks.folder / name)
            return url
        until = time.monotonic() + ready_seconds
        while time.monotonic() < until:
            for told in blocks.SHARED.glob(f"{blocks.PREFIX}*/{name}"):
                if told.stat().st_uid == os.getuid():
                    return told.read_text()
            time.sleep(LOOK_SECONDS)
        raise RunError(
            f"the first process here started no SGLang server within target.ready_seconds={ready_seconds}"
        )

    def check_server(self) -> None:
        """Raise RunError where the server was not started for this."""
        try:
            info = self.client.get("/server_info").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise RunError(
                f"target.url={self.url} is no SGLang server that answers: {error}"
            ) from error
        proof.check_server(
            info, self.url, self.spec.path, self.aux_layer_ids, self.config.num_hidden_layers
        )

    def prove(self) -> None:
        """Raise RunError unless a first request shows that the hidden states come and are the right
        ones.
        """
        tokens = torch.randint(
            self.config.vocab_size, (sum(PROBE),), generator=torch.Generator().manual_seed(0)
        )
        prompts = [part.tolist() for part in tokens.split(PROBE)]
        features = self.empty(sum(PROBE))
        answers = list(self.fill(features, prompts, max_new_tokens=1))
        ends = [sum(PROBE[: i + 1]) - 1 for i in range(len(PROBE))]
        proof.check_head(features, self.head, ends, [answer["output_ids"][0] for answer in answers])
        aux = features.aux_hidden_states[: PROBE[0]]
        proof.check_layers(
            prompts[0],
            aux,
            self.aux_layer_ids,
            self.spec.path,
            self.spec.revision,
            self.dtype,
            self.spec.trust_remote_code,
        )

    @cached_property
    def weights(self) -> TargetWeights:
        return load_weights(self.spec, self.device)

    @staticmethod
    def check_settings(target: dict[str, Any], spec: TargetSpec) -> None:
        """What can be told of the section `target` before anything starts. Raises
        ConfigError.
        """
        serve.check_capturable(spec.path, spec.revision, spec.trust_remote_code, spec.aux_layer_ids)
        if target.get("url") is None:
            serve.find_sglang(interpreter("sglang", target.get("python")))

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
        features = self.empty(len(batch.input_ids))
        list(self.fill(features, prompts, max_new_tokens=0))
        rows = batch.teacher_rows.to(self.device)
        last, argmax, logsumexp = features.last_hidden_states, features.argmax, features.logsumexp
        return Features(features.aux_hidden_states, last[rows], argmax[rows], logsumexp[rows])

    def empty(self, tokens: int) -> Features:
        """Features of so many tokens, each of them a teacher row, still to be filled."""
        size, dtype = self.config.hidden_size, getattr(torch, self.dtype)
        return Features(
            torch.empty(tokens, 3 * size, dtype=dtype, device=self.device),
            torch.empty(tokens, size, dtype=dtype, device=self.device),
            torch.empty(tokens, dtype=torch.int64, device=self.device),
            torch.empty(tokens, dtype=torch.float32, device=self.device),
        )

    def fill(
        self, features: Features, prompts: list[list[int]], max_new_tokens: int
    ) -> Iterator[dict[str, Any]]:
        """Have the prompts, packed in `features`, computed `batch_tokens` at a time; yields the
        server's answers.
        """
        first = 0
        while prompts:
            count, tokens = 1, len(prompts[0])
            while count < len(prompts) and tokens + len(prompts[count]) <= self.batch_tokens:
                tokens += len(prompts[count])
                count += 1
            numbers = self.blocks.number(count)
            rows = {}
            for number, prompt in zip(numbers, prompts, strict=False):
                rows[number] = slice(first, first + len(prompt))
                first += len(prompt)
            body = {
                "input_ids": prompts[:count],
                "rid": [self.blocks.rid(number) for number in numbers],
            }
            body["sampling_params"] = {"max_new_tokens": max_new_tokens, "temperature": 0.0}
            asked = self.sender.submit(self.ask, body)
            self.blocks.collect(rows, features, self.watch(asked))
            yield from asked.result()
            prompts = prompts[count:]

    def watch(self, asked: Future):
        """What is looked at while hidden states are awaited: the request, the server, the time."""
        answered: list[float] = []

        def check() -> None:
            if self.server is not None:
                self.server.check()
            if not asked.done():
                return
            asked.result()
            answered.append(time.monotonic())
            if answered[-1] - answered[0] > SILENT_SECONDS:
                raise RunError(
                    f"SGLang answered, but no hidden states came within {SILENT_SECONDS:.0f} s: its forward hook does "
                    f"not fire, or it does not share {blocks.SHARED} with this process; use target=hf for this model, "
                    "or run both in one container"
                )

        return check

    def ask(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Raises RunError where the server refuses or is gone."""
        try:
            response = self.client.post("/generate", json=body)
        except httpx.HTTPError as error:
            until = time.monotonic() + DYING_SECONDS
            while self.server is not None and time.monotonic() < until:
                self.server.check()
                time.sleep(0.1)
            raise RunError(
                f"the SGLang server at {self.url} does not answer any more ({error})"
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
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        num_beams: int = 1,
        repetition_penalty: float = 1.0,
    ) -> torch.Tensor:
        """As transformers' `generate`: int64 [B,n], padded on the left -> [B,n+m], padded on the
        right.
        """
        assert num_beams == 1
        sampling = {"max_new_tokens": max_new_tokens, "stop_token_ids": eos_token_id or []}
        sampling |= {"repetition_penalty": repetition_penalty, "temperature": 0.0}
        if do_sample:
            chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k or None}
            sampling |= {"temperature": 1.0} | {
                name: value for name, value in chosen.items() if value is not None
            }
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        answers = [
            a["output_ids"] for a in self.ask({"input_ids": prompts, "sampling_params": sampling})
        ]
        width = max(map(len, answers))
        padded = torch.tensor(
            [a + [pad_token_id] * (width - len(a)) for a in answers], device=input_ids.device
        )
        return torch.cat([input_ids, padded.long()], 1)


def copies(tp_size: int) -> int:
    """How many copies of the model serve the processes of this machine, where each has a GPU."""
    return max(
        1, min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))) // tp_size
    )
