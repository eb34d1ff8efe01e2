"""Keys that a method does not have, and settings under which nothing would be trained."""

import pytest

from harness.api import compose
from harness.config.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=full", "targets=attn"], r"trains every weight.*method\.train_only=\[qkv,o\]"),
        (["method=full", "targets=mlp"], r"method\.train_only=\[mlp_in,mlp_out\]"),  # no gate here
        (["method=full", "targets=all"], r"method\.train_only=\[matrices\]"),
        (["method=full", "targets.modules=[a.b]"], r"method\.train_only=\[a\.b\]"),
        (
            [
                "method=peft",
                "method.peft_type=PROMPT_TUNING",
                "targets=attn",
                "data.context_length=128",
            ],
            r"targets=attn: PROMPT_TUNING adapts no matrices",
        ),
        (["method=none", "targets=attn"], r"targets=attn: method=none .*leave it out"),
        (["method=none,full", "targets=attn"], r"targets=attn: method=none"),
    ],
)
def test_targets_of_a_method_that_adapts_none_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        compose(*overrides)


@pytest.mark.parametrize(
    ("overrides", "instead"),
    [
        (["method=lora"], "method=none, which says so"),
        (["method=full"], "method=none, which says so"),
        (["method=peft", "method.peft_type=IA3"], "method=none, which says so"),
        (["method=udv", "method.rank=4"], "method=truncate method.rank=4, which says so"),
        (["method=udv", "method.residual=keep"], "method=none, which says so"),
    ],
)
def test_a_method_that_would_train_for_no_steps_is_refused(overrides, instead):
    with pytest.raises(ConfigError, match=f"train.steps=0 with method=.*{instead}"):
        compose(*overrides, "train.steps=0")


def test_what_never_trains_may_have_no_steps():
    runs = compose("method=none,truncate", "train.steps=0")
    assert [run.method.name for run in runs] == ["none", "truncate"]


def test_a_sweep_leaves_out_a_key_for_the_methods_that_do_not_have_it(capsys):
    runs = compose("method=none,full,lora", "method.r=8,16", "targets=attn", "seed=0,1")
    found = [(run.method.name, getattr(run.method, "r", None), run.seed) for run in runs]
    lora = [("lora", r, seed) for r in (8, 16) for seed in (0, 1)]
    assert found == [("none", None, 0), ("full", None, 0), ("full", None, 1), *lora]
    assert all(run.targets.name == "attn" for run in runs if run.method.name == "lora")
    assert capsys.readouterr().err == (
        "left out for methods that have no such key: method.r (none, full); targets (none, full)\n"
    )


def test_an_experiment_takes_a_key_that_some_of_its_methods_have():
    runs = compose("experiment=smoke", "method.r=16")
    assert [getattr(run.method, "r", None) for run in runs] == [None, None, 16]


def test_a_key_that_no_method_of_the_sweep_has_is_a_mistake():
    with pytest.raises(ConfigError, match=r"method=none.*unknown key 'method\.r'"):
        compose("method=none,full", "method.r=8,16")


def test_the_program_says_what_it_leaves_out_of_a_sweep(harness):
    done = harness("-m", "method=none,lora", "method.r=8,0")
    assert done.returncode == 2 and "method.r=0: expected a rank of 1 or more" in done.stderr
    assert done.stdout == "left out for methods that have no such key: method.r (none)\n"


def test_the_program_refuses_targets_of_full_fine_tuning(harness, tmp_path):
    done = harness("method=full", "targets=attn")
    assert done.returncode == 2 and "error: targets=attn: method=full trains" in done.stderr
    assert not list(tmp_path.glob("outputs/*/*"))
