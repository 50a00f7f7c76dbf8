"""Searches good values instead of trying all combinations.   [no torch]

Optuna's tree-structured Parzen estimator (TPE) proposes jobs. Jobs whose held-out loss falls
behind are paused with a checkpoint. If later results put a paused job among the best, it goes on.
All that is known is read from the jobs' folders, so a search that was killed goes on from there.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogvx.config import Config
from cogvx.errors import UserError
from cogvx.records import record
from cogvx.records.sweep import Job, Progress, State, Sweep
from cogvx.runs.jobs import is_to_run
from cogvx.runs.pool import Pool
from cogvx.wording import unknown_setting

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

DIGITS = 3  # significant digits of a proposed number, so that it can be read and typed
BRANCH = "branch"  # what Optuna calls the choice among several branches
TRIES = 50  # to find a combination that is new and allowed
OPTUNA_STATES = {
    State.done: "COMPLETE",
    State.paused: "PRUNED",
    State.failed: "FAIL",
    State.out_of_memory: "FAIL",
}


@dataclass(frozen=True)
class Choice:
    """One of several values. `texts`: how each is written on a command line."""

    values: list[object]
    texts: list[str]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def suggested(self, trial: Trial, name: str) -> object:
        return trial.suggest_categorical(name, self.values)

    def text(self, value: object) -> str:
        return self.texts[self.values.index(value)]

    def rounded(self, value: object) -> object:
        return value

    def examples(self) -> list[object]:
        return self.values


@dataclass(frozen=True)
class Range:
    """A number from low to high, both included."""

    low: float
    high: float
    log: bool
    whole: bool

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        return (IntDistribution if self.whole else FloatDistribution)(
            self.low, self.high, log=self.log
        )

    def suggested(self, trial: Trial, name: str) -> float:
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(name, self.low, self.high, log=self.log)

    def text(self, value: object) -> str:
        return str(value)

    def rounded(self, value: float) -> float:
        return value if self.whole else min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def examples(self) -> list[object]:
        return [self.low, self.high]


Space = dict[str, Choice | Range]  # by setting


@dataclass(frozen=True)
class Branch:
    """Ranges that belong together, such as those of one optimizer."""

    space: Space
    fixed: dict[str, object]  # plain values of settings that are not searched
    names: dict[str, str]  # each setting's name in Job.values
    # The job of some values, as written. UserError if they do not go together.
    make: Callable[[dict[str, str]], tuple[Job, Config]]

    def params(self, job: Job) -> dict[str, object] | None:
        """A job's values of the searched settings; None if it is none of this branch.

        A job of an earlier search may lie outside of today's ranges.
        """
        values = {key: job.values.get(self.names[key]) for key in (*self.fixed, *self.space)}
        own = all(contains(part.distribution(), values[key]) for key, part in self.space.items())
        if not own or any(values[key] != value for key, value in self.fixed.items()):
            return None
        return {key: values[key] for key in self.space}


@dataclass(frozen=True)
class Settings:
    """hydra/sweeper=optuna, conf/hydra/sweeper/optuna.yaml."""

    n_trials: int
    n_startup_trials: int
    seed: int
    rungs: list[float]
    keep: float
    at_least: int

    @classmethod
    def read(cls, values: dict) -> Settings:
        """UserError for what is wrong with the settings."""
        names, problems = tuple(cls.__dataclass_fields__), []
        for name in sorted(set(values) - {"_target_", "params", *names}):
            known = [f"hydra.sweeper.{own}" for own in names]
            problems.append(unknown_setting(f"hydra.sweeper.{name}", values[name], known))
        for name, least in (("n_trials", 1), ("n_startup_trials", 1), ("seed", 0), ("at_least", 2)):
            if not isinstance(values[name], int) or values[name] < least:
                problems.append(
                    f"hydra.sweeper.{name}={values[name]}: must be a whole number, {least} or more"
                )
        rungs = values["rungs"]
        if not isinstance(rungs, list) or not all(
            isinstance(r, float) and 0 < r < 1 for r in rungs
        ):
            problems.append(
                f"hydra.sweeper.rungs={rungs}: must be a list of shares of a job's steps, between "
                f"0 and 1: [0.25,0.5]"
            )
        if not isinstance(values["keep"], float) or not 0 < values["keep"] < 1:
            problems.append(
                f"hydra.sweeper.keep={values['keep']}: must be a number between 0 and 1"
            )
        if problems:
            raise UserError("\n".join(problems))
        return cls(**{name: values[name] for name in names})


class Search:
    """The queue that run_pool() takes the jobs of a search from."""

    def __init__(
        self,
        sweep: Sweep,
        branches: list[Branch],
        settings: Settings,
        pool: Pool,
        command: list[str],
    ):
        """`branches`: each job is of one of them."""
        self.sweep, self.branches, self.settings = sweep, branches, settings
        self.command = command
        retry = pool.retry_failed
        self.unfinished = [job for job in sweep.jobs() if is_to_run(sweep, job, retry_failed=retry)]
        self.running: dict[str, Job] = {}
        # How many held-out losses each running job had when the jobs were last compared.
        self.seen: dict[str, int] = {}

    def take(self) -> Job | None:
        job = self.unfinished.pop(0) if self.unfinished else self.promoted() or self.proposed()
        if job is not None:
            self.running[job.name] = job
        return job

    def to_come(self) -> int:
        return max(0, self.settings.n_trials - len(self.sweep.jobs()))

    def ended(self, job: Job) -> None:
        """A job that was stopped because it fell behind is recorded as paused."""
        del self.running[job.name]
        found = self.sweep.progress(job)
        if found.state is not State.interrupted or job.name not in self.seen:
            return
        reason = self.behind(job, self.everyones())
        if reason is not None:
            paused = {"status": State.paused.name, "reason": reason}
            record.finish(self.sweep.folder / job.name, {**found.summary, **paused})

    def to_pause(self) -> list[Job]:
        news = {}
        for name, job in self.running.items():
            judged = len(self.sweep.progress(job).judged)
            if judged > self.seen.get(name, 0):
                news[name] = judged
        if not news or not self.settings.rungs:
            return []
        self.seen |= news
        everyones = self.everyones()
        return [self.running[name] for name in news if self.behind(self.running[name], everyones)]

    # -- asynchronous successive halving (ASHA, Li et al. 2020) --------------------------------

    def promoted(self) -> Job | None:
        """A paused job that is among the best by now."""
        everyones = self.everyones()
        paused = [job for job in self.sweep.jobs() if everyones[job.name].state is State.paused]
        return next((job for job in paused if self.behind(job, everyones) is None), None)

    def behind(self, job: Job, everyones: dict[str, Progress]) -> str | None:
        """Why this job should not go on, or None.

        It falls behind if, at the last rung that it and enough others have reached, too many are
        better by more than the noise of the measurement.
        """
        for rung in sorted(self.settings.rungs, reverse=True):
            mine = line_at(rung, everyones[job.name])
            lines = [line_at(rung, progress) for progress in everyones.values()]
            losses = sorted(line["heldout_loss"] for line in lines if line is not None)
            if mine is None or len(losses) < self.settings.at_least:
                continue
            best = max(1, math.floor(len(losses) * self.settings.keep))
            loss, limit = mine["heldout_loss"], losses[best - 1]
            if loss <= limit + (mine.get("heldout_noise_floor") or 0.0):
                return None
            return (
                f"held-out loss {loss:.4f} after {mine['step']} steps: "
                f"not among the best {best} of {len(losses)} ({limit:.4f})"
            )
        return None

    def everyones(self) -> dict[str, Progress]:
        return {job.name: self.sweep.progress(job) for job in self.sweep.jobs()}

    # -- proposals -----------------------------------------------------------------------------

    def proposed(self) -> Job | None:
        """A new job, frozen; None if there are enough jobs, or if no new one is left to try."""
        jobs = self.sweep.jobs()
        known, tried = {job.name for job in jobs}, [self.place_of(job) for job in jobs]
        if len(known) >= self.settings.n_trials:
            return None
        study, refused = self.study(number=len(known)), None
        for _ in range(TRIES):
            number, values = self.values_from(study)
            if (number, values) in tried:
                continue
            branch = self.branches[number]
            texts = {key: branch.space[key].text(value) for key, value in values.items()}
            try:
                job, config = branch.make(texts)
            except UserError as error:
                refused = error
                continue
            if job.name not in known:
                own = {branch.names[key]: value for key, value in values.items()}
                job = Job(job.name, job.values | own)
                self.sweep.freeze([(job, config)], self.command)
                return job
        reason = f"the last one: {refused}" if refused else "all that came up have been tried"
        print(f"search  {TRIES} proposals gave no new job, {reason}", flush=True)
        return None

    def place_of(self, job: Job) -> tuple[int, dict[str, object]] | None:
        """The number of a job's branch, and its values of the searched settings."""
        found = ((number, branch.params(job)) for number, branch in enumerate(self.branches))
        return next(((number, params) for number, params in found if params is not None), None)

    def values_from(self, study: Study) -> tuple[int, dict[str, object]]:
        trial, number = study.ask(), 0
        if len(self.branches) > 1:
            number = trial.suggest_categorical(BRANCH, self.numbers)
        space = self.branches[number].space
        proposed = {
            key: part.suggested(trial, self.name_in_study(number, key))
            for key, part in space.items()
        }
        return number, {key: space[key].rounded(value) for key, value in proposed.items()}

    @property
    def numbers(self) -> list[int]:
        return list(range(len(self.branches)))

    def name_in_study(self, number: int, key: str) -> str:
        """The same setting has other ranges in other branches."""
        return key if len(self.branches) == 1 else f"{key} {number}"

    def study(self, number: int) -> Study:
        """Optuna's study of all jobs so far, which proposes the job of this number.

        Each number has its own random draws.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                sampler=optuna.samplers.TPESampler(
                    seed=random.Random(f"{self.settings.seed} {number}").getrandbits(32),
                    n_startup_trials=self.settings.n_startup_trials,
                    multivariate=True,
                    # The settings of a branch are judged among the jobs of this branch.
                    group=len(self.branches) > 1,
                    constant_liar=True,
                )
            )
        for job in self.sweep.jobs():
            place = self.place_of(job)
            if place is not None:
                study.add_trial(self.trial(job, *place))
        return study

    def trial(self, job: Job, number: int, params: dict[str, object]) -> FrozenTrial:
        """A job as Optuna's trial."""
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        found = self.sweep.progress(job)
        state, objective = TrialState[OPTUNA_STATES.get(found.state, "RUNNING")], None
        if state is TrialState.COMPLETE:
            objective = found.summary.get("objective")
            state = TrialState.FAIL if objective is None else state
        losses = {line["step"]: line["heldout_loss"] for line in found.judged if line["step"]}
        chosen, among = {}, {}
        if len(self.branches) > 1:
            chosen, among = {BRANCH: number}, {BRANCH: CategoricalDistribution(self.numbers)}
        space = self.branches[number].space
        named = {key: self.name_in_study(number, key) for key in space}
        return create_trial(
            state=state,
            params=chosen | {named[key]: value for key, value in params.items()},
            distributions=among | {named[key]: p.distribution() for key, p in space.items()},
            value=objective,
            intermediate_values=losses,
        )


def line_at(rung: float, progress: Progress) -> dict | None:
    """The line of metrics.jsonl with the first held-out loss at or after this share of steps."""
    if progress.steps is None:
        return None
    step = max(1, rung * progress.steps)
    return next((line for line in progress.judged if line["step"] >= step), None)


def contains(distribution: BaseDistribution, value: object) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False
