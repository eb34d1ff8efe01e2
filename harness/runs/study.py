"""A search's study in Optuna: what was proposed, which of it are candidates, what was told of them.

Optuna proposes by ask and tell; everything is in its storage, a journal in the experiment's folder
or a database by URL. A proposal becomes a candidate by one write, so that a kill leaves either a
candidate or nothing. Draws depend on the seed and on how many proposals came before, and not on the
process that makes them: a search that was cut proposes what it would have proposed. Whoever reads
or writes holds the search's lock (`harness.system.lock.exclusive`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from harness.config import renamed
from harness.config.errors import ConfigError
from harness.config.search_space import Dimension, MethodOf, Space, Value
from harness.runs.proposals import Given, Sobol, distribution, suggest
from harness.system import lock

ATTEMPTS = 100  # proposals in a row that are no candidates, before a space counts as exhausted
OWN_ATTEMPTS = 10  # of them by the sampler itself: TPE over choices proposes the same point again
COUNTABLE = 10_000  # points of a space, up to which those not yet proposed are listed
CANDIDATE, REJECTED, SEARCH, GROWN = "candidate", "rejected", "search", "grown"  # in the storage
STATES = {TrialState.RUNNING: "running", TrialState.COMPLETE: "complete"}
log = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Candidate:
    """Holds a configuration of a search, and what is known of it."""

    number: int  # of Optuna's trial, by which candidates are ordered
    overrides: tuple[str, ...]
    name: str  # of its run's directory
    bracket: int
    size: int  # candidates of the bracket, when all have been proposed
    params: dict[str, Value]
    state: str  # running | complete | pruned
    at: dict[int, float]  # rung -> validation nll, nats per token
    values: tuple[float, ...]  # of the objectives, of one that is complete


@dataclass(frozen=True)
class Growth:
    """Holds a part that was added to an interval, since the best so far was at its end."""

    bracket: int  # whose candidates are in the part
    size: int  # of it
    key: str
    end: str  # lower | upper
    low: float
    high: float


class _JournalLock:
    """Optuna's lock of a journal, by the kernel: nothing is left of a process that was killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        self._held = lock.exclusive(self._path)
        self._held.__enter__()
        return True

    def release(self) -> None:
        self._held.__exit__(None, None, None)


def open_storage(url: str | None, folder: Path) -> optuna.storages.BaseStorage:
    """The storage of a search: journal.log in `folder`, or a database by its URL.

    Raises:
        ConfigError: it cannot be reached, or is none.
    """
    try:
        if url is None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "journal.log"
            _drop_half_a_line(path)
            own: Any = _JournalLock(folder / "journal.lock")
            return JournalStorage(JournalFileBackend(str(path), lock_obj=own))
        if "://" not in url:
            raise ConfigError(
                f"hydra.sweeper.storage={url}: expected a URL, as sqlite:///search.db or "
                "postgresql://HOST/NAME, or null for a journal in the experiment's folder"
            )
        return optuna.storages.RDBStorage(url)
    except ConfigError:
        raise
    except Exception as error:  # of any kind, from a driver
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        log.debug("storage", exc_info=True)
        raise ConfigError(
            f"hydra.sweeper.storage={url or folder}: cannot be opened "
            f"({type(error).__name__}: {lines[0]})"
        ) from error


def _drop_half_a_line(path: Path) -> None:
    """Cut off what a full disk or a crash left of the last line; what came before is whole."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


class Study:
    """One study of a storage: of one space under one set of rules."""

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        space: Space,
        method_of: MethodOf,
        *,
        sampler: str,
        seed: int,
        objectives: int,
        batch: int,
        rules: Mapping[str, str],
    ) -> None:
        """Open the study `name`, which is made where there is none.

        Raises:
            ConfigError: the study that is there has other `rules`.
        """
        self.name, self.space, self.method_of = name, space, method_of
        self._storage, self._sampler, self._seed, self._batch = storage, sampler, seed, batch
        self._points: list[dict[str, Value]] = []
        self._sequence: optuna.Study | None = None
        if sampler == "grid":
            self._points = list(space.points(method_of))
        with _readable_errors(name):
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=[StudyDirection.MINIMIZE] * objectives,
                load_if_exists=True,
                sampler=self._make(0),
                pruner=optuna.pruners.NopPruner(),
            )
            existing = self._study.user_attrs.get(SEARCH)
            if existing is None:
                self._study.set_user_attr(SEARCH, dict(rules))
        if existing and renamed.is_same(existing.get("fixed", ""), rules.get("fixed", "")):
            existing |= {
                key: rules[key] for key in ("fixed",) if key in existing.keys() & rules.keys()
            }
        if existing is not None and existing != dict(rules):
            keys = [k for k in [*rules, *existing] if rules.get(k) != existing.get(k)]
            apart = [
                f"{key}: {existing.get(key, 'not there')} then, {rules.get(key, 'not there')} now"
                for key in dict.fromkeys(keys)
            ]
            raise ConfigError(
                f"the study {name} is another search ({'; '.join(apart)}): choose another "
                "experiment_name, or delete its folder"
            )

    @property
    def grid_size(self) -> int:
        """Return the number of candidates of a grid, 0 for other samplers."""
        return len(self._points) if self._sampler == "grid" else 0

    def candidates(self) -> list[Candidate]:
        """All candidates so far, in the order in which they were proposed."""
        candidates = []
        for trial in self._study.get_trials(deepcopy=False):
            if (own := trial.user_attrs.get(CANDIDATE)) is None:
                continue
            candidates.append(
                Candidate(
                    trial.number,
                    tuple(renamed.in_overrides(own["overrides"], told=False)),
                    own["name"],
                    own["bracket"],
                    own["size"],
                    dict(trial.params),
                    STATES.get(trial.state, "pruned"),
                    {int(step): nll for step, nll in trial.intermediate_values.items()},
                    tuple(trial.values or ()) if trial.state == TrialState.COMPLETE else (),
                )
            )
        return candidates

    def rejected(self) -> list[str]:
        """Return why proposals were no candidates, a reason each."""
        trials = self._study.get_trials(deepcopy=False)
        return [t.user_attrs[REJECTED] for t in trials if REJECTED in t.user_attrs]

    def growths(self) -> list[Growth]:
        """Return how the intervals have grown, the first growth first."""
        return [Growth(**growth) for growth in self._study.user_attrs.get(GROWN, [])]

    def add_growth(self, growth: Growth) -> None:
        """Write down that an interval grows, before the first candidate of the new part."""
        existing = self._study.user_attrs.get(GROWN, [])
        self._study.set_user_attr(GROWN, [*existing, vars(growth)])

    def grown(self, dimension: Dimension) -> Dimension:
        """A dimension of the space with all that it has grown by."""
        for growth in self.growths():
            if growth.key == dimension.name:
                dimension = dimension.with_part(self.part(growth))
        return dimension

    def part(self, growth: Growth) -> Dimension:
        """The part that an interval has grown by."""
        (own,) = (d for d in self.space.dimensions if d.name == growth.key)
        listed = (growth.low,) if own.listed else ()
        return replace(own, low=growth.low, high=growth.high, listed=listed)

    def drop_unfinished(self) -> None:
        """Forget proposals that a kill kept from becoming candidates."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if CANDIDATE not in trial.user_attrs:
                self._study.tell(trial.number, state=TrialState.FAIL)

    def ask(
        self,
        judge: Callable[[list[str]], tuple[str, str | None]],
        *,
        bracket: int,
        size: int,
        part: Dimension | None = None,
        given: Mapping[str, Value] | None = None,
    ) -> bool:
        """Make one more candidate; False where the space has no further one.

        `judge` gives the name of a proposal's run, and why it is no candidate, or None. `part`
        stands in place of the dimension of its key, and `given` are values that leave no choice.
        After `OWN_ATTEMPTS` proposals that are no candidates the sampler's turn is over: a point
        that was not yet proposed is drawn, or a random one where points cannot be listed.
        """
        space = self.space if part is None else self.space.with_dimension(part)
        for attempt in range(ATTEMPTS if given is None else 1):
            trials = self._study.get_trials(deepcopy=False)
            position = sum(bool({CANDIDATE, REJECTED} & t.user_attrs.keys()) for t in trials)
            if given is not None:
                self._study.sampler = Given(given)
            elif self._sampler == "grid" and position >= len(self._points):
                return False
            elif self._sampler == "grid" or attempt < OWN_ATTEMPTS:
                self._study.sampler = self._make(position, beyond=part is not None)
            elif (listed := space.with_steps()).size() > COUNTABLE:
                self._study.sampler = optuna.samplers.RandomSampler(seed=self._draw(position))
            elif untried := self._untried(listed, trials):
                place = self._draw(position) % len(untried)
                self._study.sampler = Given(untried[place])
            else:
                return False
            trial = self._study.ask()
            overrides = space.assemble(partial(suggest, trial), self.method_of)
            try:
                name, against = judge(overrides)
            except BaseException:
                self._study.tell(trial, state=TrialState.FAIL)
                raise
            if against is None:
                own = {"overrides": overrides, "name": name, "bracket": bracket, "size": size}
                trial.set_user_attr(CANDIDATE, own)
                return True
            trial.set_user_attr(REJECTED, against)
            self._study.tell(trial, state=TrialState.FAIL)
        return False

    def report(self, candidate: Candidate, step: int, nll: float) -> None:
        """Write down what was found at a rung; Optuna's samplers read it, too."""
        if step not in candidate.at:
            study_id = self._storage.get_study_id_from_name(self.name)
            trial = self._storage.get_trial_id_from_study_id_trial_number(
                study_id, candidate.number
            )
            self._storage.set_trial_intermediate_value(trial, step, nll)
            candidate.at[step] = nll

    def tell(self, candidate: Candidate, values: Sequence[float] | None) -> None:
        """End a candidate: with its objectives, or None where it did not come to the end."""
        if values is None:
            self._study.tell(candidate.number, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self._study.tell(candidate.number, list(values), skip_if_finished=True)

    def _make(self, position: int, *, beyond: bool = False) -> BaseSampler:
        """The sampler of the proposal after `position` others, or of one in an added part."""
        seed, samplers = self._draw(position), optuna.samplers
        if self._sampler == "grid":
            return Given(self._points[position] if position < len(self._points) else {})
        if self._sampler == "quasi_random" and not beyond:  # whose sequence is of the space
            return Given(self._quasi_random(position))
        if self._sampler == "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=True)
        if self._sampler == "gp":
            return samplers.GPSampler(seed=seed)
        if self._sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=max(2, self._batch))
        if self._sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return samplers.RandomSampler(seed=seed)

    def _draw(self, position: int) -> int:
        """A number of 32 bits for the proposal after `position` others."""
        digest = hashlib.sha256(f"{self._seed}/{position}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _untried(self, space: Space, trials: Sequence[FrozenTrial]) -> list[dict[str, Value]]:
        """The points of a space that were never proposed."""
        proposed = {_rounded(trial.params) for trial in trials}
        return [p for p in space.points(self.method_of) if _rounded(p) not in proposed]

    def _quasi_random(self, position: int) -> dict[str, Value]:
        """A point of a scrambled Sobol sequence; Optuna's sampler counts in a study of its own."""
        if self._sequence is None:
            space = {d.name: distribution(d) for d in self.space.dimensions}
            self._sequence = optuna.create_study(sampler=Sobol(space, self._seed))
        while len(self._points) <= position:
            trial = self._sequence.ask()
            self._points.append({d.name: suggest(trial, d) for d in self.space.dimensions})
        return self._points[position]


def _rounded(point: Mapping[str, Value]) -> frozenset[tuple[str, Value]]:
    """A point for comparing: a value with a step is not computed in the same way everywhere."""
    return frozenset((k, float(f"{v:.12g}") if isinstance(v, float) else v)
                     for k, v in point.items())  # fmt: skip


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Whatever a storage says, in one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of any kind, from a driver
        log.debug("study", exc_info=True)
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"the study {name} cannot be opened ({type(error).__name__}: {message}): see "
            "hydra.sweeper.storage"
        ) from error


def rules_of(**rules: Any) -> dict[str, str]:
    """What a study is of, as text that a storage keeps."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in rules.items()}


def importance(
    space: Space, params: Sequence[Mapping[str, Value]], values: Sequence[float], forests: int = 10
) -> dict[str, tuple[float, float]]:
    """Share of the variance of `values` that each key explains: mean and spread over `forests`.

    Optuna's fANOVA (Hutter et al., ICML 2014), of the keys that all of `params` have; the spread is
    the standard deviation over forests of different seeds. Values are finite.
    """
    shared = [d for d in space.dimensions if all(d.name in trial_params for trial_params in params)]
    if len(shared) < 2 or len(values) < 4 or importlib.util.find_spec("sklearn") is None:
        return {}
    distributions = {d.name: distribution(d) for d in shared}
    study = optuna.create_study()
    for trial_params, value in zip(params, values, strict=True):
        own = {name: trial_params[name] for name in distributions}
        study.add_trial(
            optuna.trial.create_trial(params=own, distributions=distributions, value=value)
        )
    shares_of: dict[str, list[float]] = {name: [] for name in distributions}
    for seed in range(forests):
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
        for name, share in evaluator.evaluate(study).items():
            shares_of[name].append(share)
    means = {name: (mean(shares), pstdev(shares)) for name, shares in shares_of.items() if shares}
    return dict(sorted(means.items(), key=lambda item: -item[1][0]))
