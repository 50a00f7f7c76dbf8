"""Searches the values of a sweep instead of trying all: the tree-structured Parzen estimator of Optuna proposes jobs, and those whose
held-out loss falls behind are paused.   [no torch]

What is known is what the jobs' folders say: a search that was killed goes on from there. A paused job has its checkpoint; when
later results put it among the best after all, it goes on from that.
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
from cogvx.runs.pool import Pool, is_to_run

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIGITS = 3  # significant ones of a proposed number, so that it can be read and typed
TRIES = 50  # for a combination that is new and allowed
STATES = {
    State.done: "COMPLETE",
    State.pruned: "PRUNED",
    State.failed: "FAIL",
    State.out_of_memory: "FAIL",
}


@dataclass(frozen=True)
class Choice:
    """One of several values, and how each is written on a command line."""

    values: list[object]
    texts: list[str]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

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

    def text(self, value: object) -> str:
        return str(value)

    def rounded(self, value: float) -> float:
        return value if self.whole else min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def examples(self) -> list[object]:
        return [self.low, self.high]


Space = dict[str, Choice | Range]  # by setting


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
            problems.append(f"unknown setting hydra.sweeper.{name}: it has {', '.join(names)}")
        for name, least in (("n_trials", 1), ("n_startup_trials", 1), ("seed", 0), ("at_least", 2)):
            if not isinstance(values[name], int) or values[name] < least:
                problems.append(f"hydra.sweeper.{name}={values[name]}: must be {least} or more")
        rungs = values["rungs"]
        if not isinstance(rungs, list) or not all(
            isinstance(r, float) and 0 < r < 1 for r in rungs
        ):
            problems.append(
                f"hydra.sweeper.rungs={rungs}: must be shares of a job's steps between 0 and 1, as [0.25,0.5]"
            )
        if not isinstance(values["keep"], float) or not 0 < values["keep"] < 1:
            problems.append(f"hydra.sweeper.keep={values['keep']}: must be between 0 and 1")
        if problems:
            raise UserError("\n".join(problems))
        return cls(**{name: values[name] for name in names})


class Search:
    """What pool.run() takes its jobs from."""

    def __init__(
        self, sweep: Sweep, space: Space, settings: Settings, pool: Pool,
        make: Callable[[dict[str, str]], tuple[Job, Config]], names: dict[str, str], command: list[str],
    ):  # fmt: skip
        """make(): the job of some values, as they are written; UserError when they cannot be had together. names: of the settings in Job.values."""
        self.sweep, self.space, self.settings, self.make, self.names, self.command = (
            sweep, space, settings, make, names, command
        )  # fmt: skip
        self.unfinished = [
            job for job in sweep.jobs() if is_to_run(sweep, job, retry_failed=pool.retry_failed)
        ]
        self.running: dict[str, Job] = {}
        self.seen: dict[
            str, int
        ] = {}  # of running jobs, their held-out losses when they were last compared

    def take(self) -> Job | None:
        job = self.unfinished.pop(0) if self.unfinished else self.promoted() or self.proposed()
        if job is not None:
            self.running[job.name] = job
        return job

    def ended(self, job: Job) -> None:
        del self.running[job.name]
        found = self.sweep.progress(job)
        why = (
            self.behind(job, self.everyones())
            if found.state is State.interrupted and job.name in self.seen
            else None
        )
        if why is not None:
            record.finish(
                self.sweep.folder / job.name,
                {**found.summary, "status": State.pruned.name, "reason": why},
            )

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

    # -- successive halving, asynchronous (Li et al. 2020, ASHA) -------------------------------------------------------

    def promoted(self) -> Job | None:
        """A paused job that is among the best by now."""
        everyones = self.everyones()
        paused = [job for job in self.sweep.jobs() if everyones[job.name].state is State.pruned]
        return next((job for job in paused if self.behind(job, everyones) is None), None)

    def behind(self, job: Job, everyones: dict[str, Progress]) -> str | None:
        """Why this job should not go on: at the last rung that it and enough others have reached, too many are better by more
        than the noise of the measurement."""
        for rung in sorted(self.settings.rungs, reverse=True):
            mine = at(rung, everyones[job.name])
            there = sorted(
                line["heldout_loss"]
                for p in everyones.values()
                if (line := at(rung, p)) is not None
            )
            if mine is None or len(there) < self.settings.at_least:
                continue
            best = max(1, math.floor(len(there) * self.settings.keep))
            loss, cut = mine["heldout_loss"], there[best - 1]
            if loss <= cut + (mine.get("heldout_noise_floor") or 0.0):
                return None
            return f"held-out loss {loss:.4f} after {mine['step']} steps: not among the best {best} of {len(there)} ({cut:.4f})"
        return None

    def everyones(self) -> dict[str, Progress]:
        return {job.name: self.sweep.progress(job) for job in self.sweep.jobs()}

    # -- proposals -----------------------------------------------------------------------------------------------------

    def proposed(self) -> Job | None:
        """A new job, frozen; None when there are enough, or when the space has no more."""
        jobs = self.sweep.jobs()
        known, tried = {job.name for job in jobs}, [self.params(job) for job in jobs]
        if len(known) >= self.settings.n_trials:
            return None
        study, refused = self.study(number=len(known)), None
        for _ in range(TRIES):
            values = self.values_from(study)
            if values in tried:
                continue
            try:
                job, config = self.make(
                    {key: self.space[key].text(value) for key, value in values.items()}
                )
            except UserError as error:
                refused = error
                continue
            if job.name not in known:
                job = Job(
                    job.name, job.values | {self.names[key]: value for key, value in values.items()}
                )
                self.sweep.freeze([(job, config)], self.command)
                return job
        said = f"the last one: {refused}" if refused else "all that came up have been tried"
        print(f"search  {TRIES} proposals gave no new job, {said}", flush=True)
        return None

    def params(self, job: Job) -> dict[str, object]:
        """Of a job, the values of what is searched."""
        return {key: job.values.get(self.names[key]) for key in self.space}

    def values_from(self, study) -> dict[str, object]:
        trial = study.ask({key: part.distribution() for key, part in self.space.items()})
        return {key: part.rounded(trial.params[key]) for key, part in self.space.items()}

    def study(self, number: int):
        """What is known so far, in Optuna's terms, to propose the job of this number: its random draws are its own."""
        import optuna
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {key: part.distribution() for key, part in self.space.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                sampler=optuna.samplers.TPESampler(
                    seed=random.Random(f"{self.settings.seed} {number}").getrandbits(32),
                    n_startup_trials=self.settings.n_startup_trials,
                    multivariate=True,
                    constant_liar=True,
                )
            )
        for job in self.sweep.jobs():
            params = self.params(job)
            if not all(contains(distributions[key], value) for key, value in params.items()):
                continue  # of an earlier search in other ranges
            found = self.sweep.progress(job)
            state = TrialState[STATES.get(found.state, "RUNNING")]
            if state is TrialState.COMPLETE and found.summary.get("objective") is None:
                state = TrialState.FAIL
            study.add_trial(
                create_trial(
                    state=state, params=params, distributions=distributions,
                    value=found.summary["objective"] if state is TrialState.COMPLETE else None,
                    intermediate_values={line["step"]: line["heldout_loss"] for line in found.judged if line["step"]},
                )
            )  # fmt: skip
        return study


def at(rung: float, progress: Progress) -> dict | None:
    """The first held-out loss at or after this share of the steps, as its line of metrics.jsonl."""
    if progress.steps is None:
        return None
    return next(
        (line for line in progress.judged if line["step"] >= max(1, rung * progress.steps)), None
    )


def contains(distribution: BaseDistribution, value: object) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False
