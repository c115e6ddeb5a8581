"""From chat data to a measured EAGLE3 draft: `python run.py model=... data=...` (see --help)."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from eagle3.hydra_errors import one_sentence
from eagle3.runs.resume import command_to_resume, load_config

CONF = Path(__file__).parent / "conf"
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, and `one_sentence` says what is shown


@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def job(composed: DictConfig) -> float | None:
    """One job of a run or sweep; returns its acceptance length, for a sweeper to maximise."""
    settings = HydraConfig.get()
    run_dir, overrides = Path(settings.runtime.output_dir), list(settings.overrides.task)
    try:
        with one_sentence(CONF, SHOW_TRACEBACK):  # here, or hydra would add a line of its own
            config = load_config(composed, run_dir, overrides)
            # torch and transformers take seconds to load, which a typo need not wait for
            from eagle3.checks import check
            from eagle3.parallel.launch import read_torchrun
            from eagle3.parallel.ranks import set_up_process
            from eagle3.pipeline import run_pipeline

            read_torchrun(config)
            check(config)
            set_up_process(config)
            return run_pipeline(config, run_dir, overrides)
    except KeyboardInterrupt:
        command = command_to_resume(run_dir, overrides)
        print(f"interrupted; go on with: {command}", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """Run the command line; under torchrun the first process alone reads it."""
    with one_sentence(CONF, SHOW_TRACEBACK):
        if int(os.environ.get("RANK", 0)) > 0:
            from eagle3.parallel.launch import serve_tasks

            return serve_tasks()
        try:
            job()
        except SystemExit as ended:  # so hydra leaves where it only shows something
            if ended.code:
                raise
        if "RANK" in os.environ:
            from eagle3.parallel.launch import end_tasks

            end_tasks()


if __name__ == "__main__":
    main()
