"""Complete the prompts of a task's test split, and score the completions against its references."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
)

from harness.config.errors import ConfigError
from harness.config.schema import GenerateConfig
from harness.data import sequences
from harness.data.pairs import Pair
from harness.evaluation import probes, ranks, text_metrics
from harness.evaluation.probes import ONE_ROW, ONE_WIDTH, PADDED
from harness.system.atomic import write_atomically
from harness.system.machine import out_of_memory

FILE_NAME = "generations.jsonl"


@dataclass(frozen=True)
class Completed:
    """The completions of some prompts, in their order."""

    texts: list[str]
    num_tokens: int  # of the completions, their end-of-text tokens included
    seconds: float  # wall time of all batches, on the slowest rank


def check(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    todo: list[Pair],
    cfg: GenerateConfig,
    accelerator: Accelerator,
    limit: int | None,
    begins: tuple[int, ...] = (),
    chat_template: str = "auto",
) -> str:
    """Which prompts may share a batch, as `probes.batching` has it for documents.

    Found before training. `limit` is the positions that the model has for tokens, `begins`
    what a prompt follows (`harness.evaluation.prefix`), `chat_template` is data.chat_template.

    Raises:
        ConfigError: a prompt or the model cannot be completed.
    """
    prompts = [sequences.prompt_ids(pair, tokenizer, begins, chat_template) for pair in todo]
    longest = max(map(len, prompts))
    if limit is not None and longest + cfg.max_new_tokens > limit:
        raise ConfigError(
            f"evaluate.generate.max_new_tokens={cfg.max_new_tokens}: the longest prompt is "
            f"{longest} tokens and the model has {limit} positions: set it to {limit - longest} or "
            "less"
        )
    try:
        short = replace(cfg, max_new_tokens=2)
        complete(
            model,
            tokenizer,
            todo[:2],
            short,
            accelerator,
            begins=begins,
            chat_template=chat_template,
        )
        return _batching(model, tokenizer, prompts, cfg)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        if out_of_memory(error):  # a failure of another class
            raise
        kind = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
        raise ConfigError(
            f"evaluate.generate: {kind} cannot complete prompts ({error}); set it to null"
        ) from error


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    todo: list[Pair],
    cfg: GenerateConfig,
    accelerator: Accelerator,
    batching: str = PADDED,
    begins: tuple[int, ...] = (),
    chat_template: str = "auto",
) -> Completed:
    """Beam search for every prompt, `cfg.batch` of like length at a time; ranks share the work.

    `batching` is what `check` found: which prompts may share a batch.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    prompts = [sequences.prompt_ids(pair, tokenizer, begins, chat_template) for pair in todo]
    stops = sequences.stops(todo, tokenizer, chat_template)
    order = sorted(range(len(todo)), key=lambda i: (-len(prompts[i]), i))[rank::world]
    was_training = model.training
    model.eval()
    completions: list[tuple[int, str, int]] = []
    start = time.perf_counter()
    first = 0
    with ranks.together(accelerator):
        while first < len(order):
            part = order[first : first + (1 if batching == ONE_ROW else cfg.batch)]
            if batching == ONE_WIDTH:
                part = [i for i in part if len(prompts[i]) == len(prompts[part[0]])]
            first += len(part)
            rows = _completions(model, stops, [prompts[i] for i in part], cfg, accelerator)
            for index, ids in zip(part, rows, strict=True):
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                completions.append((index, text, len(ids)))
    seconds = time.perf_counter() - start
    model.train(was_training)
    if world > 1:
        completions = gather_object(completions)
        seconds = max(gather_object([seconds]))
    completions.sort()
    return Completed(
        [text for _, text, _ in completions], sum(n for _, _, n in completions), seconds
    )


def _completions(
    model: Any,
    stops: tuple[int, ...],
    prompts: list[list[int]],
    cfg: GenerateConfig,
    accelerator: Accelerator,
) -> list[list[int]]:
    """Ids of the best completion of every prompt, up to the first of `stops` and with it."""
    end = stops[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
    given = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = GenerationConfig(
        num_beams=cfg.num_beams,
        length_penalty=cfg.length_penalty,
        max_new_tokens=cfg.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stops) if len(stops) > 1 else end,
        pad_token_id=end,
    )
    processors = LogitsProcessorList()
    if cfg.no_repeat_ngram:
        processors.append(_NoRepeat(cfg.no_repeat_ngram, width))
    # Widths differ from batch to batch: compiled blocks would be compiled again for each.
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        out = model.generate(
            input_ids=ids.to(accelerator.device),
            attention_mask=given.to(accelerator.device),
            generation_config=settings,
            logits_processor=processors,
        )
    rows = []
    for row in out[:, width:].tolist():
        over = [row.index(stop) for stop in stops if stop in row]
        rows.append(row[: min(over) + 1] if over else row)
    return rows


def _batching(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    cfg: GenerateConfig,
) -> str:
    """Which prompts may share a batch: from the logits after the shortest prompt.

    It is given alone, with a longer prompt beside it, and with other prompts of its own length.
    """
    prompts = sorted(prompts, key=len)
    short, long = prompts[0], prompts[-1]
    if cfg.batch == 1:
        return PADDED
    end, size = tokenizer.eos_token_id, len(tokenizer)
    assert isinstance(end, int)
    others = [[(token + 1 + size // n) % size for token in short] for n in (2, 3)]

    def after(rows: list[list[int]]) -> torch.Tensor:
        """(B, V) logits of the first new token of every row."""
        width = max(map(len, rows))
        device = next(model.parameters()).device
        ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
        given = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(
            input_ids=ids.to(device), attention_mask=given.to(device), max_new_tokens=1,
            do_sample=False, pad_token_id=end, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits: torch.Tensor = output.logits[0].float()
        return logits

    with probes.evaluating(model), probes.full_precision(model):
        alone = after([short])
        reacts = probes.Reaction.of_logits(model, alone, after([others[0]]))
        first, second = (after([short, other])[:1] for other in others)
        beside = after([short, long])[:1]
    if reacts.differs(first, second) or reacts.differs(first, alone):
        return ONE_ROW
    limit = probes.same_up_to(probes.config_of(model))
    apart = reacts.differs(beside, alone) is False and len(long) + cfg.max_new_tokens <= limit
    return PADDED if apart or len(short) == len(long) else ONE_WIDTH


class _NoRepeat(LogitsProcessor):
    """No n-gram twice in a completion: what stands in the prompt may be said once more."""

    def __init__(self, size: int, prompt_width: int) -> None:
        self._inner = NoRepeatNGramLogitsProcessor(size)
        self._width = prompt_width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self._inner(input_ids[:, self._width :], scores)


def scored(todo: list[Pair], completed: Completed, run_dir: Path) -> dict[str, Any]:
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr, and why one is missing; writes generations.jsonl."""
    rows = [
        {"id": pair.id, "prompt": pair.prompt, "completion": text, "references": pair.completions}
        for pair, text in zip(todo, completed.texts, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(run_dir / FILE_NAME, lines)
    scores = text_metrics.score(completed.texts, [pair.completions for pair in todo])
    return {
        **scores.values,
        "skipped": scores.skipped,
        "num_prompts": len(todo),
        "num_tokens": completed.num_tokens,
        "seconds": completed.seconds,
        "tokens_per_second": completed.num_tokens / completed.seconds,
    }
