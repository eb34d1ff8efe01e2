"""Every count of the published tables, exactly, from the model objects on the meta device."""

import pytest

from harness.commands import count
from harness.models import model_size

SIZES = {  # layers, width, total
    "gpt2": (12, 768, 124_439_808),
    "gpt2_medium": (24, 1024, 354_823_168),
    "gpt2_large": (36, 1280, 774_030_080),
    "gpt2_xl": (48, 1600, 1_557_611_200),
}
LORA = {  # trainable on c_attn by rank; on q and v apart the same numbers
    "gpt2": {1: 36_864, 2: 73_728, 4: 147_456, 8: 294_912, 64: 2_359_296},
    "gpt2_medium": {1: 98_304, 2: 196_608, 4: 393_216, 8: 786_432, 64: 6_291_456},
    "gpt2_large": {1: 184_320, 2: 368_640, 4: 737_280, 8: 1_474_560, 64: 11_796_480},
    "gpt2_xl": {1: 307_200, 2: 614_400, 4: 1_228_800, 8: 2_457_600, 64: 19_660_800},
}


def trainable(*overrides):
    return model_size.count_parameters(count.adapted(list(overrides))[1]).trainable


LARGE = pytest.mark.slow  # a quarter of a minute each


@pytest.mark.parametrize(
    "size",
    [pytest.param(s, marks=LARGE) if s in ("gpt2_large", "gpt2_xl") else s for s in SIZES],
)
def test_lora_counts_are_the_published_ones(size):
    layers, width, total = SIZES[size]
    full = count.adapted([f"model={size}", "method=full"])[1]
    assert (
        model_size.count_parameters(full).total
        == total
        == trainable(f"model={size}", "method=full")
    )
    assert trainable(f"model={size}", "method=none") == 0
    for rank, published in LORA[size].items():
        for targets in ("c_attn", "qv"):
            got = trainable(
                f"model={size}", "method=lora", f"method.r={rank}", f"targets={targets}"
            )
            assert got == published
    r8 = [f"model={size}", "method=lora", "method.r=8"]
    assert trainable(*r8, "targets=all") == 16 * 8 * width * layers
    assert trainable(*r8, "targets=attn") == 6 * 8 * width * layers
    assert trainable(*r8, "targets=mlp") == 10 * 8 * width * layers


@pytest.mark.parametrize("size", SIZES)
def test_diagonals_count_as_lora_of_rank_one_at_full_rank(size):
    layers, width, _ = SIZES[size]
    d = [f"model={size}", "method=udv", "targets=all"]
    assert trainable(*d, "method.rank=64") == 4 * 64 * layers
    assert trainable(*d, "method.rank=full") == 4 * width * layers == LORA[size][1]
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    udv = sum(16 * (m + n + 1) for m, n in shapes) * layers
    assert trainable(*d, "method.rank=16", "method.train=udv") == udv
    assert trainable(f"model={size}", "method=truncate", "method.rank=16") == 0


def test_the_papers_lora_counts():
    assert trainable("model=gpt2_medium", "method=lora_paper") == 393_216
    assert trainable("model=gpt2_large", "method=lora_paper") == 737_280


def test_the_command_prints_total_trainable_and_modules(capsys):
    arguments = ["model=gpt2_medium", "method=lora", "method.r=4", "targets=qv"]
    assert count.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "trainable  393,216 (0.1107 %)" in shown and "total      355,216,384" in shown
    assert "c_attn.q.lora_A" in shown
    assert count.main(["--all", "method=lora", "method.r=1", "targets=c_attn"]) == 0
    shown = capsys.readouterr().out
    for size, (_, _, total) in SIZES.items():
        (row,) = [line for line in shown.splitlines() if line.split()[:1] == [size]]
        assert f"{total:,}" in row and f"{LORA[size][1]:,}" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=gpt3"], "model=gpt3: no such option"),
        (["model=gpt2", "method.r=769"], "a rank of 768 at most"),
        (["model=gpt2", "method=udv", "method.energy=0.9"], "method.energy: a count needs a rank"),
        (["model=gpt2", "method=udv", "method.rank=800"], "768"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(capsys, arguments, message):
    assert count.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
