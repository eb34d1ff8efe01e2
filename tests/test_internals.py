"""Private names of other libraries: all in one place, there in the installed releases, guarded."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace

import pytest
import transformers
from accelerate import Accelerator

from harness.config.paths import PACKAGE
from harness.system import internals
from harness.system.internals import INTERNALS, Internal, MissingInternalError

LIBRARIES = (
    "torch", "peft", "transformers", "accelerate", "hydra", "datasets", "tokenizers", "wandb",
    "wandb_workspaces", "huggingface_hub", "omegaconf", "multiprocessing", "evaluate",
)  # fmt: skip
# Attributes of torch's modules and argparse's parsers that have had these names for ten years.
KNOWN_ATTRIBUTES = {
    "_modules", "_parameters", "_buffers", "_actions", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks",
}  # fmt: skip
# Of objects, where they are used, each with a test that would notice.
AT_THEIR_PLACE = {
    "report/dashboard.py": {"_to_model", "_internal_name"},  # tests/test_dashboard.py
    "methods/udv/layer.py": {"_get_embed_scale", "_non_persistent_buffers_set"},
    "methods/udv/model.py": {"_replace_module"},
    "methods/lora_layer.py": {"_register_custom_module"},
    "methods/starts.py": {"_peft_loraga_grad"},  # tests/methods/test_starts.py
    "models/transformer_blocks.py": {"_no_split_modules"},
    "models/next_token.py": {"_attn_implementation"},
    "runs/flops.py": {
        "_overloadpacket", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    },
    "runs/mistakes.py": {"_get_root"},  # of OmegaConf's nodes
    "system/encodings.py": {"_is_text_encoding"},  # of the standard library's codecs
    "training/memory.py": {"_indices", "_values"},  # of tensors, also of those not coalesced
}  # fmt: skip


@pytest.mark.parametrize("one", INTERNALS, ids=lambda one: f"{one.module}.{one.name}")
def test_it_is_there(one):
    assert one.find() is not None


def test_what_is_gone_is_named_with_its_release_and_its_purpose():
    gone = Internal("peft", "peft.tuners._buffer_dict", "NoSuchDict", "frozen factors")
    with pytest.raises(MissingInternalError) as caught:
        gone.find()
    said = str(caught.value)
    assert re.fullmatch(
        r"peft \d[\w.]+ has no peft\.tuners\._buffer_dict\.NoSuchDict, used for frozen factors; "
        r"install the release that constraints\.txt names",
        said,
    )
    with pytest.raises(MissingInternalError, match=r"which is not installed, has no nowhere\.x"):
        Internal("no-such-package", "nowhere", "x", "nothing").find()


def test_an_accelerator_without_its_list_of_models_is_named():
    gone = pytest.raises(MissingInternalError, match=r"Accelerator\._models, used for evaluating")
    with gone, internals.prepared_models_kept(SimpleNamespace()):
        pass
    accelerator = Accelerator(cpu=True)
    with internals.prepared_models_kept(accelerator):
        accelerator._models.append("a model")
    assert "a model" not in accelerator._models


def test_attention_is_named_for_a_while_whatever_happens():
    config = transformers.GPT2Config(attn_implementation="eager")  # type: ignore[call-arg]
    with pytest.raises(KeyError), internals.attention_implementation(config, "sdpa"):
        assert config._attn_implementation == "sdpa"
        raise KeyError
    assert config._attn_implementation == "eager"


def private_imports(path):
    """(line, what) of every import of a private module or name of a library."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first in LIBRARIES and any(part.startswith("_") for part in rest):
                yield node.lineno, name


def own_names(tree):
    """Private names that a file of ours gives to functions, classes, fields and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            yield node.attr


OWN = {name for path in PACKAGE.rglob("*.py") for name in own_names(ast.parse(path.read_text()))}


def private_attributes(path):
    """(line, name) of every private attribute that is not one of our own."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        private = isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
        if private and node.attr not in OWN:
            yield node.lineno, node.attr


def test_no_other_module_reaches_into_a_library():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "system/internals.py":
            continue
        found += [(name, *one) for one in private_imports(path)]
        known = KNOWN_ATTRIBUTES | AT_THEIR_PLACE.get(name, set())
        found += [(name, *one) for one in private_attributes(path) if one[1] not in known]
    assert found == []
