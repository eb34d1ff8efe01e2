"""conf/PEFT.md is what the installed PEFT does here."""

import re

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft_types import MODELS, names, refusal, setting, table

from harness import methods
from harness.config.paths import CONF_DIR, REPOSITORY
from harness.models import linear, model_size, pretrained

PAGE = (CONF_DIR / "PEFT.md").read_text("utf-8")
ROWS = {
    name: {model: cells[model][name] for model in MODELS}
    for cells in [
        {
            model: {
                row[0]: row[1:]
                for line in PAGE.partition(f"## {model}\n")[2].partition("\n## ")[0].splitlines()
                if line.startswith("| ") and "---" not in line
                for row in [[cell.strip() for cell in line[2:-1].split(" | ")]]
            }
            for model in MODELS
        }
    ]
    for name in cells["GPT-2"]
    if name != "type"
}
of_this_peft = pytest.mark.skipif(
    f"PEFT {peft.__version__}," not in PAGE, reason="conf/PEFT.md is of another PEFT"
)


def test_the_table_is_of_the_peft_that_is_pinned():
    """Or else the tests below would be skipped in silence."""
    pinned = re.findall(r"^peft==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert re.findall(r"with PEFT (\S+),", PAGE) == pinned


@of_this_peft
def test_the_table_has_every_method():
    assert sorted(ROWS) == names() and len(ROWS) > 40


@of_this_peft
@pytest.mark.parametrize("name", ROWS)
def test_what_the_table_says_of_building_is_so(name):
    """The refusal, or the number of trainable parameters; `table` trains them, too, and is slow."""
    for model, (on, number, *_) in ROWS[name].items():
        if on.startswith("refused: "):
            assert on == f"refused: {refusal(name, model)}"
            continue
        run, config = setting(name, model)
        adapted = methods.adapt(pretrained.load_model(run, config), run)
        assert number == f"{model_size.count_parameters(adapted).trainable:,}", model
        assert (on == "nn.Linear") == linear.is_turned(adapted)


@pytest.mark.slow  # steps, exports and merges of 45 methods on two models
@of_this_peft
def test_the_table_is_true():
    assert table() == PAGE


@of_this_peft
def test_what_tuners_ask_of_a_training_loop_is_known():
    """A new hook of a tuner is to be looked at: whether it is called here, or refused."""
    words = ("loss", "allocate", "callback", "optimizer", "after_step", "on_step")
    found = {
        (tuner.__name__, name)
        for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values()
        for name in set(dir(tuner)) - set(dir(BaseTuner))
        if any(word in name.lower() for word in words)
    }
    assert found == {
        ("LoraModel", "_get_kasa_loss"),  # trained on
        ("LoraModel", "_get_monteclora_loss"),
        ("AdaLoraModel", "_get_kasa_loss"),
        ("AdaLoraModel", "_get_monteclora_loss"),
        ("AdaLoraModel", "update_and_allocate"),  # refused
        ("AdamssModel", "update_and_allocate"),
        ("CPTEmbedding", "calculate_loss"),
        ("ShadowModel", "shadow_auxiliary_loss"),
    }
