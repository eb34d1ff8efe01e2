"""What a run's model writes, beside what its base writes: for a quick look.

    harness generate outputs/main/RUN_NAME --prompt "In the beginning" --prompt "And he"
    harness generate outputs/main/RUN_NAME --greedy < prompts.txt       # a prompt a line

Both models continue the same prompt with the same draws; every prompt has the seed to itself. A
prompt that leaves no room for the continuation loses its beginning, and the output says so. The
base is loaded by itself: some methods (PiSSA, biases) change the base they are on. Exit status 2
for a mistake.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import torch
from accelerate.utils import set_seed
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import nn

from harness.config.errors import ConfigError
from harness.data import pairs, sequences
from harness.evaluation import prefix
from harness.methods import positions
from harness.models import pretrained
from harness.runs import finished_run
from harness.runs.finished_run import Saved
from harness.system.console import busy, quiet_command

TOP_K = 50  # tokens to sample from, transformers' own default


@dataclass(frozen=True)
class Decoding:
    """Holds the settings by which a prompt is continued: length, temperature, beams."""

    max_new_tokens: int = 60
    temperature: float | None = 0.8  # of sampling; None: the most likely token, or beams
    num_beams: int = 1
    seed: int = 0

    @property
    def label(self) -> str:
        """Describe the settings in a line for the terminal."""
        if self.temperature is not None:
            return f"temperature {self.temperature:g}, seed {self.seed}"
        return f"{self.num_beams} beams" if self.num_beams > 1 else "greedy"


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, ids: list[int], decoding: Decoding) -> str:
    """The text that `model` writes after the tokens `ids`, up to an end-of-text token."""
    device = next(model.parameters()).device
    prompt = torch.tensor([ids], device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature is not None:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": TOP_K}
    set_seed(decoding.seed)
    written = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    text: str = tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
    return text


def prompt_tokens(run: Saved, prompt: str, room: int | None) -> tuple[list[int], int]:
    """Tokens of a prompt, its last `room` ones, and how many are left out.

    For a run on prompts and completions it is written as those were, and ended; for one on
    conversations it is what the user says first. It follows BOS where the run's documents do
    (`harness.evaluation.prefix`); an empty prompt is else an end-of-text token.
    """
    data = run.run.data
    begins = prefix.find(run.tokenizer, run.run.evaluate.prefix).begins
    if data.source == "pairs" and "chat_template" in run.record["data"].get("rule", {}):
        pair = pairs.Pair("the prompt", prompt, [], (("user", prompt.strip()),))
        ids = sequences.prompt_ids(pair, run.tokenizer, begins, data.chat_template)
        dropped = max(0, len(ids) - room) if room is not None else 0
        return ids[dropped:], dropped
    if data.source == "pairs":
        ids = sequences.prompt_ids(
            pairs.Pair("the prompt", pairs.styled(prompt, data), []), run.tokenizer
        )
    else:
        ids = run.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids and not begins:
        ids = [run.tokenizer.eos_token_id]
    dropped = max(0, len(begins) + len(ids) - room) if room is not None else 0
    return [*begins, *ids[dropped:]], dropped


def room_for_prompt(run: Saved, decoding: Decoding) -> int | None:
    """Positions that the continuation leaves, or None where a model states no limit.

    Raises:
        ConfigError: none are left.
    """
    limit = pretrained.max_context(pretrained.load_config(run.run.model))
    if limit is None:
        return None
    limit -= positions.num_virtual_tokens(run.run)
    if decoding.max_new_tokens >= limit:
        raise ConfigError(
            f"--max-new-tokens={decoding.max_new_tokens} leaves no room for a prompt in the "
            f"{limit} tokens of {run.run.model.name}: at most {limit - 1}"
        )
    return limit - decoding.max_new_tokens


def side_by_side(run: Saved, decoding: Decoding, prompts: Iterator[str], console: Console) -> None:
    """Print every prompt with its continuations, as the prompts come.

    Raises:
        ConfigError: there is no prompt, or no room for one.
    """
    room = room_for_prompt(run, decoding)
    first = next(prompts, None)
    if first is None:
        raise ConfigError("no prompt: give --prompt, or a prompt a line on standard input")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    with busy("loading the models"):
        columns: dict[str, nn.Module] = {f"base: {run.run.model.name}": run.base()}
        if run.run.method.name != "none":
            columns[f"adapted: {run.name}"] = run.model()
        columns = {name: model.to(device) for name, model in columns.items()}
    for prompt in itertools.chain([first], prompts):
        ids, dropped = prompt_tokens(run, prompt, room)
        table = Table(box=rich.box.ROUNDED, expand=True)
        for name in columns:
            table.add_column(Text(name, overflow="fold"), ratio=1, overflow="fold")
        with busy("generating"):
            table.add_row(
                *(_text(continuation(m, run.tokenizer, ids, decoding)) for m in columns.values())
            )
        above: list[Any] = [_text(prompt, "bold")]
        if dropped:
            message = (
                f"{dropped} of {dropped + len(ids)} tokens of the prompt are left out at its start"
            )
            above.append(Text(message, "yellow"))
        console.print(Group(*above, table))
    console.print(f"{decoding.label}, at most {decoding.max_new_tokens} new tokens", style="dim")


def _text(written: str, style: str = "") -> Text:
    """What a terminal can show as it stands, without control sequences."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in written)
    return Text(shown, style)


def lines(stream: Any) -> Iterator[str]:
    """Read prompts from standard input, one a line, without empty lines."""
    if stream.isatty():
        print("a prompt a line; Ctrl-D ends", file=sys.stderr)
    for line in stream:
        if prompt := line.rstrip("\r\n"):
            yield prompt


def arguments_of(argv: list[str]) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(
        prog="harness generate",
        description="Continuations by a run's model and by its base, side by side.",
    )
    parser.add_argument("run_dir", type=Path, help="outputs/EXPERIMENT/RUN_NAME")
    parser.add_argument("--prompt", action="append", help="repeat it for several; else a line each")
    parser.add_argument("--max-new-tokens", type=int, default=60, metavar="N")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--temperature", type=float, help="of sampling (0.8)")
    how.add_argument("--greedy", action="store_true", help="the most likely token each time")
    how.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser.parse_args(argv)


def decoding_of(args: argparse.Namespace) -> Decoding:
    """What the command line asks for.

    Raises:
        ConfigError: a number out of range.
    """
    temperature = 0.8 if args.temperature is None else args.temperature
    for name, value, least in (
        ("--max-new-tokens", args.max_new_tokens, 1),
        ("--num-beams", args.num_beams, 1),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}={value}: expected {least} or more")
    if not 0 < temperature < float("inf"):
        raise ConfigError(
            f"--temperature={temperature}: expected a number above 0; --greedy takes the most "
            "likely token"
        )
    sampled = not args.greedy and args.num_beams == 1
    return Decoding(
        args.max_new_tokens, temperature if sampled else None, args.num_beams, args.seed
    )


@quiet_command
def main(argv: list[str]) -> int:
    """The command line; returns its exit status."""
    args = arguments_of(argv)
    console = Console()
    console = Console(width=max(console.width, 80))
    decoding = decoding_of(args)
    run = finished_run.load(args.run_dir)
    prompts = iter(args.prompt) if args.prompt else lines(sys.stdin)
    side_by_side(run, decoding, prompts, console)
    return 0
