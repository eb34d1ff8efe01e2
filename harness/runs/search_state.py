"""Where a search of one space stands, from its study and its runs' directories alone.

Nothing is kept in the process: a controller that was killed, or a second one, reads the same and
does what is left. `Search.tasks` is asked under the search's lock, and trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.results import run_record
from harness.runs import halving, launcher
from harness.runs.grids import check
from harness.runs.search_limits import OBJECTIVES
from harness.runs.study import Candidate, Study

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
    rungs: tuple[int, ...]  # optimizer steps, the last one is the end
    eta: int
    objectives: tuple[str, ...]
    trials: int
    batch: int
    against: Callable[[RunConfig], str | None]  # why a run is no candidate, by its plan
    exhausted: bool = False
    _runs: dict[str, tuple[list[str], RunConfig]] = field(default_factory=dict)

    def tasks(self) -> list[Task]:
        """What is to train now; none when the search is over.

        Rungs that were reached are reported to the study, brackets that are decided are told, and
        the next ones proposed.

        Raises:
            ConfigError: a proposal cannot be, or is another run now than when it was proposed.
        """
        self.study.drop_unfinished()
        while True:
            candidates = self.study.candidates()
            bracket = [c for c in candidates if candidates and c.bracket == candidates[-1].bracket]
            undecided = any(c.state == "running" for c in bracket)
            if undecided and len(bracket) < bracket[0].size and not self.exhausted:
                self._ask(candidates, bracket[0].bracket, bracket[0].size)
            elif undecided:
                if going := self._decide(bracket):
                    return [self._task(candidate, step) for candidate, step in going]
            elif len(candidates) < self.trials and not self.exhausted:
                number = bracket[0].bracket + 1 if bracket else 0
                self._ask(candidates, number, min(self.batch, self.trials - len(candidates)))
            else:
                return []

    def _ask(self, candidates: Sequence[Candidate], bracket: int, size: int) -> None:
        names = {candidate.name: place for place, candidate in enumerate(candidates)}

        def judge(overrides: list[str]) -> tuple[str, str | None]:
            _, (run,), _ = check([overrides], self.compose)
            name = run.run_dir.name
            if name in names:
                return name, f"the same run as candidate {names[name]}"
            if why := self.against(run):
                return name, why
            self._runs[name] = (overrides, run)
            return name, None

        self.exhausted = not self.study.ask(judge, bracket=bracket, size=size)

    def _decide(self, bracket: list[Candidate]) -> list[tuple[Candidate, int]]:
        """Who of a bracket trains now, and to which step; if nobody does, all are told."""
        found = {}
        for candidate in bracket:
            found[candidate.number] = self.found(candidate)
            for step, nll in found[candidate.number].items():
                if math.isfinite(nll) and candidate.state == "running":
                    self.study.report(candidate, step, nll)
        going = halving.todo(found, self.rungs, self.eta)
        if going:
            return [(c, going[c.number]) for c in bracket if c.number in going]
        for candidate in bracket:
            if candidate.state == "running":
                nll = found[candidate.number].get(self.rungs[-1], math.inf)
                values = self._values(candidate, nll) if math.isfinite(nll) else None
                self.study.tell(candidate, values)
        return []

    def found(self, candidate: Candidate) -> dict[int, float]:
        """Validation nll at the rungs that a candidate has come to; infinite where it diverged."""
        found = reached(self.folder / candidate.name, self.rungs)
        return found | {step: nll for step, nll in candidate.at.items() if step in self.rungs}

    def _values(self, candidate: Candidate, nll: float) -> list[float]:
        record = run_record.read(self.folder / candidate.name) or {}
        values = [nll]
        for objective in self.objectives[1:]:
            value = run_record.get(record, OBJECTIVES[objective])
            if value is None:
                raise ConfigError(
                    f"hydra.sweeper.objectives: {candidate.name} has measured no {objective}"
                )
            values.append(float(value))
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

    def _task(self, candidate: Candidate, step: int) -> Task:
        overrides, run = self.run_of(candidate)
        if step == self.rungs[-1]:
            return Task(overrides, run)
        paused = replace(run, launch=replace(run.launch, pause_at=step))
        return Task([*overrides, f"{launcher.PAUSE}{step}"], paused)


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
    found = {}
    for rung in rungs:
        if status == "failed" and over and last <= rung and not _validated(rows, rung):
            found[rung] = math.inf
        elif over or paused >= rung or last > rung:
            found[rung] = lowest(rows, rung)
    return found


def _validated(rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any(row["step"] == step and "eval/validation/nll" in row for row in rows)


def lowest(rows: Sequence[Mapping[str, Any]], step: int) -> float:
    """The lowest validation nll up to `step`, before the first step only if there is no other."""
    read = {row["step"]: row["eval/validation/nll"] for row in rows if "eval/validation/nll" in row}
    after = [nll for at, nll in read.items() if 0 < at <= step] or [read.get(0)]
    return min((nll for nll in after if nll is not None), default=math.inf)
