"""The token that every document follows: evaluate.prefix.

auto   BOS where the tokenizer itself puts it in front of a text (Llama, Gemma); else EOS
bos    BOS, as lm-evaluation-harness takes it wherever a tokenizer has one
eos    EOS, the end-of-text token
none   nothing: a document's first token is given, and not predicted

Where BOS and EOS are one token, as GPT-2's are, it is called eos. Training sees what evaluation
gives: with BOS its blocks are made of BOS, document, EOS, and otherwise of documents with one EOS
between them. A prompt (`harness.data.pairs`) follows BOS where there is one, and nothing otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from harness.config.errors import ConfigError


@dataclass(frozen=True)
class Prefix:
    """Holds the token that comes before every document, and its kind."""

    name: str  # bos | eos | none
    id: int | None  # None with `none`

    @property
    def begins(self) -> tuple[int, ...]:
        """Ids in front of every document of a training block, and of every prompt."""
        return (self.id,) if self.name == "bos" and self.id is not None else ()

    def recorded(self) -> dict[str, str | int | None]:
        """Return the prefix as result.json has it: its name and token id."""
        return {"name": self.name, "id": self.id}


def find(tokenizer: PreTrainedTokenizerBase, choice: str = "auto") -> Prefix:
    """The prefix by `evaluate.prefix`.

    Raises:
        ConfigError: BOS is asked for, and the tokenizer has none.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert isinstance(eos, int)
    if choice == "none":
        return Prefix("none", None)
    if choice == "auto":
        choice = "bos" if puts_bos(tokenizer) else "eos"
    if choice == "eos":
        return Prefix("eos", eos)
    if not isinstance(bos, int):
        raise ConfigError(
            "evaluate.prefix=bos: the tokenizer has no BOS token; set it to auto or eos, which is "
            f"{tokenizer.eos_token!r}"
        )
    return Prefix("eos" if bos == eos else "bos", bos)


def puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins an encoded text with its BOS token by itself."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos is not None and list(whole[:1]) == [bos] and list(plain[:1]) != [bos]
