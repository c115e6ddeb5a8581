"""Start stock SGLang so that it leaves hidden states; also python -m eagle3.target.sglang.serve."""

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from eagle3.config import Model, Within
from eagle3.engines.engine import Launch
from eagle3.engines.server import Server, choose_port, interpreter
from eagle3.engines.sglang import Capture, SGLang
from eagle3.errors import ConfigError, RunError
from eagle3.target.layers import engines_default, numbered_by
from eagle3.target.sglang.blocks import SHARED, Blocks
from eagle3.target.spec import TargetSpec, read_spec, whole_config

ENGINE = SGLang()
HOOK = "eagle3.target.sglang.hook:factory"
# In these the auxiliary states travel as keywords, which a forward hook does not see (0.5.23).
UNSEEN = ("BailingMoeV3", "Inkling", "MiMoV2", "OPT", "Whisper")


@dataclass(kw_only=True)
class ServerOptions:
    """How a server is started: the keys of conf/target/sglang.yaml but `url`.

    The model is split over `tp_size` GPUs and copied `dp_size` times (None: once), its experts are
    spread over `ep_size`. At most `batch_tokens` tokens are in flight, which bounds the shared
    memory. `python` is the interpreter of SGLang's environment, `server_args` more of its options.
    """

    tp_size: Annotated[int, Within(1, 1024)] = 1
    dp_size: Annotated[int | None, Within(1, 1024)] = None
    ep_size: Annotated[int, Within(1, 1024)] = 1
    quantization: str | None = None
    mem_fraction_static: Annotated[float | None, Within(0.01, 1)] = None
    batch_tokens: Annotated[int, Within(1)] = 16384
    python: str | None = None
    port: Annotated[int | None, Within(0, 65535)] = None
    ready_seconds: Annotated[float, Within(1)] = 1800.0
    server_args: list[str | int | float] | None = None


def check_capturable(spec: TargetSpec) -> None:
    """Raise ConfigError for a model, or layers of it, that the hook would not see."""
    last = spec.config.num_hidden_layers - 1
    if spec.aux_layer_ids[-1] == last:
        raise ConfigError(
            f"model.aux_layer_ids={spec.aux_layer_ids}: SGLang cannot give the output of the last "
            f"layer; choose layers below {last}, or target=hf"
        )
    for name in whole_config(spec).architectures or []:
        if name.startswith(UNSEEN):
            raise ConfigError(
                f"target=sglang: SGLang hides the hidden states of {name} from hooks; use target=hf"
            )


def capture_server(
    spec: TargetSpec, device: torch.device, folder: Path, options: ServerOptions
) -> Server:
    """A server of the target, not yet started, that finds our package in `folder`.

    Raises ConfigError where the options would spoil the capture, RunError where the port is taken.
    """
    port, python = choose_port(options.port, "target.port"), interpreter("sglang", options.python)
    more = tuple(map(str, options.server_args or ()))
    launch = Launch(spec, python, port, options.tp_size, options.mem_fraction_static, more)
    # Not every model of SGLang takes explicit layers; all know the default ones.
    by_default = spec.aux_layer_ids == engines_default(spec.config.num_hidden_layers)
    capture = Capture(
        hook_factory=HOOK,
        hook_config={"root": str(SHARED)},
        layer_ids=None if by_default else numbered_by("sglang", spec.aux_layer_ids),
        device=device.type,
        batch_tokens=options.batch_tokens,
        dp_size=options.dp_size or 1,
        ep_size=options.ep_size,
        quantization=options.quantization,
    )
    # SGLang runs in an environment of its own: it gets our package, but none of those beside it.
    packages = folder / "packages"
    packages.mkdir()
    (packages / "eagle3").symlink_to(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH"))))
    return Server(
        ENGINE.capture_command(launch, capture),
        f"http://127.0.0.1:{port}",
        {"PYTHONPATH": path} | ENGINE.capture_environment(device.type),
        log_path(port),
        options.ready_seconds,
        ENGINE.health_path,
        ENGINE.name,
    )


def log_path(port: int | None) -> Path:
    """Where the log of a server at `port` lies, for every process of this user that asks it."""
    return Path(tempfile.gettempdir(), f"eagle3-sglang-{os.getuid()}-{port}.log")


def main() -> None:
    """Serve a target to the runs of this machine, which name it by `target.url`, until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, epilog="Anything else goes to SGLang as it is."
    )
    parser.add_argument("path", help="folder or hub id of the target")
    parser.add_argument("--aux-layer-ids", type=int, nargs=3, help="as model.aux_layer_ids")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--ready-seconds", type=float, default=1800)
    parser.add_argument("--python", help="interpreter of SGLang's environment")
    given, server_args = parser.parse_known_args()
    # Without this SIGTERM would end us before the server is ended in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ENGINE.find(interpreter("sglang", given.python), "--python")
    where = {"path": given.path, "revision": None, "trust_remote_code": False}
    unusual = {"embedding_key": None, "lm_head_key": None}  # a server needs neither
    spec = read_spec(
        Model(dtype=given.dtype, aux_layer_ids=given.aux_layer_ids, **where, **unusual)
    )
    check_capturable(spec)
    options = ServerOptions(
        port=given.port,
        python=given.python,
        ready_seconds=given.ready_seconds,
        server_args=server_args,
    )
    blocks = Blocks()  # its folder goes when this process does
    with capture_server(spec, torch.device(given.device), blocks.folder, options) as server:
        address = f"python run.py target=sglang target.url={server.url}"
        print(f"ready: {address} ... (log: {server.log})", flush=True)
        while True:
            server.check()
            time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
