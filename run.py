"""From chat data to a measured EAGLE3 draft: `python run.py model=... data=... mode=...` (see
--help).
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from eagle3 import config as configuration
from eagle3.errors import ConfigError, RunError
from eagle3.mistakes import explain

MISTAKES = (ConfigError, RunError, HydraException, OmegaConfBaseException, OSError)
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, and `stop` decides what is shown


def stop(error: Exception) -> None:
    """End with one sentence and its exit code, or with the traceback where that was asked for."""
    if SHOW_TRACEBACK:
        raise error
    message, exit_code = explain(error, Path(__file__).parent / "conf")
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def job(composed: DictConfig) -> float | None:
    """One job of a run or sweep; returns its acceptance length, so that a sweeper can maximise it."""
    hydra_config = HydraConfig.get()
    run_dir, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    try:
        config = configuration.typed(composed, run_dir, overrides)
        from eagle3.checks import (
            check,  # torch and transformers load here, after the config has been understood
        )
        from eagle3.parallel.ranks import launch, note_processes

        note_processes(config)
        check(config)
        return launch(config, run_dir, overrides)
    except MISTAKES as error:
        stop(error)
    except KeyboardInterrupt:
        print(
            f"interrupted; go on with: {configuration.again(run_dir, overrides)}", file=sys.stderr
        )
        sys.exit(130)


@contextlib.contextmanager
def suppress_success() -> Iterator[None]:
    """Hydra leaves through `sys.exit` where it only shows something, and the other processes must
    hear of it.
    """
    try:
        yield
    except SystemExit as ended:
        if ended.code:
            raise


def main() -> None:
    """Run the command line; under torchrun the first process alone reads it."""
    try:
        if int(os.environ.get("RANK", 0)) > 0:
            from eagle3.parallel.ranks import attend

            attend()
        else:
            with suppress_success():
                job()
            if "RANK" in os.environ:
                from eagle3.parallel.ranks import dismiss

                dismiss()
    except MISTAKES as error:
        stop(error)


if __name__ == "__main__":
    main()
