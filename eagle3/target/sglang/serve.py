"""`python -m eagle3.target.sglang.serve`: a server that several runs of this machine use."""

import argparse
import signal
import sys

import torch

from eagle3.config import Model
from eagle3.errors import ConfigError, RunError
from eagle3.target.sglang.target import SGLangTarget
from eagle3.target.spec import read_spec


def main() -> None:
    """Serve a target to the runs of this machine, which name it by `target.url`, until Ctrl-C."""
    parser = argparse.ArgumentParser(description=main.__doc__, epilog="The rest goes to SGLang.")
    parser.add_argument("path", help="folder or hub id of the target")
    parser.add_argument("--aux-layer-ids", type=int, nargs="+", help="as model.aux_layer_ids")
    parser.add_argument("--embedding-key", help="as model.embedding_key")
    parser.add_argument("--lm-head-key", help="as model.lm_head_key")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--python", help="interpreter of SGLang's environment")
    given, server_args = parser.parse_known_args()
    # Without this SIGTERM would end us before the server is ended in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = ("path", "dtype", "aux_layer_ids", "embedding_key", "lm_head_key")
    model = {name: getattr(given, name) for name in names}
    spec = read_spec(Model(revision=None, trust_remote_code=False, **model))
    section = {"python": given.python, "port": given.port, "server_args": server_args}
    SGLangTarget.check_settings(section, spec)
    target = SGLangTarget(spec, torch.device(given.device), **section)
    address = f"python run.py target=sglang target.url={target.url}"
    print(f"ready: {address} ... (log: {target.server.log})", flush=True)
    try:
        while True:
            target.server.check(seconds=60)
    finally:
        target.close()


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
