"""How stock SGLang is started so that it leaves hidden states; `python -m
eagle3.target.sglang.serve` does it too.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from eagle3.config import Model
from eagle3.engines.server import Server, choose_port, find_package, interpreter
from eagle3.errors import ConfigError, RunError
from eagle3.target.layers import engines_default, numbered_by
from eagle3.target.sglang.blocks import SHARED, Blocks
from eagle3.target.spec import read_spec

VERSIONS = ">=0.5.23,<0.6"
HOOK = "eagle3.target.sglang.hook:factory"
# In these the auxiliary states travel as keywords, which a forward hook does not see (0.5.23).
UNSEEN = ("BailingMoeV3", "Inkling", "MiMoV2", "OPT", "Whisper")
CONFLICTS = (
    "--enable-dp-attention",
    "--enable-mixed-chunk",
    "--pp-size",
    "--pipeline-parallel-size",
)


def check_capturable(
    path: str, revision: str | None, trust_remote_code: bool, aux_layer_ids: list[int]
) -> None:
    """Raise ConfigError for a model, or layers of it, whose hidden states the hook would not see."""
    config = AutoConfig.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code
    )
    layers = config.get_text_config().num_hidden_layers
    if aux_layer_ids[-1] == layers - 1:
        raise ConfigError(
            f"model.aux_layer_ids={aux_layer_ids}: SGLang takes states from the input of the next layer, and behind "
            f"layer {layers - 1} is none; choose layers below it, or target=hf"
        )
    for name in config.architectures or []:
        if name.startswith(UNSEEN):
            raise ConfigError(
                f"target=sglang: SGLang hides the hidden states of {name} from hooks; use target=hf"
            )


def command(
    path: str,
    port: int,
    aux_layer_ids: list[int],
    num_layers: int,
    device: torch.device,
    dtype: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tp_size: int = 1,
    dp_size: int = 1,
    ep_size: int = 1,
    quantization: str | None = None,
    mem_fraction_static: float | None = None,
    batch_tokens: int = 16384,
    python: str = sys.executable,
    server_args: tuple[str, ...] = (),
) -> list[str]:
    """The command line of the server. Raises ConfigError where `server_args` would spoil the
    capture.
    """
    for argument in server_args:
        if argument.split("=")[0] in CONFLICTS:
            raise ConfigError(
                f"target.server_args: {argument} does not go with capturing hidden states; leave it out"
            )
    hook = {"name": "eagle3", "target_modules": ["*logits_processor"], "hook_factory": HOOK}
    options = {
        "--model-path": path,
        "--revision": revision,
        "--dtype": dtype,
        "--device": device.type,
        "--host": "127.0.0.1",
        "--port": port,
        "--tp-size": tp_size,
        "--dp-size": dp_size,
        "--ep-size": ep_size,
        "--quantization": quantization,
        "--mem-fraction-static": mem_fraction_static,
        "--max-prefill-tokens": batch_tokens,
        "--chunked-prefill-size": -1,
        "--speculative-algorithm": "EAGLE3",  # names how layers are numbered; no draft is loaded
        "--return-hidden-states-mode": "last",
        "--forward-hooks": json.dumps([hook | {"config": {"root": str(SHARED)}}]),
    }
    flags = ["--enable-return-aux-hidden-states", "--disable-radix-cache", "--skip-tokenizer-init"]
    flags += ["--disable-prefill-cuda-graph", "--disable-decode-cuda-graph"]
    if device.type == "cpu":
        options["--attention-backend"] = "torch_native"
    if trust_remote_code:
        flags.append("--trust-remote-code")
    if aux_layer_ids != engines_default(num_layers):
        flags += [
            "--return-aux-hidden-state-layer-ids",
            *map(str, numbered_by("sglang", aux_layer_ids)),
        ]
    named = [
        str(word) for name, value in options.items() if value is not None for word in (name, value)
    ]
    return [python, "-m", "sglang.launch_server", *named, *flags, *server_args]


def environment(folder: Path, device: torch.device) -> dict[str, str]:
    """What the server needs besides: our package, but no other package of this environment, and the
    device.
    """
    packages = folder / "packages"
    packages.mkdir(exist_ok=True)
    (packages / "eagle3").symlink_to(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path} | ({"SGLANG_USE_CPU_ENGINE": "1"} if device.type == "cpu" else {})


def find_sglang(python: str) -> None:
    """Raise ConfigError where this interpreter has no SGLang that we know."""
    find_package(python, ("sglang",), VERSIONS, "target.python")


def server(
    command: list[str], port: int, blocks: Blocks, device: torch.device, ready_seconds: float
) -> Server:
    """Not yet started."""
    log = Path(tempfile.gettempdir(), f"eagle3-sglang-{os.getpid()}-{port}.log")
    url = f"http://127.0.0.1:{port}"
    return Server(
        command, url, environment(blocks.folder, device), log, ready_seconds, "/health", "SGLang"
    )


def main() -> None:
    """Serve a target to the runs of this machine, which name it by `target.url`, until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, epilog="Anything else goes to SGLang as it is."
    )
    parser.add_argument("path", help="folder or hub id of the target")
    parser.add_argument(
        "--aux-layer-ids", type=int, nargs=3, help="as model.aux_layer_ids; default: derived"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--ready-seconds", type=float, default=1800)
    parser.add_argument(
        "--python", default=interpreter("sglang", None), help="interpreter of SGLang's environment"
    )
    given, rest = parser.parse_known_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # else what is under way would not be ended in order
    find_sglang(given.python)
    model = Model(
        path=given.path,
        revision=None,
        dtype=given.dtype,
        trust_remote_code=False,
        aux_layer_ids=given.aux_layer_ids,
        embedding_key=None,
        lm_head_key=None,
    )
    spec = read_spec(model)
    config, layers, device = spec.config, spec.aux_layer_ids, torch.device(given.device)
    check_capturable(given.path, None, False, layers)
    port = choose_port(given.port, "--port")
    line = command(
        given.path,
        port,
        layers,
        config.num_hidden_layers,
        device,
        spec.dtype,
        python=given.python,
        server_args=tuple(rest),
    )
    blocks = Blocks()
    with server(line, port, blocks, device, given.ready_seconds) as running:
        print(
            f"ready: python run.py target=sglang target.url={running.url} ... (log: {running.log})",
            flush=True,
        )
        while True:
            running.check()
            time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
