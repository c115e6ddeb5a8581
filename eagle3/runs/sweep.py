"""What the jobs of a sweep share: which are finished, which failed and why, what Optuna is told."""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from eagle3.config import Sweep
from eagle3.errors import ConfigError, first_line
from eagle3.hydra_errors import explain, is_explained
from eagle3.runs.disk import read_json, write_atomically
from eagle3.runs.logger import redact
from eagle3.runs.resume import SWEEP

FAILURE = "error.json"  # of a job that failed, in its folder, until the sweep ends
STUDY = "study.log"  # Optuna's journal, in the folder of the sweep
FOLDERS: list[Path] = []  # of the sweep that this process runs


class NoteFolder(Callback):
    """Hydra's callback: says where a sweep's jobs lie, wherever they will run."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with suppress(OmegaConfBaseException):  # hydra meets it too, and may raise
            FOLDERS.append(Path(config.hydra.sweep.dir))


def own(overrides: list[str]) -> list[str]:
    """The overrides of a job without those of its sweep, which a job repeated alone isn't."""
    return [each for each in overrides if not each.startswith(("sweep=", "sweep."))]


def how_to_go_on() -> str:
    """Behind what ended this process's sweep the command for its jobs that are not finished; ""
    where it left no folder, or there is no sweep.
    """
    if not FOLDERS or not FOLDERS[-1].exists():
        return ""
    left_out = ("sweep.resume=", "hydra.sweep.dir=")
    given = [each for each in sys.argv[1:] if not each.startswith(left_out)]
    command = ["python", "run.py", *redact(given), f"sweep.resume={FOLDERS[-1]}"]
    return f"; go on with: {shlex.join(command)}"


def is_finished(run_dir: Path, overrides: list[str]) -> bool:
    """Whether the job of a resumed sweep ran to its end. ConfigError where it was another job."""
    recorded = read_json(run_dir / "run.json")
    before = recorded.get("overrides", overrides)
    if sorted(redact(own(before))) != sorted(redact(overrides)):
        was, now = (" ".join(each) for each in (before, redact(overrides)))
        remedy = "give the command line of that sweep, or begin another"
        raise ConfigError(f"sweep.resume: {run_dir} was made by {was}, not by {now}; {remedy}")
    return recorded.get("finished", False)


@contextmanager
def note_failure(run_dir: Path, number: int, overrides: list[str]) -> Iterator[None]:
    """What ends a job of a sweep is shown, and kept in its folder for the sweep's end; a signal
    ends all jobs.
    """
    path = run_dir / FAILURE
    path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if is_explained(error):
            sentence = redact(explain(error)[0])
            print(f"error: {sentence}", file=sys.stderr)
        else:
            traceback.print_exc()
            sentence = f"{type(error).__name__}: {first_line(error)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        failure = {"job": number, "overrides": redact(overrides), "sentence": sentence}
        write_atomically(path, [json.dumps(failure).encode()])


def collect_failures(folder: Path) -> list[str]:
    """A line for each job that failed, in their order; folders in which no run began go."""
    given = yaml.safe_load((folder / SWEEP).read_text())["hydra"]["overrides"]["task"]
    given = [each.replace("\\", "") for each in given]
    failures = []
    for path in list(folder.rglob(FAILURE)):
        failure = read_json(path)
        # Without escapes, as a sweeper writes what is given in its own way.
        swept = [each for each in failure["overrides"] if each.replace("\\", "") not in given]
        failures.append((failure["job"], " ".join(swept), failure["sentence"]))
        path.unlink()
        with suppress(OSError):
            os.removedirs(path.parent)
    return [f"job {number} ({swept}): {sentence}" for number, swept, sentence in sorted(failures)]


def open_study(path: Path, seed: int = 0, n_startup_trials: int = 0) -> Any:
    """Optuna's study in a file, made where there is none. Processes may open it together."""
    import optuna  # only runs of its sweeper have it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=n_startup_trials),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
    )
    if n_startup_trials:
        study.set_user_attr("n_startup_trials", n_startup_trials)
    startup = study.user_attrs["n_startup_trials"]
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=startup)
    return study


def is_pruned(section: Sweep, run_dir: Path, update: int, acceptance: float) -> bool:
    """Report what a trial of Optuna has reached; whether it ends here, below the others' median."""
    studies = [path / STUDY for path in run_dir.parents if (path / STUDY).exists()]
    if section.trial is None or not studies:
        return False
    import optuna

    study = open_study(studies[0])
    state = study.trials[section.trial].state
    if state.is_finished():  # someone goes on with it by hand
        return False
    # The journal holds one study, so that a trial's id is its number.
    trial = optuna.trial.Trial(study, section.trial)
    trial.report(acceptance, update)
    if trial.should_prune():
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        print(
            f"train: pruned after update {update}: {acceptance:.2f} is below other trials' median"
        )
        return True
    return False
