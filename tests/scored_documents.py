"""Random documents, a rank that scores its share of them, and nats by transformers' own loss."""

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from harness.config.paths import ASSETS_DIR


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, 64, n).tolist() for n in lengths]
    return Dataset.from_dict(
        {
            "id": [str(i) for i in range(len(lengths))],
            "tokens": tokens,
            "num_words": [max(1, n // 2) for n in lengths],
            "num_bytes": [3 * n + 1 for n in lengths],
        }
    ).with_format("numpy")


class Rank:
    """Of two ranks one, as the evaluation sees it."""

    num_processes = 2

    def __init__(self, index):
        self.process_index = index

    def reduce(self, values, _):
        return values


def nats(model, texts, ids):
    """Nats of documents by transformers' own loss, window by window, 32 of context."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini")
    sums = []
    for name in ids:
        tokens = [tokenizer.eos_token_id, *tokenizer(texts[name])["input_ids"]]
        total = 0.0
        for scored in range(1, len(tokens), 32):  # windows that do not overlap, but for the last
            end = min(scored + 32, len(tokens))
            window = torch.tensor([tokens[max(0, end - 33) : end]])
            labels = window.clone()
            labels[0, : window.shape[1] - (end - scored)] = -100
            with torch.no_grad():
                total += model(input_ids=window, labels=labels).loss.item() * (end - scored)
        sums.append(total)
    return sums
