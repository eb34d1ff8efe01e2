"""The two ends of gpt2_mini's recipe: its tokenizer before, the shipped folder after.

    python experiments/pretrain_gpt2_mini/build.py tokenizer
    python -m harness experiment=pretrain_gpt2_mini
    python experiments/pretrain_gpt2_mini/build.py package outputs/pretrain_gpt2_mini/pretrain

`make gpt2_mini` runs all three.
"""

from __future__ import annotations

import sys

from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harness import documents
from harness.config import ASSETS_DIR, CONF_DIR, from_hydra

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


if __name__ == "__main__":
    if sys.argv[1:] == ["tokenizer"]:
        tokenizer()
    else:
        sys.exit(__doc__)
