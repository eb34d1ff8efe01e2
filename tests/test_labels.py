"""What tables call models, texts, targets and methods is what they are."""

import pytest

from harness.config import labels, naming
from harness.config.errors import ConfigError
from harness.results import run_record

LLAMA = ["model.asset=null", "+model.architecture={model_type: llama}"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=gpt2"], "did you mean model=gpt2?"),
        (["model=gpt2", "model.name=gpt2_mini"], "model=gpt2: did you mean model=gpt2_mini?"),
        (["data.name=docstrings"], "this is data=kjv: did you mean data=docstrings?"),
        (["targets=mlp", "targets.name=attn"], "this is targets=mlp: did you mean targets=attn?"),
        (["method.label=full"], "this is method=lora: did you mean method=full?"),
        (["method.label=pissa"], "did you mean method=pissa?"),
        (["method=pissa", "method.label=lora"], "did you mean method=lora?"),
        (["method=udv", "method.label=truncate"], "did you mean method=truncate?"),
    ],
)  # fmt: skip
def test_a_label_that_names_another_option_is_refused(make_run, overrides, said):
    with pytest.raises(ConfigError) as error:
        make_run(*overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "model", "targets", "method"),
    [
        ([], "gpt2_mini", "all", "lora"),
        (["targets=c_attn"], "gpt2_mini", "c_attn", "lora"),
        (["model=gpt2", "targets=qv"], "gpt2", "qv", "lora"),
        (["model=gpt2_mini_init"], "gpt2_mini_init", "all", "lora"),
        (["model=hub", "model.id=a/b"], "a/b", "all", "lora"),
        (["model=gpt2", "model.id=a/b", "targets=mlp"], "a/b", "mlp", "lora"),
        ([*LLAMA, "targets=attn"], "llama", "attn", "lora"),
        (["model.name=mine", "method.label=ours"], "mine", "all", "ours"),
        (["targets.modules=[mlp.c_fc]"], "gpt2_mini", "c_fc", "lora"),
        (["targets.modules=[attn.c_attn,mlp.c_fc]"], "gpt2_mini", "attn.c_attn+mlp.c_fc", "lora"),
        (["targets.roles=[q,mlp_in]"], "gpt2_mini", "attn.c_attn.q+mlp.c_fc", "lora"),
        (["targets.name=mine", "targets.modules=[mlp.c_fc]"], "gpt2_mini", "mine", "lora"),
        (["method=lora_paper", "method.r=8"], "gpt2_mini", "qv", "lora_paper"),
        (["method=mica"], "gpt2_mini", "all", "mica"),
    ],
)
def test_a_record_is_labelled_by_what_was_used(
    make_run, tmp_path, overrides, model, targets, method
):
    run = make_run(*overrides)
    described = run_record.describe(run, tmp_path)
    assert described["model"]["name"] == model and described["method"]["targets"] == targets
    assert naming.label(run.method) == described["method"]["label"] == method


def test_a_model_and_a_text_of_ones_own_have_the_names_of_their_files(make_run, tmp_path):
    folder = tmp_path / "my_model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "notes.txt").write_text("one|two|three")
    text = ["data=text_files", "data.document_separator='|'"]
    run = make_run("model=local", f"model.path={folder}", *text, f"data.path={tmp_path}/notes.txt")
    assert labels.of_model(run.model) == "my_model"
    assert labels.of_text(run.data) == "notes.txt"
    other = make_run(*text, f"data.path={tmp_path}/*.txt")
    assert labels.of_text(other.data) == "*.txt"
    pairs = "".join(f"name[{i}]||{i} is a place.\n" for i in range(20))
    (tmp_path / "pairs.txt").write_text(pairs)
    task = make_run("data=e2e_nlg", f"data.path={tmp_path}/pairs.txt", "data.id=null")
    assert labels.of_text(task.data) == "e2e_nlg"
