"""hydra/sweeper=optuna_pruning; hydra loads plugins from a package of this name only."""

import importlib.util
import math
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from eagle3.errors import ConfigError
from eagle3.runs.resume import SWEEP
from eagle3.runs.sweep import STUDY, open_study


class OptunaSweeper(Sweeper):
    """Asks an Optuna study for the values of each job and tells it the acceptance length.

    A trial has the number of its job. Trials that were running when a sweep was stopped keep their
    values and folders when it is resumed; those that failed are made up for by new ones.
    """

    def __init__(
        self, n_trials: int, n_jobs: int, n_startup_trials: int, seed: int, params: DictConfig
    ):
        self.n_trials, self.n_jobs, self.params = n_trials, n_jobs, dict(params or {})
        self.n_startup_trials, self.seed = n_startup_trials, seed

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        if importlib.util.find_spec("optuna") is None:
            missing = "hydra/sweeper=optuna_pruning needs a package that is missing: optuna"
            raise ConfigError(f"{missing}; pip install -e '.[sweep]'")
        self.config = config
        self.parser = OverridesParser.create(config_loader=hydra_context.config_loader)
        self.launcher = Plugins.instance().instantiate_launcher(
            config=config, hydra_context=hydra_context, task_function=task_function
        )

    def sweep(self, arguments: list[str]) -> None:
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / SWEEP)
        given = [f"{key}={value}" for key, value in self.params.items()] + arguments
        # Of two for a key the command line's comes last.
        overrides = {each.get_key_element(): each for each in self.parser.parse_overrides(given)}
        sought = {key: each for key, each in overrides.items() if each.is_sweep_override()}
        self.fixed = [each.input_line for key, each in overrides.items() if key not in sought]
        self.study = open_study(folder / STUDY, self.seed, self.n_startup_trials)
        for trial in self.study.trials:
            if not trial.state.is_finished():
                self.launch([trial])
        reached = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in self.study.trials)
        space = {key: distribution(each) for key, each in sought.items()}
        while (left := self.n_trials - reached) > 0:
            asked = [self.study.ask(space) for _ in range(min(left, self.n_jobs))]
            self.launch(asked)
            reached += len(asked)

    def launch(self, trials: list[Any]) -> None:
        """Run jobs of consecutive numbers, and tell what they returned."""
        from optuna.trial import TrialState

        jobs = []
        for trial in trials:
            values = [f"{key}={value}" for key, value in trial.params.items()]
            jobs.append([*self.fixed, *values, f"sweep.trial={trial.number}"])
        returned = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        for trial, job in zip(trials, returned, strict=True):
            value = job.return_value
            if self.study.trials[trial.number].state.is_finished():
                continue  # the job has pruned itself
            if value is None or math.isnan(value):
                self.study.tell(trial.number, state=TrialState.FAIL)
            else:
                self.study.tell(trial.number, value)


def distribution(override: Override) -> Any:
    """The values of a key as Optuna has them: an interval, or a choice."""
    from optuna import distributions

    if not override.is_interval_sweep():
        return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    value = override.value()
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    made = distributions.IntDistribution if whole else distributions.FloatDistribution
    return made(value.start, value.end, log="log" in value.tags)
