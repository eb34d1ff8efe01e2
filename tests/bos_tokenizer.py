"""A tokenizer that puts a BOS in front of a text, as Llama's does."""

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from harness.config.paths import ASSETS_DIR


def with_bos(*, adds=True):
    """gpt2_mini's tokenizer with a BOS of its own, which it puts in front of a text as Llama's."""
    made = AutoTokenizer.from_pretrained(ASSETS_DIR / "gpt2_mini")
    made.bos_token = "~"
    if adds:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="~ $A", pair="~ $A ~ $B", special_tokens=[("~", made.bos_token_id)]
        )
    return made
