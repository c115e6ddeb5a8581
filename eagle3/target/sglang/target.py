"""`target=sglang`: hidden states from a stock SGLang server, through shared memory of this machine.

T packed tokens, U teacher rows, H the target's hidden size, V its vocabulary.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import httpx
import torch

from eagle3.batch import Batch, Features, fill
from eagle3.config import Within
from eagle3.engines.engine import UNSHAPED, Launch
from eagle3.engines.server import Server, choose_port, interpreter
from eagle3.engines.sglang import Capture, SGLang
from eagle3.errors import ConfigError, RunError
from eagle3.target.generation import Take
from eagle3.target.layers import engines_default, numbered_by
from eagle3.target.sglang.blocks import SHARED, Blocks
from eagle3.target.sglang.hook import HOOK
from eagle3.target.sglang.verify import verify_head, verify_layers, verify_server
from eagle3.target.spec import TargetSpec, whole_config
from eagle3.target.weights import load_weights

ENGINE = SGLang()
# In these the auxiliary states travel as keywords, which a forward hook does not see (0.5.23).
UNSEEN = ("BailingMoeV3", "Inkling", "MiMoV2", "OPT", "Whisper")
DYING_SECONDS = 5.0  # a server that hangs up is given to end, so that its log can be shown
PROBE = (5, 11)  # tokens of the first prompts


@dataclass(eq=False)
class SGLangTarget:
    """`target(batch) -> Features` like HFTarget's, from an SGLang server that this process starts
    and ends, or from one that runs here already, at `url`; in the end `url` names either.

    The model is split over `tp_size` GPUs and copied `dp_size` times, its experts are spread over
    `ep_size`. At most `batch_tokens` tokens are in flight, which bounds the shared memory. `python`
    is SGLang's interpreter, `server_args` more of its options. Raises ConfigError and RunError.
    """

    spec: TargetSpec
    device: torch.device
    _: KW_ONLY
    tp_size: Annotated[int, Within(1, 1024)] = 1
    dp_size: Annotated[int | None, Within(1, 1024)] = 1
    ep_size: Annotated[int, Within(1, 1024)] = 1
    quantization: str | None = None
    mem_fraction_static: Annotated[float | None, Within(0.01, 1)] = None
    batch_tokens: Annotated[int, Within(1)] = 16384
    python: str | None = None
    port: Annotated[int | None, Within(0, 65535)] = None
    ready_seconds: Annotated[float, Within(1)] = 1800.0
    server_args: list[str | int | float] | None = None
    url: str | None = None
    in_process: ClassVar[bool] = False

    def __post_init__(self):
        self.config, self.aux_layer_ids = self.spec.config, self.spec.aux_layer_ids
        self.server: Server | None = None
        self.blocks = Blocks()
        with ExitStack() as resources:
            resources.callback(self.blocks.close)
            self.check_space()
            if self.url is None:
                self.server = resources.enter_context(self.describe_server())
                self.url = self.server.url
            timeout = httpx.Timeout(None, connect=10)  # a long prefill is no error
            client = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)
            self.client = resources.enter_context(client)
            # Blocks are copied while the server computes the next ones.
            self.sender = ThreadPoolExecutor(1)
            resources.callback(self.sender.shutdown, wait=False, cancel_futures=True)
            self.verify()
            self.resources = resources.pop_all()  # not closed here, but by `close`

    @staticmethod
    def check_settings(section: dict[str, Any], spec: TargetSpec) -> None:
        """Raise ConfigError for what the section `target` asks for and this class cannot do."""
        last = spec.num_layers - 1
        if spec.aux_layer_ids[-1] == last:  # SGLang cannot give its output
            raise ConfigError(f"model.aux_layer_ids: choose layers below {last}, or target=hf")
        for name in whole_config(spec).architectures or []:
            if name.startswith(UNSEEN):
                raise ConfigError(f"SGLang hides the hidden states of {name}; use target=hf")
        if section.get("url") is None:
            ENGINE.find(interpreter("sglang", section.get("python")), "target.python")

    def check_alive(self, seconds: float = 0) -> None:
        """Raise RunError with the cause where our server has ended, or does within `seconds`."""
        if self.server is not None:
            self.server.check(seconds)

    def check_space(self) -> None:
        """Raise ConfigError where shared memory cannot hold what is in flight."""
        numbers = self.spec.aux_size + self.config.hidden_size
        row = numbers * getattr(torch, self.spec.dtype).itemsize
        # Each process of this machine has so many tokens in flight, and they share the memory.
        needed = self.batch_tokens * row * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / 1e9
        free = shutil.disk_usage(SHARED).free / 1e9
        if free < needed:
            room = f"{needed:.2f} GB of {SHARED}, which has {free:.2f} GB"
            problem = f"target.batch_tokens={self.batch_tokens} needs {room}"
            raise ConfigError(f"{problem}; lower it, or raise --shm-size")

    def describe_server(self) -> Server:
        """Not yet started. Raises ConfigError where options would spoil the capture."""
        port, python = choose_port(self.port, "target.port"), interpreter("sglang", self.python)
        more = self.tp_size, self.mem_fraction_static, tuple(map(str, self.server_args or ()))
        launch = Launch(self.spec, python, port, *more)
        # Not every model of SGLang takes explicit layers; all know the default ones.
        by_default = self.aux_layer_ids == engines_default(self.spec.num_layers)
        layers = None if by_default else numbered_by("sglang", self.aux_layer_ids)
        options = self.batch_tokens, self.dp_size, self.ep_size, self.quantization
        hook_config = {"root": str(SHARED), "num_layers": len(self.aux_layer_ids)}
        capture = Capture(HOOK, hook_config, layers, self.device.type, *options)
        # SGLang runs in an environment of its own: it gets our package, but none of those beside.
        packages = self.blocks.folder / "packages"
        packages.mkdir()
        (packages / "eagle3").symlink_to(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
        environment = {"PYTHONPATH": path} | ENGINE.capture_environment(self.device.type)
        command = ENGINE.capture_command(launch, capture)
        waiting = log_path(port), self.ready_seconds, ENGINE.name
        return Server(command, f"http://127.0.0.1:{port}", environment, *waiting)

    def close(self) -> None:
        """End the server, if this process started it, and free the shared memory."""
        self.resources.close()
        if self.server is not None and sys.exc_info()[0] is None:  # else the error may name it
            self.server.log.unlink(missing_ok=True)

    def verify(self) -> None:
        """Raise RunError unless the server was started for this and a first request shows it."""
        try:
            info = self.client.get("/server_info").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise RunError(f"no SGLang server answers at target.url={self.url}: {error}") from error
        verify_server(info, self.url, self.spec)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.config.vocab_size, (sum(PROBE),), generator=generator)
        # Two prompts, so that mixed up rows are seen; random tokens, so that layers differ.
        prompts = [part.tolist() for part in tokens.split(PROBE)]
        features, replies = self.prefill(prompts, max_new_tokens=1)
        ends = [PROBE[0] - 1, sum(PROBE) - 1]
        weights = load_weights(self.spec, self.device)
        self.eos_token_ids = weights.eos_token_ids
        verify_head(features, weights.head, ends, [r["output_ids"][0] for r in replies])
        verify_layers(prompts[0], features.aux_hidden_states[: PROBE[0]], self.spec)
        del weights
        torch.cuda.empty_cache()  # for ranks that train on this GPU

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        prompts = [ids.tolist() for ids in batch.input_ids.cpu().split(batch.documents.lengths)]
        features, _ = self.prefill(prompts, max_new_tokens=0)
        return features.select(slice(None), batch.teacher_rows.to(self.device))

    def prefill(self, prompts: list, max_new_tokens: int) -> tuple[Features, list[dict]]:
        """Features of the packed prompts, each token a teacher row, and the server's replies."""
        tokens, size = sum(map(len, prompts)), self.config.hidden_size
        dtype, empty = getattr(torch, self.spec.dtype), partial(torch.empty, device=self.device)
        states = [empty(tokens, width, dtype=dtype) for width in (self.spec.aux_size, size)]
        argmax, logsumexp = empty(tokens, dtype=torch.int64), empty(tokens, dtype=torch.float32)
        features = Features(*states, argmax, logsumexp)
        sampling = UNSHAPED | {"max_new_tokens": max_new_tokens, "temperature": 0.0}
        replies, first = [], 0
        # What was sent and is not read yet fills shared memory, so only so much is sent at a time.
        for group in fill(prompts, list(map(len, prompts)), self.batch_tokens):
            rows = {}
            for prompt in group:
                rows[next(self.blocks.numbers)] = range(first, first + len(prompt))
                first += len(prompt)
            body = {"input_ids": group, "rid": list(map(self.blocks.request_id, rows))}
            reply = self.sender.submit(self.post, body | {"sampling_params": sampling})
            self.blocks.receive(rows, features, reply)
            replies += reply.result()
        return features, replies

    def post(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A reply for each prompt. Raises RunError where the server refuses, or is gone."""
        try:
            response = self.client.post(ENGINE.generate_path, json=body)
        except httpx.HTTPError as error:
            self.check_alive(DYING_SECONDS)
            problem = f"the SGLang server at {self.url} does not answer any more ({error})"
            log = f"where a run started it, its log is {log_path(httpx.URL(self.url).port)}"
            raise RunError(f"{problem}; {log}") from error
        if response.status_code != 200:
            reason = response.text[:500]
            raise RunError(f"SGLang refuses a request (HTTP {response.status_code}): {reason}")
        return response.json()

    def generate(self, prompts: list, max_new_tokens: int, sampling: dict | None = None) -> list:
        """As `HFTarget.generate`."""
        chosen = UNSHAPED | {"max_new_tokens": max_new_tokens, "temperature": 0.0}
        chosen["stop_token_ids"] = sorted(self.eos_token_ids)
        if sampling is not None:
            chosen |= sampling | {"top_k": sampling["top_k"] or -1}  # ours has 0 for all tokens
        replies = self.post({"input_ids": prompts, "sampling_params": chosen})
        return list(map(ENGINE.read_ids, replies))

    def answer(
        self, take: Take, batch_size: int, max_new_tokens: int, sampling: dict | None = None,
        count: Callable[[int], Any] = int,
    ) -> Iterator[tuple[Any, list[int]]]:  # fmt: skip
        """As `HFTarget.answer`; the server batches, and draws samples of its own."""
        sampling = sampling and {name: sampling[name] for name in ("temperature", "top_p", "top_k")}
        asked: dict[Future, Any] = {}
        pool = ThreadPoolExecutor(batch_size)
        try:
            while True:
                while len(asked) < batch_size and (taken := take()) is not None:
                    key, prompt = taken
                    asked[pool.submit(self.generate, [prompt], max_new_tokens, sampling)] = key
                if not asked:
                    return
                for future in wait(asked, return_when=FIRST_COMPLETED).done:
                    (ids,) = future.result()
                    count(len(ids))
                    yield asked.pop(future), ids
        finally:  # an interruption does not wait for what the server is still asked
            pool.shutdown(wait=False)


def log_path(port: int | None) -> Path:
    """Where the log of a server at `port` lies, for every process of this user that asks it."""
    return Path(tempfile.gettempdir(), f"eagle3-sglang-{os.getuid()}-{port}.log")
