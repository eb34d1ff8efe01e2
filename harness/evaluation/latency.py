"""How fast models generate and score, measured in turn in one process: seconds, and times the base.

Generation is greedy, of exactly so many new tokens after a prompt of random tokens, by the model's
own `generate` with a cache of keys and values where it keeps one. Scoring is the nats of as many
tokens as a prompt has (`harness.models.loss`), as evaluation reads them. Every repeat measures each
model once, beginning with another one each time, and is compared within itself: what slows the
machine down for a while slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from scipy import special
from torch import nn
from transformers import GenerationConfig

from harness.config.errors import ConfigError
from harness.config.schema import LatencyConfig
from harness.models.next_token import FAILED, NextToken
from harness.system.machine import out_of_memory

BASE = "base"  # of the models, to which the others are compared
COVERED = 0.95  # of an interval of the median


def check(model: Any, cfg: LatencyConfig, room: int | None) -> None:
    """Refuse what cannot be measured, before training; `room` is the model's positions for tokens.

    Raises:
        ConfigError: prompt and new tokens do not fit, or the model cannot generate.
    """
    num_tokens = cfg.prompt_tokens + cfg.new_tokens
    if room is not None and num_tokens > room:
        raise ConfigError(
            f"evaluate.latency: prompt_tokens={cfg.prompt_tokens} and new_tokens="
            f"{cfg.new_tokens} are {num_tokens} tokens, and the model has {room} positions: take "
            f"{room} or fewer together"
        )
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            generated(model.eval(), _prompts(model, 1, 2), 2)
    except (*FAILED, AssertionError) as error:
        if out_of_memory(error):
            raise
        kind = type(_bare(model)).__name__
        raise ConfigError(
            f"evaluate.latency: {kind} cannot generate ({error}); set it to false"
        ) from error
    finally:
        model.train(was_training)


def measure(models: Mapping[str, nn.Module], cfg: LatencyConfig, bf16: bool) -> dict[str, Any]:
    """Tokens a second of `models` by name, BASE among them, and seconds times those of BASE.

    `bf16` computes under autocast, as training and evaluation did.
    """
    device = next(models[BASE].parameters()).device
    speeds: dict[str, Any] = {"generate": {}, "score": {}}
    scorers = {name: NextToken(model.eval()) for name, model in models.items()}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for size in cfg.batch_sizes:
            ids = _prompts(models[BASE], size, cfg.prompt_tokens, _invocation(models.values()))

            def generating(model: nn.Module, ids: torch.Tensor = ids) -> Callable[[], Any]:
                return lambda: generated(model, ids, cfg.new_tokens)

            def scoring(scorer: nn.Module, ids: torch.Tensor = ids) -> Callable[[], Any]:
                return lambda: scorer(ids, ids).nats.sum().item()

            by = {name: generating(model) for name, model in models.items()}
            cached = {name: _keeps_cache(models[name], by[name]) for name in by}
            timed = _compared(_in_turn(by, cfg.repeats, device), size * cfg.new_tokens)
            speeds["generate"][f"batch_{size}"] = {
                name: timed[name] | {"kv_cache": cached[name]} for name in by
            }
            by = {name: scoring(scorer) for name, scorer in scorers.items()}
            speeds["score"][f"batch_{size}"] = _compared(
                _in_turn(by, cfg.repeats, device), size * cfg.prompt_tokens
            )
    return speeds


def generated(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """`ids` (B, T) with exactly `new_tokens` greedy tokens after each row, (B, T + new_tokens)."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=0,
    )
    mask = torch.ones_like(ids)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        out: torch.Tensor = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings
        )
    assert out.shape[1] == ids.shape[1] + new_tokens, "generation has ended early"
    return out


def _invocation(models: Iterable[nn.Module]) -> list[int]:
    """The tokens from which on an adapter acts (aLoRA); none of an adapter that always does."""
    configs = [model.active_peft_config for model in models if isinstance(model, PeftModel)]
    invocations = (getattr(config, "alora_invocation_tokens", None) for config in configs)
    return next((list(tokens) for tokens in invocations if tokens), [])


def _prompts(model: Any, size: int, length: int, first: Sequence[int] = ()) -> torch.Tensor:
    """(size, length) tokens drawn evenly from the vocabulary, the same in every call.

    They begin with `first`, as far as there is room.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = _bare(model).get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (size, length), generator=generator)
    for place, token in enumerate(first[:length]):
        ids[:, place] = token
    return ids.to(next(model.parameters()).device)


def _bare(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _keeps_cache(model: nn.Module, generate: Callable[[], Any]) -> bool:
    """Whether a later forward pass is given the newest token alone; this also warms the model up.

    It is seen in what the model is given, since a model may ignore `use_cache`.
    """
    widths = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        widths.append(next(tensor.shape[1] for tensor in given if tensor is not None))

    handle = _bare(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate()
    finally:
        handle.remove()
    return widths[-1] == 1


def _in_turn(
    by: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every repeat by name; who comes first changes from repeat to repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in by}
    for run in by.values():  # untimed: kernels are chosen, memory is found
        run()
    names = list(by)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            with _timed(seconds[name], device):
                by[name]()
    return seconds


@contextmanager
def _timed(seconds: list[float], device: torch.device) -> Iterator[None]:
    """Add the wall time of the body, with all that it has started on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    yield
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds.append(time.perf_counter() - start)


def _compared(seconds: Mapping[str, list[float]], num_tokens: int) -> dict[str, dict[str, Any]]:
    """Of every model its seconds, tokens a second at their median, and times those of BASE."""
    compared = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[BASE], strict=True)]
        low, high = median_interval(ratios) if name != BASE else (None, None)
        compared[name] = {
            "seconds": values,
            "tokens_per_second": num_tokens / statistics.median(values),
            "times_base": statistics.median(ratios),
            "times_base_low": low,
            "times_base_high": high,
        }
    return compared


def median_interval(values: list[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of the median by order statistics; (None, None) of fewer than 6 values.

    The interval from the j-th lowest to the j-th highest of n holds the median with probability
    1 - 2 P(Binomial(n, 1/2) < j), whatever the distribution.
    """
    n, ordered = len(values), sorted(values)
    fits = [j for j in range(1, n // 2 + 1) if 1 - 2 * special.bdtr(j - 1, n, 0.5) >= COVERED]
    if not fits:
        return None, None
    return ordered[fits[-1] - 1], ordered[-fits[-1]]
