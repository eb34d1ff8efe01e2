"""The two ends of gpt2_mini's recipe: its tokenizer before, the shipped folder after.

    python experiments/pretrain_gpt2_mini/build.py tokenizer
    python -m harness experiment=pretrain_gpt2_mini
    python experiments/pretrain_gpt2_mini/build.py package outputs/pretrain_gpt2_mini/pretrain

`make gpt2_mini` runs all three.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harness.config.paths import ASSETS_DIR, CONF_DIR
from harness.data import documents
from harness.results import run_record
from harness.runs.composition import from_hydra

ASSET = ASSETS_DIR / "gpt2_mini"
VOCABULARY = 4096
END = "<|endoftext|>"


def tokenizer() -> None:
    """Byte-level BPE, GPT-2's pre-tokenisation, trained on the training split of the docstrings."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        run = from_hydra(compose("config", ["experiment=pretrain_gpt2_mini"]))
    texts = [text for _, text in documents.read(run.data)["train"]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, model_max_length=256
    ).save_pretrained(ASSET)
    num_tokens = sum(len(e.ids) for e in bpe.encode_batch(texts))
    num_bytes = sum(len(t.encode()) for t in texts)
    print(f"{len(texts)} documents, {num_bytes} bytes, {num_tokens} tokens -> {ASSET}")


def package(run_dir: Path) -> None:
    """Turn a finished pretraining run into the shipped folder: half precision, card, record."""
    result = run_record.read(run_dir)
    if result is None or result["status"] != "finished":
        sys.exit(f"{run_dir} holds no finished run")
    weights = {
        k: v.half().contiguous() for k, v in load_file(run_dir / "model/model.safetensors").items()
    }
    save_file(weights, ASSET / "model.safetensors", metadata={"format": "pt"})
    (ASSET / "model.safetensors").chmod(0o644)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(run_dir / "model" / name, ASSET / name)
    (ASSET / "README.md").write_text(card(result), "utf-8")
    for name in ("result.json", "metrics.jsonl"):
        shutil.copy(run_dir / name, Path(__file__).parent / name)
    size = sum(f.stat().st_size for f in ASSET.iterdir())
    print(f"{ASSET}: {size / 1e6:.1f} MB")


def card(result: Mapping[str, Any]) -> str:
    """The model card, every figure of it from the run's own result."""
    quality, speed, where = result["quality"], result["speed"], result["environment"]
    validation, test, train = quality["validation"], quality["test"], result["config"]["train"]
    hardware, documents = where["hardware"], result["data"]["num_documents"]
    return f"""---
license: mit
language: en
pipeline_tag: text-generation
---

# gpt2_mini

A GPT-2 of 4 layers, width 256, 4 heads, context 256 and 4,096 byte-level BPE tokens:
{result["parameters"]["total"]:,} parameters, head tied to the embedding, stored in half precision.
It is the small base model of the harness's experiments and good for nothing else: it has read little
but documentation.

| | |
| --- | --- |
| corpus | docstrings of {len(result["config"]["data"]["packages"])} Python packages (conf/data/docstrings.yaml), deduplicated |
| documents | {documents["train"]:,} for training, {documents["validation"]} validation, {documents["test"]} test |
| tokens | {speed["tokens"]:,} in {speed["steps"]:,} steps of {train["batch_tokens"]:,} |
| optimizer | AdamW, peak rate {train["lr"]:g}, {train["schedule"]}, weight decay {train["weight_decay"]:g}, {train["precision"]} autocast |
| validation | {validation["nll_nats"] / validation["num_tokens"]:.4f} nats per token (perplexity {validation["perplexity"]:.2f}), {validation["bits_per_byte"]:.4f} bits per byte |
| test | {test["nll_nats"] / test["num_tokens"]:.4f} nats per token (perplexity {test["perplexity"]:.2f}), {test["bits_per_byte"]:.4f} bits per byte |
| hardware | {hardware["cores"]} cores of {hardware["cpu"]}, {speed["train_seconds"] / 60:.0f} minutes of training steps |
| commit | {where["commit"]} |
| versions | {", ".join(f"{k} {v}" for k, v in where["versions"].items())} |

Perplexities are those of the fp32 weights before they were rounded to half precision.

Made by `make gpt2_mini`; the run's record stands in experiments/pretrain_gpt2_mini.

## Licence

The weights and the tokenizer are the project's own (MIT). The corpus is not shipped: it is read from the
installed packages, whose docstrings stand under their own open licences (BSD, MIT, Apache-2.0, MPL-2.0
and the like).
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["tokenizer"]:
        tokenizer()
    elif sys.argv[1:2] == ["package"] and len(sys.argv) == 3:
        package(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
