"""From chat data to a measured EAGLE3 draft: `python run.py model=... data=...` (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the imports last shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from eagle3.errors import RunError
from eagle3.hydra_errors import one_sentence
from eagle3.runs.logger import redact
from eagle3.runs.resume import claim, command_to_resume, is_run, load_config, write_shown

CONF = Path(__file__).parent / "conf"
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, and `one_sentence` says what is shown
MAIN, FAILED = os.getpid(), []  # the jobs of a sweep that failed in this process


@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def job(composed: DictConfig) -> float | None:
    """One job of a run or sweep; returns its acceptance length, for a sweeper to maximise."""
    settings = HydraConfig.get()
    run_dir, overrides = Path(settings.runtime.output_dir), list(settings.overrides.task)
    try:
        with one_sentence(CONF, SHOW_TRACEBACK), claim(run_dir):
            write_hydra_folder(composed, settings, run_dir)
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
    except KeyboardInterrupt as stopped:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end_at_once)
        command = command_to_resume(run_dir, overrides)
        print(f"interrupted; go on with: {command}", file=sys.stderr)
        sys.exit(128 + (*stopped.args, signal.SIGINT)[0])
    except (SystemExit, Exception) as error:
        code = getattr(error, "code", 1)
        # Elsewhere than in this process a launcher hands on what was raised.
        if settings.mode != RunMode.MULTIRUN or os.getpid() != MAIN or code > 128:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        FAILED.append(f"{settings.job.num} ({' '.join(redact(overrides))})")
        return math.nan  # which a sweeper that maximises takes for a failure


def write_hydra_folder(composed: DictConfig, settings: DictConfig, run_dir: Path) -> None:
    """`.hydra` as hydra would write it, but for logins; also a sweep's multirun.yaml again."""
    folder = run_dir / (".hydra/resumed" if is_run(run_dir) else ".hydra")
    files = {"config": composed, "hydra": {"hydra": settings}}
    for name, shown in (files | {"overrides": settings.overrides.task}).items():
        write_shown(folder / f"{name}.yaml", OmegaConf.to_yaml(shown))
    if settings.mode == RunMode.MULTIRUN:
        for sweep in Path(settings.sweep.dir).glob("multirun.yaml"):  # not every sweeper's
            write_shown(sweep, sweep.read_text())


def interrupt(number: int, frame) -> None:
    if os.getpid() != MAIN:  # a worker that this process has forked
        end_at_once(number, frame)
    raise KeyboardInterrupt(number)


def end_at_once(number: int, frame) -> None:
    os._exit(128 + number)


def main() -> None:
    """Run the command line; under torchrun the first process alone reads it."""
    with one_sentence(CONF, SHOW_TRACEBACK):
        if int(os.environ.get("RANK", 0)) > 0:
            from eagle3.parallel.launch import serve_tasks

            return serve_tasks()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        try:
            job()
        except SystemExit as ended:  # so hydra leaves where it only shows something
            if ended.code:
                raise
        except KeyboardInterrupt as stopped:
            print("interrupted before the run began", file=sys.stderr)
            sys.exit(128 + (*stopped.args, signal.SIGINT)[0])
        if "RANK" in os.environ:
            from eagle3.parallel.launch import end_tasks

            end_tasks()
        if FAILED:
            raise RunError(f"jobs of the sweep that failed: {'; '.join(FAILED)}; all others ran")


if __name__ == "__main__":
    main()
