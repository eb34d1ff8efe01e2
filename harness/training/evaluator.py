"""The held-out texts of a run: when they are read, and what the model is worth on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
from datasets import Dataset
from torch import nn

from harness.data import token_data
from harness.evaluation import sliding_window
from harness.evaluation.base_model import Unadapted
from harness.evaluation.sliding_window import Nats
from harness.results import run_record
from harness.system import atomic
from harness.training import memory
from harness.training.run_state import RunState


@dataclass(frozen=True)
class Evaluator:
    """The texts by split or name, how they are read, and the run that keeps what is found."""

    texts: dict[str, Dataset]
    further: list[str]  # names of those that the run's own data does not hold
    prepared: nn.Module  # a NextToken
    standing: RunState
    context: int
    stride: int
    bos: int | None  # what documents follow (`harness.evaluation.prefix`)
    batch_tokens: int
    batching: str  # of `probes.batching`
    unadapted: Unadapted | None = None  # gives the base, where the run does not start from it

    def nats(
        self,
        name: str,
        following: Callable[[], AbstractContextManager[None]] = nullcontext,
        prepared: nn.Module | None = None,
    ) -> Nats:
        """Nats and predicted tokens of every document of a text (`sliding_window.document_nll`).

        By the run's model, or by another one that is `prepared`.
        """
        joules_before = self.standing.meter.read()
        start = time.perf_counter()
        with self.standing.process.phase("evaluate"):
            nats = sliding_window.document_nll(
                prepared or self.prepared,
                self.texts[name],
                context=self.context,
                stride=self.stride,
                bos=self.bos,
                batch_tokens=self.batch_tokens,
                batching=self.batching,
                accelerator=self.standing.accelerator,
                following=following,
            )
        self.standing.state.evaluate_seconds += time.perf_counter() - start
        joules = self.standing.meter.read()
        if joules is not None and joules_before is not None:
            self.standing.state.evaluate_joules += joules - joules_before
        self.standing.state.evaluated_positions += self._positions(name)
        return nats

    def _positions(self, name: str) -> int:
        """Tokens of all windows of a text, with what shorter ones of a batch are filled up by."""
        shapes = sliding_window.batch_shapes(
            token_data.document_sizes(self.texts[name]),
            self.context,
            self.stride,
            self.batch_tokens,
            self.batching,
        )
        return sum(rows * width for rows, width in shapes)

    def validate(self) -> float:
        """Mean nats per validation token; the first two times memory is followed.

        That is before the first step, and again when the optimizer's state is there.
        """
        now = self.standing

        def following() -> AbstractContextManager[None]:
            averages = now.average.held() if now.average else ()
            return memory.measured(now.model, now.optimizer, now.at_evaluation, averages)

        first = now.state.validated <= 0
        now.newest = self.nats("validation", following if first else nullcontext)
        nll, num_tokens = now.newest
        if now.state.step == 0:
            quality = sliding_window.quality(nll, num_tokens, self.texts["validation"])
            now.quality["step0"] = {"validation": quality}
            if self.unadapted is None:
                now.quality["base"] = {"validation": quality}
        return float(nll.sum() / num_tokens.sum())

    def summarize(self, name: str, nats: Nats, when: str = "after") -> dict[str, Any]:
        """Quality on a text, and its table of nats per document in RUN_DIR."""
        documents, (nll, num_tokens) = self.texts[name], nats
        if self.standing.accelerator.is_main_process:
            table = pd.DataFrame({"id": documents["id"], "nll_nats": nll, "num_tokens": num_tokens})
            for column in ("num_words", "num_bytes"):
                table[column] = documents[column]
            # A prompt with all its completions is what is independent of others.
            table = table.groupby("id", sort=False, as_index=False).sum()
            path = self.standing.run_dir / run_record.documents_name(name, when)
            atomic.write_atomically(path, lambda scratch: table.to_parquet(scratch, index=False))
        return sliding_window.quality(nll, num_tokens, documents)

    def evaluate_base(self) -> None:
        """Quality of the base on the further texts, and on validation where step 0 is another."""
        now = self.standing
        if self.unadapted is None:
            for name in self.further:
                self._log(name, self._evaluate_extra(name, "before", self.nats(name)))
            return
        with self.unadapted() as base:
            nats = self.nats("validation", prepared=base)
            quality = sliding_window.quality(*nats, self.texts["validation"])
            now.quality["base"] = {"validation": quality}
            for name in self.further:
                self._evaluate_extra(name, "before", self.nats(name, prepared=base))
        for name in self.further if now.optimizer is not None else ():
            quality = sliding_window.quality(*self.nats(name), self.texts[name])
            now.quality["also"][name]["step0"] = quality
            self._log(name, quality)

    def evaluate_adapted(self) -> None:
        """Quality on the further texts after adaptation."""
        for name in self.further:
            self._log(name, self._evaluate_extra(name, "after", self.nats(name)))

    def _evaluate_extra(self, name: str, when: str, nats: Nats) -> dict[str, Any]:
        quality = self.summarize(name, nats, when)
        self.standing.quality["also"].setdefault(name, {})[when] = quality
        return quality

    def _log(self, name: str, quality: dict[str, Any]) -> None:
        state = self.standing.state
        nll = quality["nll_nats"] / quality["num_tokens"]
        row = {"step": state.step, "tokens": state.tokens, f"eval/{name}/nll": nll}
        self.standing.metrics.log(row)
