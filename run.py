"""From chat data to a measured EAGLE3 draft: `python run.py model=... data=...` (see --help)."""

import signal

if __name__ == "__main__":  # Ctrl-C while the imports last shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
import sys
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from eagle3.errors import ConfigError, RunError
from eagle3.hydra_errors import one_sentence
from eagle3.runs import resume, sweep
from eagle3.runs.signals import exit_when_interrupted, interrupt_on_signals

SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, and `one_sentence` says what is shown
for library in ("HUB", "DATASETS"):  # eagle3/runs/progress.py is what shows progress
    os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")


@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def job(composed: DictConfig) -> float | None:
    """One job of a run or sweep; returns its acceptance length, for a sweeper to maximise."""
    settings = HydraConfig.get()
    run_dir, overrides = Path(settings.runtime.output_dir), sweep.own(settings.overrides.task)
    swept = settings.mode == RunMode.MULTIRUN
    failures = one_sentence(SHOW_TRACEBACK)
    if swept:
        # A launcher of other processes would end the sweep if it were told of an error.
        failures = sweep.note_failure(run_dir, settings.job.num, overrides)
    command = partial(resume.command_to_resume, run_dir, overrides)
    with (
        exit_when_interrupted(lambda kept: f"; {kept}; go on with: {command()}"),
        failures,
        resume.claim(run_dir),
    ):
        resume.redact_sweep(settings)
        if composed.sweep.resume is not None and not swept:
            raise ConfigError("sweep.resume goes on with a sweep: add -m, or its sweep=<name>")
        if composed.sweep.resume is not None and sweep.is_finished(run_dir, overrides):
            from eagle3.runs.tracking import read_acceptance

            print(f"{run_dir} is finished")
            return read_acceptance(run_dir)
        config = resume.load_config(composed, run_dir, overrides)
        # torch and transformers take seconds to load, which a typo need not wait for
        from eagle3.checks import check
        from eagle3.parallel.launch import read_torchrun
        from eagle3.parallel.ranks import set_up_process
        from eagle3.pipeline import run_pipeline

        read_torchrun(config)
        check(config)
        set_up_process(config)
        begin = partial(resume.write_hydra_folder, composed, settings, run_dir)
        return run_pipeline(config, run_dir, overrides, begin)
    return math.nan  # which a sweeper that maximises takes for a failure


def main() -> None:
    """Run the command line; under torchrun the first process alone reads it."""
    with one_sentence(SHOW_TRACEBACK):
        if int(os.environ.get("RANK", 0)) > 0:
            from eagle3.parallel.launch import serve_tasks

            return serve_tasks()
        interrupt_on_signals()
        failed = []
        try:
            before = exit_when_interrupted(
                lambda kept: "" if sweep.FOLDERS else " before the run began"
            )
            with resume.remove_unused(sys.argv), before:
                job()
                for folder in sweep.FOLDERS:
                    from eagle3.benchmark.compare import compare_sweep

                    failed = sweep.collect_failures(folder)
                    compare_sweep(folder)
        except BaseException as ended:
            # Without a code hydra leaves where it only shows something.
            if not isinstance(ended, SystemExit) or ended.code:
                if how := sweep.how_to_go_on():
                    print(f"the sweep has stopped{how}", file=sys.stderr)
                raise
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from eagle3.parallel.launch import end_tasks

            end_tasks()
        if failed:
            print(*failed, sep="\n", file=sys.stderr)
            counted = f"{len(failed)} job{'s' * (len(failed) > 1)} of the sweep failed"
            raise RunError(f"{counted}{sweep.how_to_go_on()}")


if __name__ == "__main__":
    main()
