"""Files of conf/method that are PEFT's methods with defaults of their own: `method=loha`."""

import pytest
from omegaconf import OmegaConf
from peft.tuners.boft.layer import get_fbd_cuda

from harness import compose, methods
from harness.config import naming
from harness.config.errors import ConfigError
from harness.config.paths import CONF_DIR
from harness.models import model_size, pretrained

# gpt2_mini: (n, m) of every matrix y = W x of a layer; q, k and v apart for those that name them.
WIDTH, LAYERS = 256, 4
ALL = [(256, 768), (256, 256), (256, 1024), (1024, 256)]
APART = [(256, 256), (256, 256)]
COUNTS = {  # trainable per m x n matrix, by the papers' own definitions, as conf/README.md has it
    "loha": lambda n, m: 2 * 8 * (m + n),
    "oft": lambda n, m: n * (32 - 1) // 2,
    "boft": lambda n, m: n * 4 + m,
    "hra": lambda n, m: 8 * n,
    "c3a": lambda n, m: m * n // 64,
    "miss": lambda n, m: 8 * m,
    "vera": lambda n, m: m + 256,
    "fourierft": lambda n, m: 1000,
}
IN_ALL = {
    "ia3": LAYERS * (256 + 256 + 1024),  # keys, values, inputs of the MLP's last matrix
    "prefix_tuning": 2 * 16 * LAYERS * WIDTH,
    "prompt_tuning": 16 * WIDTH,
    "ln_tuning": (2 * LAYERS + 1) * 2 * WIDTH,
}
FILES = sorted(
    path.stem
    for path in (CONF_DIR / "method").glob("*.yaml")
    if path.stem != "peft" and "peft_type" in path.read_text("utf-8")
)


def composed(*overrides):
    prompts = any("tuning" in text.lower() and "ln_" not in text.lower() for text in overrides)
    short = ["data.context_length=128"] if prompts else []
    (run,) = compose(*overrides, *short)
    return run


def test_there_is_a_file_for_every_common_method():
    assert {*COUNTS, *IN_ALL, "lokr", "randlora", "p_tuning"} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_method_works_in_one_word(name):
    """Its parameters are as many as its paper says; it is the run that method=peft spells out."""
    run = composed(f"method={name}")
    model = methods.check(pretrained.on_meta(run, pretrained.load_config(run.model)), run)
    found = model_size.count_parameters(model).trainable
    if name in COUNTS:
        apart = run.targets.name == "qv"
        expected = sum(COUNTS[name](n, m) for n, m in (APART if apart else ALL)) * LAYERS
        assert found == expected
    assert found == IN_ALL.get(name, found) > 0
    described = OmegaConf.load(CONF_DIR / "method" / f"{name}.yaml")
    described = described.get("method", described)
    given = (described.get("fields") or {}).items()
    fields = [f"+method.fields.{key}={value}" for key, value in given]
    targets = [] if run.targets.name == "all" else [f"targets={run.targets.name}"]
    same = composed("method=peft", f"method.peft_type={described.peft_type}", *fields, *targets)
    assert naming.identity(same) == naming.identity(run)


def test_other_targets_and_fields_can_be_asked_for():
    run = composed("method=ia3", "targets=mlp")
    assert run.targets.name == "mlp"
    assert composed("method=loha", "method.fields.r=4").method.fields["r"] == 4


def test_a_sweep_leaves_targets_out_for_what_adapts_no_matrices(capsys):
    runs = compose("method=lora,ln_tuning", "targets=attn,mlp")
    assert sorted(naming.label(run.method) for run in runs) == ["ln_tuning", "lora", "lora"]
    said = "left out for methods that have no such key: targets (ln_tuning)\n"
    assert capsys.readouterr().err == said


def test_butterflies_that_peft_does_not_make_are_refused():
    """Without its CUDA extension PEFT makes one of any number, and warns of it at most."""
    if get_fbd_cuda() is not None:
        pytest.skip("PEFT's CUDA extension is built here")
    run = composed("method=boft", "method.fields.boft_n_butterfly_factor=2")
    with pytest.raises(ConfigError, match="boft_n_butterfly_factor=2: PEFT makes 1 of it here"):
        methods.check(pretrained.on_meta(run, pretrained.load_config(run.model)), run)
