"""Where a search of one space stands, from its study and its runs' directories alone.

Nothing is kept in the process: a controller that was killed, or a second one, reads the same and
does what is left. `Search.tasks` is asked under the search's lock, and trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import DictConfig

from harness.config import unused_keys
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.config.search_space import Dimension
from harness.results import run_record
from harness.runs import halving, own_overrides, search_limits
from harness.runs.grids import check
from harness.runs.search_settings import Brackets
from harness.runs.study import Candidate, Growth, Study

EDGE = 0.05  # of an interval, on its own scale: a best so near to an end is at it
ANSWERS = ("nan", "oom")  # failures that say something of a candidate: it is worse than any other


@dataclass(frozen=True)
class Task:
    """A run that is to train up to a rung, or to its end."""

    overrides: list[str]
    run: RunConfig


@dataclass
class Search:
    """Runs the search of one space: proposals, rungs and what became of them."""

    study: Study
    compose: Callable[[list[str]], DictConfig]
    folder: Path  # of the runs' directories
    brackets: Brackets
    objectives: tuple[str, ...]
    against: Callable[[RunConfig], str | None]  # why a run is no candidate, by its plan
    seeds: tuple[int, ...] = ()  # further ones, under which those at the last rung also run
    grow: int = 0  # how often an interval may grow
    exhausted: bool = False
    _closed: set[int] = field(default_factory=set)  # brackets of grown intervals without more
    _runs: dict[str, tuple[list[str], RunConfig]] = field(default_factory=dict)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Return the optimizer steps of all rungs, of which the last is the end."""
        return self.brackets.rungs

    @property
    def eta(self) -> int:
        """Return of how many candidates one goes on from a rung."""
        return self.brackets.eta

    def tasks(self) -> list[Task]:
        """What is to train now; none when the search is over.

        Rungs that were reached are reported to the study, brackets that are decided are told, and
        the next ones proposed.

        Raises:
            ConfigError: a proposal cannot be, or is another run now than when it was proposed.
        """
        self.study.drop_unfinished()
        while True:
            candidates, growths = self.study.candidates(), self.study.growths()
            parts = {growth.bracket: growth for growth in growths}
            number = max([*parts, *(c.bracket for c in candidates)], default=-1)
            bracket = [c for c in candidates if c.bracket == number]
            growth = parts.get(number)
            size = growth.size if growth else bracket[0].size if bracket else 0
            full = number in self._closed if growth else self.exhausted
            undecided = any(c.state == "running" for c in bracket)
            begun = growth is not None and not bracket  # a part of which nothing is proposed yet
            if len(bracket) < size and not full and (undecided or begun):
                self._ask(candidates, number, size, growth)
            elif undecided:
                if going := self._decide(bracket, number, growths):
                    return [task for candidate, step in going
                            for task in self._tasks(candidate, step)]  # fmt: skip
            elif self._left(candidates, growths) > 0 and not self.exhausted:
                place = number + 1 - len(growths)
                size = min(self.brackets.of(place)[0], self._left(candidates, growths))
                self._ask(candidates, number + 1, size, None)
            elif further := self._growth(candidates, growths, number + 1):
                self.study.add_growth(further)
            else:
                return []

    def left(self) -> int:
        """Return how many candidates are still to be proposed, beside those of grown intervals."""
        return self._left(self.study.candidates(), self.study.growths())

    def _left(self, candidates: Sequence[Candidate], growths: Sequence[Growth]) -> int:
        """How many of `candidates` are still to be proposed."""
        grown = {growth.bracket for growth in growths}
        return self.brackets.trials - sum(c.bracket not in grown for c in candidates)

    def _ask(
        self, candidates: Sequence[Candidate], bracket: int, size: int, growth: Growth | None
    ) -> None:
        names = {candidate.name: place for place, candidate in enumerate(candidates)}

        def judge(overrides: list[str]) -> tuple[str, str | None]:
            try:
                _, (run,), _ = check([overrides], self.compose)
            except ConfigError as error:
                if growth is None:  # every end of the space as it was given has been checked
                    raise
                return "", str(error)
            name = run.run_dir.name
            if name in names:
                return name, f"the same run as candidate {names[name]}"
            if why := self.against(run):
                return name, why
            self._runs[name] = (overrides, run)
            return name, None

        part = given = None
        if growth is not None:
            part = self.study.part(growth)
            if part.low == part.high:  # one more value, of the best or of whatever there is
                value = int(part.low) if part.integer else part.low
                given = dict((self.best() or candidates[0]).params) | {part.name: value}
        more = self.study.ask(judge, bracket=bracket, size=size, part=part, given=given)
        if growth is not None and not more:
            self._closed.add(bracket)
        elif not more:
            self.exhausted = True

    def _decide(
        self, bracket: list[Candidate], number: int, growths: Sequence[Growth]
    ) -> list[tuple[Candidate, int]]:
        """Who of a bracket trains now, and to which step; if nobody does, all are told."""
        losses = {}
        for candidate in bracket:
            losses[candidate.number] = self.found(candidate)
            for step, nll in losses[candidate.number].items():
                if math.isfinite(nll) and candidate.state == "running":
                    self.study.report(candidate, step, nll)
        grown = {growth.bracket for growth in growths}
        place = number - sum(other < number for other in grown)
        rungs = self.rungs if number in grown else self.brackets.of(place)[1]
        going = halving.todo(losses, rungs, self.eta)
        if going:
            return [(c, going[c.number]) for c in bracket if c.number in going]
        for candidate in bracket:
            if candidate.state == "running":
                nll = losses[candidate.number].get(self.rungs[-1], math.inf)
                values = self._values(candidate, nll) if math.isfinite(nll) else None
                self.study.tell(candidate, values)
        return []

    def found(self, candidate: Candidate) -> dict[int, float]:
        """Validation nll at the rungs that a candidate has come to; infinite where it diverged.

        At the last rung, with further seeds, it is the mean over all of them, once all are there.
        """
        losses = reached(self.folder / candidate.name, self.rungs)
        losses |= {step: nll for step, nll in candidate.at.items() if step in self.rungs}
        last = self.rungs[-1]
        if self.seeds and last in losses and last not in candidate.at and losses[last] < math.inf:
            own = self.by_seed(candidate)
            if any(nll is None for nll in own):
                del losses[last]
            else:
                losses[last] = mean([nll for nll in own if nll is not None])
        return losses

    def run_dirs(self, candidate: Candidate, *, so_far: bool = False) -> list[Path]:
        """The directories of a candidate's runs, that of the search's own seed first.

        `so_far`: without the further seeds of one that has not come to the last rung.
        """
        own, last = self.folder / candidate.name, self.rungs[-1]
        if not self.seeds or (
            so_far and not math.isfinite(reached(own, [last]).get(last, math.inf))
        ):
            return [own]
        return [own, *(run.run_dir for _, run in self._further_runs(candidate))]

    def by_seed(self, candidate: Candidate) -> list[float | None]:
        """Validation nll at the last rung under the search's own seed and each further one."""
        last = self.rungs[-1:]
        return [reached(run_dir, last).get(last[0]) for run_dir in self.run_dirs(candidate)]

    def _further_runs(self, candidate: Candidate) -> list[tuple[list[str], RunConfig]]:
        """The runs of a candidate under the further seeds."""
        runs = []
        for seed in self.seeds:
            name = f"{candidate.name} {seed}"
            if name not in self._runs:
                overrides, _ = self.run_of(candidate)
                kept = [text for text in overrides if unused_keys.key_of(text) != "seed"]
                (texts,), (run,), _ = check([[*kept, f"seed={seed}"]], self.compose)
                self._runs[name] = (texts, run)
            runs.append(self._runs[name])
        return runs

    # ---------------------------------------------------------------------- the best so far

    def score(self, candidate: Candidate) -> float:
        """What candidates are compared by: validation nll, infinite of one not below its start."""
        record = run_record.read(self.folder / candidate.name) or {}
        if not candidate.values or run_record.get(record, "quality.best_step") == 0:
            return math.inf
        return candidate.values[0]

    def best(self) -> Candidate | None:
        """The candidate with the lowest validation nll at the end, the earlier one of two."""
        done = [candidate for candidate in self.study.candidates() if candidate.values]
        return min(done, key=lambda candidate: candidate.values[0], default=None)

    def _growth(
        self, candidates: Sequence[Candidate], growths: Sequence[Growth], number: int
    ) -> Growth | None:
        """The next part of an interval at whose end the best is, as far as it may grow."""
        if not self.grow or not candidates:
            return None
        best = self.best()
        for dimension in self.study.space.dimensions:
            own = [growth for growth in growths if growth.key == dimension.name]
            if len(own) >= self.grow or dimension.choices:
                continue
            if own and not any(c.bracket == own[-1].bracket for c in candidates):
                continue  # nothing could be tried there
            end = self._end_of(dimension, best, candidates)
            part = self.study.grown(dimension).beyond(end) if end else None
            if end is None or part is None:
                continue
            single = part.low == part.high
            size = 1 if single else -(-self.brackets.trials // 2)
            return Growth(number, size, dimension.name, end, part.low, part.high)
        return None

    def _end_of(
        self, dimension: Dimension, best: Candidate | None, candidates: Sequence[Candidate]
    ) -> str | None:
        """At which end of an interval the best is; where every rate was too high, the lower."""
        if dimension.name == "train.lr" and all(math.isinf(self.score(c)) for c in candidates):
            return "lower"
        if best is None or dimension.name not in best.params:
            return None
        grown, value = self.study.grown(dimension), best.params[dimension.name]
        return end_of(grown, value) or outermost(grown, value, candidates)

    def _values(self, candidate: Candidate, nll: float) -> list[float]:
        run_dir = self.folder / candidate.name
        values = [nll]
        for objective in self.objectives[1:]:
            value = search_limits.measured(run_dir, objective)
            if value is None:
                raise ConfigError(
                    f"hydra.sweeper.objectives: {candidate.name} has measured no {objective}"
                )
            values.append(value)
        return values

    def run_of(self, candidate: Candidate) -> tuple[list[str], RunConfig]:
        """The overrides and the configuration of a candidate.

        Raises:
            ConfigError: it is another run now, since a text, a model or a file has changed.
        """
        if candidate.name not in self._runs:
            overrides = list(candidate.overrides)
            _, (run,), _ = check([overrides], self.compose)
            if run.run_dir.name != candidate.name:
                raise ConfigError(
                    f"candidate {candidate.name} of the study {self.study.name} would be "
                    f"{run.run_dir.name} now, since its text, its model or a file of the "
                    "configuration has changed: choose another experiment_name"
                )
            self._runs[candidate.name] = (overrides, run)
        return self._runs[candidate.name]

    def _tasks(self, candidate: Candidate, step: int) -> list[Task]:
        """The run of a candidate up to a rung; at the last one also those of further seeds."""
        overrides, run = self.run_of(candidate)
        if step == self.rungs[-1]:
            runs = [(overrides, run), *self._further_runs(candidate)]
            losses = self.by_seed(candidate) if self.seeds else [None]
            return [Task(*job) for job, nll in zip(runs, losses, strict=True) if nll is None]
        paused = replace(run, launch=replace(run.launch, pause_at=step))
        return [Task([*overrides, f"{own_overrides.PAUSE}{step}"], paused)]


def reached(run_dir: Path, rungs: Sequence[int]) -> dict[int, float]:
    """Validation nll at the rungs that the run in `run_dir` has come to, nats per token.

    It is the lowest after any step up to the rung, which is what the best checkpoint has. A rung
    counts when the run has paused there, gone on from it, or ended. After a failure of ANSWERS the
    rungs that the run did not come to are infinite.
    """
    record = run_record.read(run_dir)
    if record is None:
        return {}
    rows = run_record.read_metrics(run_dir)
    status, failure = record["status"], (record.get("failure") or {}).get("class")
    last = max((int(row["step"]) for row in rows), default=0)
    paused = run_record.get(record, "run.paused_at") or 0
    over = status == "finished" or (status == "failed" and failure in ANSWERS)
    losses = {}
    for rung in rungs:
        if status == "failed" and over and last <= rung and not _validated(rows, rung):
            losses[rung] = math.inf
        elif over or paused >= rung or last > rung:
            losses[rung] = lowest(rows, rung)
    return losses


def _validated(rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any(row["step"] == step and "eval/validation/nll" in row for row in rows)


def lowest(rows: Sequence[Mapping[str, Any]], step: int) -> float:
    """The lowest validation nll up to `step`, before the first step only if there is no other."""
    read = {row["step"]: row["eval/validation/nll"] for row in rows if "eval/validation/nll" in row}
    after = [nll for evaluated, nll in read.items() if 0 < evaluated <= step] or [read.get(0)]
    return min((nll for nll in after if nll is not None), default=math.inf)


def outermost(dimension: Dimension, value: Any, candidates: Sequence[Candidate]) -> str | None:
    """Whether a value of an interval is the "lower" or "upper" most of all that were tried."""
    if dimension.choices:
        return None
    tried = [float(c.params[dimension.name]) for c in candidates if dimension.name in c.params]
    if len(set(tried)) < 3:
        return None
    position = float(value)
    return "lower" if position == min(tried) else "upper" if position == max(tried) else None


def end_of(dimension: Dimension, value: Any) -> str | None:
    """Whether a value is at the "lower" or the "upper" end of its key's; None if inside.

    Of an interval that is the last EDGE of it, on a log scale where it is one. Choices have ends
    where they are three numbers or more.
    """
    if (choices := dimension.values()) is not None:
        try:
            numbers = sorted(float(choice) for choice in choices)
            position = float(value)
        except ValueError:
            return None
        if len(numbers) < 3:
            return None
        return "lower" if position == numbers[0] else "upper" if position == numbers[-1] else None
    low, high, position = dimension.low, dimension.high, float(value)
    if dimension.log:
        low, high, position = math.log(low), math.log(high), math.log(position)
    place = (position - low) / (high - low)
    return "lower" if place < EDGE else "upper" if place > 1 - EDGE else None
