"""Published perplexities of GPT-2 on WikiText-2 beside what this code measures.

    harness verify                     # every row whose weights are at hand, or can be
    harness verify --only gpt2         # one size; the option may be given several times
    harness verify --raw FILE.txt      # the raw test set from a file (wiki.test.raw)
    harness verify --tokenised FILE.txt   # the one with <unk> (wiki.test.tokens)

Weights and text come from the hub, or from its cache on this machine where it cannot be reached.
gpt2 takes about 10 minutes a row on 2 cores, gpt2-large more than an hour, a GPU much less.
Exit status 0 where all that was measured agrees, 1 where something does not, 2 where nothing could
be measured. Rows without a tolerance are for comparison: their source leaves much open.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import rich.box
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from harness.config.errors import ConfigError
from harness.config.paths import CONF_DIR
from harness.config.run_config import RunConfig
from harness.runs import composition
from harness.system import network
from harness.system.console import quiet_command

CONTEXT = 1024
RAW, TOKENISED = "wikitext-2-raw-v1", "wikitext-2-v1"
GUIDE = "Hugging Face, Perplexity of fixed-length models"
ISSUE = "huggingface/transformers issue 13761"
PAPER = "Radford et al. 2019, table 3"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """A figure in print, of the test set of WikiText-2 with a context of 1,024 tokens."""

    model: str  # an option of conf/model
    protocol: str  # of harness.evaluation.protocols
    stride: int
    figure: float
    tolerance: float | None  # rounding of the figure, and of fp32 sums; None: for comparison
    source: str
    text: str = RAW

    @property
    def name(self) -> str:
        """The row in messages."""
        return f"{self.model} {self.protocol} stride {self.stride}"


PUBLISHED = (
    Published("gpt2", "hf_guide", 1024, 29.94, 0.01, ISSUE),
    Published("gpt2", "lm_eval", 1024, 37.37, 0.01, ISSUE),
    Published("gpt2", "gpt2_paper", 1024, 29.41, None, PAPER, TOKENISED),
    Published("gpt2_medium", "gpt2_paper", 1024, 22.76, None, PAPER, TOKENISED),
    Published("gpt2_large", "hf_guide", 1024, 19.44, 0.01, GUIDE),
    Published("gpt2_large", "hf_guide", 512, 16.44, 0.01, GUIDE),
    Published("gpt2_large", "gpt2_paper", 1024, 19.93, None, PAPER, TOKENISED),
    Published("gpt2_xl", "gpt2_paper", 1024, 18.34, None, PAPER, TOKENISED),
)
MODELS = tuple(dict.fromkeys(row.model for row in PUBLISHED))


def run_of(row: Published, file: str | None) -> RunConfig:
    """The configuration of a row; the text from `file`, or else from the hub."""
    overrides = [
        f"model={row.model}", "method=none", f"data.context_length={CONTEXT}",
        "train.micro_batch=2",
        f"evaluate={row.protocol}", f"evaluate.stride={row.stride}",
    ]  # fmt: skip
    if file is None:
        overrides += ["data=wikitext2", f"data.config_name={row.text}"]
    else:
        quoted = file.replace("\\", "\\\\").replace("'", "\\'")
        overrides += ["data=text_files", f"data.path='{quoted}'"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return composition.from_hydra(compose("config", overrides))


@dataclass(frozen=True)
class Measured:
    """What became of a row: a figure, or why there is none."""

    row: Published
    figure: float | None = None
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Measured less published."""
        return None if self.figure is None else self.figure - self.row.figure

    @property
    def agrees(self) -> bool | None:
        """Within the row's tolerance; None where it has none or nothing was measured."""
        if self.difference is None or self.row.tolerance is None:
            return None
        return abs(self.difference) <= self.row.tolerance


def without_weights(model: str) -> str | None:
    """The hub id of a model that neither the hub nor its cache on this machine can give."""
    from huggingface_hub import constants, try_to_load_from_cache
    from omegaconf import OmegaConf

    if not constants.is_offline_mode():
        return None
    known = OmegaConf.load(CONF_DIR / "model" / f"{model}.yaml")
    hub_id, revision = str(known.id), known.revision
    paths = (try_to_load_from_cache(hub_id, name, revision=revision) for name in WEIGHTS)
    return None if any(isinstance(path, str) for path in paths) else hub_id


def measure(rows: list[Published], files: dict[str, str | None]) -> Iterator[Measured]:
    """The rows of one model, each as it is done; its weights are loaded once there is a text."""
    import datasets
    import torch
    import transformers
    from accelerate import Accelerator

    from harness.evaluation import protocols, sliding_window
    from harness.models import pretrained as models
    from harness.models.next_token import NextToken
    from harness.results import environment

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    torch.set_num_threads(environment.usable_cores())
    predicts = None
    for row in rows:
        try:
            run = run_of(row, files[row.text])
            model_config = models.load_config(run.model)
            text = protocols.read(run, models.load_tokenizer(run.model, model_config))
            assert text is not None
            if predicts is None:
                model = models.load_model(run, model_config).to(accelerator.device)
                predicts = NextToken(model)
        except ConfigError as error:
            yield Measured(row, reason=str(error))
            continue
        print(f"{row.name}: {len(text.windows)} windows", file=sys.stderr, flush=True)
        size = sliding_window.batch_tokens(model_config)
        scores = protocols.measure(predicts, text, batch_tokens=size, precision="fp32")
        yield Measured(row, scores[scores["headline"]])


def show(measured: list[Measured]) -> None:
    """The table, and below it why rows are missing."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "protocol"):
        table.add_column(heading, no_wrap=True)
    for heading in ("stride", "published", "measured", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("", "source"):
        table.add_column(heading, no_wrap=True)
    verdicts = {True: "agrees", False: "DIFFERS", None: ""}
    for m in measured:
        verdict = verdicts[m.agrees]
        if m.row.tolerance is not None and verdict:
            verdict += f" ({m.row.tolerance:g})"
        table.add_row(
            m.row.model, m.row.protocol, str(m.row.stride), f"{m.row.figure:.2f}",
            "-" if m.figure is None else f"{m.figure:.4f}",
            "-" if m.difference is None else f"{m.difference:+.4f}",
            verdict, m.row.source,
        )  # fmt: skip
    console = Console()
    Console(width=max(console.width, 140)).print(table)
    for reason in dict.fromkeys(m.reason for m in measured if m.reason):
        names = ", ".join(m.row.name for m in measured if m.reason == reason)
        print(f"not measured: {names}: {reason}")


@quiet_command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        "harness verify",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=MODELS, help="a model; may be repeated")
    parser.add_argument("--raw", metavar="FILE", help="raw test set, a .txt file")
    parser.add_argument("--tokenised", metavar="FILE", help="test set with <unk>, a .txt file")
    args = parser.parse_args(arguments)
    files = {RAW: args.raw, TOKENISED: args.tokenised}
    for row in PUBLISHED:
        run_of(row, files[row.text])
    network.go_offline_if_unreachable()
    measured: list[Measured] = []
    models = list(dict.fromkeys(args.only or MODELS))
    missing = {model: hub_id for model in models if (hub_id := without_weights(model))}
    reason = (
        f"no weights of {', '.join(missing.values())} in the local hub cache, and the hub is out "
        "of reach"
    )
    for model in models:
        rows = [row for row in PUBLISHED if row.model == model]
        if model in missing:
            measured += [Measured(row, reason=reason) for row in rows]
        else:
            measured += measure(rows, files)
    if all(m.figure is None for m in measured):
        reasons = "; ".join(dict.fromkeys(m.reason for m in measured))
        print(f"error: nothing to compare: {reasons}", file=sys.stderr)
        return 2
    show(measured)
    return 1 if any(m.agrees is False for m in measured) else 0
