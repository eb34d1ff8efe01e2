"""WikiText by the published protocols, so that a figure stands beside the one it is compared with.

Each protocol turns the rows of a split into sequences, windows over them, and divisors:

hf_guide    Hugging Face, "Perplexity of fixed-length models". All rows, empty ones too, joined by
            "\\n\\n"; one sequence, no token before it, so that its first is not predicted. Windows
            of C ids begin every S ids and end with the text at the latest; of what is new in one,
            trg ids, the id that has nothing before it in its window is not predicted: with S = C
            that is C - 1 of C, with S < C all of them but in the first window. perplexity is
            exp(sum of (trg - 1) mean / sum of (trg - 1)) over the windows' mean nats, the guide's
            own weights, which take one from every window. Earlier versions of the guide weighted by
            trg, or not at all, and printed 16.45 where it now has 16.44.
lm_eval     lm-evaluation-harness, task `wikitext` version 2. Pages as EleutherAI/
            wikitext_document_level has them, each by itself after one prefix token (BOS where the
            tokenizer has one, else EOS), the text detokenised. It is encoded with the special
            tokens that the tokenizer adds by itself, as HFLM.tok_encode does: where it puts BOS in
            front, that BOS follows the prefix token and is predicted, too. Windows of C predictions
            do not overlap but for a page's last one, whose context reaches back. Words, the pieces
            between runs of white space, and bytes are of the page before detokenisation:
            exp(nats / words), exp(nats / bytes).
gpt2_paper  Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 3.1:
            invertible de-tokenisers, and nats per unit of the original text. The paper says no
            more, so this is like it, not it. Our choices: `detokenise` for the lines that come back
            by `retokenise`, the others as they are; lines joined by "\\n" into one sequence after
            one end-of-text token (BOS where the tokenizer puts it in front, as
            `harness.evaluation.prefix` has it); the windows of `harness.evaluation.sliding_window`;
            words are white-space tokens plus one a line for its end, as WikiText counts itself
            (245,569 in its test set). The paper's figures are of the text with <unk>:
            data.config_name=wikitext-2-v1.

evaluate.prefix is of `documents` alone: a protocol says itself what its text follows.

Legend: C context, S stride, in tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.data import hub
from harness.evaluation import prefix, sliding_window
from harness.evaluation.probes import PADDED
from harness.evaluation.sliding_window import Window


@dataclass(frozen=True)
class Text:
    """A split as a protocol reads it: what is predicted from what, and what divides the nats."""

    sequences: list[NDArray[np.int64]]  # with the token before the text, where there is one
    windows: list[Window]  # inputs [start, end) of a sequence; targets are one further on
    weights: NDArray[np.float64] | None  # of the windows' means; None: of every token alike
    facts: dict[str, Any]  # name, headline, joiner, bos, context, stride, num_words, num_bytes

    def ids(self, w: Window) -> NDArray[np.int64]:
        """The inputs of a window and one id more, its last target."""
        return self.sequences[w.document][w.start : w.end + 1]


def read(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Text | None:
    """The test split of the run's data by `evaluate.protocol`; None for `documents`.

    Raises:
        ConfigError: no such split, or nothing in it to predict.
    """
    name = run.evaluate.protocol
    if name == "documents":
        return None
    rows = hub.raw_rows(run.data, "test")
    context = run.evaluation_context
    stride = run.evaluate.stride or context
    text = PROTOCOLS[name](rows, tokenizer, context, stride)
    if not text.windows:
        raise ConfigError(f"evaluate.protocol={name}: the test split has no token to predict")
    return text


# --------------------------------------------------------------------------- Hugging Face's guide


def hf_guide(
    rows: list[str], tokenizer: PreTrainedTokenizerBase, context: int, stride: int
) -> Text:
    """One text, windows on a grid, the first token of each not predicted."""
    joined = "\n\n".join(rows)
    # As the guide calls it: with the special tokens that a tokenizer adds; GPT-2's adds none.
    ids = tokenizer(joined, return_attention_mask=False, verbose=False)["input_ids"]
    windows, weights = [], []
    for begin, end, new in grid(len(ids), context, stride):
        if scored := min(new, end - begin - 1):  # none in a window of one id, where the guide
            windows.append(Window(0, begin, end - 1, scored))  # divides 0 by 0
            weights.append(new - 1)
    facts = {
        "name": "hf_guide",
        "headline": "perplexity",
        "joiner": "\n\n",
        "bos": bool(tokenizer("")["input_ids"]),
        "context": context,
        "stride": stride,
        "num_words": sum(len(row.split()) for row in rows),
        "num_bytes": len(joined.encode()),
    }
    return Text([np.array(ids)], windows, np.array(weights, float), facts)


def grid(n: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, new): ids [begin, end) of n, of which the last `new` were in none before."""
    windows, done = [], 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        windows.append((begin, end, end - done))
        done = end
        if end == n:
            break
    return windows


# --------------------------------------------------------------------------- lm-evaluation-harness


def lm_eval(rows: list[str], tokenizer: PreTrainedTokenizerBase, context: int, stride: int) -> Text:
    """Pages, detokenised, each after the prefix token; divided by what the page was before."""
    raw_pages = pages(rows)
    # HFLM's prefix_token_id.
    first = tokenizer.bos_token_id
    if first is None:
        first = tokenizer.eos_token_id
    begin = str(tokenizer.decode([first]))
    texts = [detokenise_as_lm_eval(page) for page in raw_pages]
    sequences = [
        np.array([first, *_ids(tokenizer, text, special=not text.startswith(begin))])
        for text in texts
    ]
    facts = {
        "name": "lm_eval",
        "headline": "word_perplexity",
        "joiner": None,
        "bos": True,
        "context": context,
        "stride": stride,
        "num_words": sum(len(re.split(r"\s+", page)) for page in raw_pages),
        "num_bytes": sum(len(page.encode()) for page in raw_pages),
    }
    lengths = [len(sequence) - 1 for sequence in sequences]
    return Text(sequences, list(sliding_window.windows(lengths, context, stride)), None, facts)


def pages(rows: list[str]) -> list[str]:
    """Rows to pages, each from its title (= Title =) to the next, as in the file that they were.

    There an empty row was a space; what comes before the first title is a page if it has text.
    """
    lines = [row.removesuffix("\n") or " " for row in rows] + [""]
    whole_pages: list[str] = []
    page: list[str] = []
    for line in lines:
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if (text := "\n".join(page)).strip():
                whole_pages.append(text)
            page = []
        page.append(line)
    return [*whole_pages, "\n".join(page)]


_AS_LM_EVAL = [
    ("s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),  # never met, and kept: the figures are of this function
    *((f" @{sign}@ ", sign) for sign in ("-", ",")),
    (r" @\.@ ", "."),
    *((re.escape(f" {sign} "), f"{sign} ") for sign in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    *(("= " * (n - 1) + "=", "=" * n) for n in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenise_as_lm_eval(page: str) -> str:
    """What `wikitext_detokenizer` of lm-eval's task makes of a page."""
    for pattern, replacement in _AS_LM_EVAL:
        page = re.sub(pattern, replacement, page)
    return page


# --------------------------------------------------------------------------- like the GPT-2 paper


def gpt2_paper(
    rows: list[str], tokenizer: PreTrainedTokenizerBase, context: int, stride: int
) -> Text:
    """One text of detokenised lines after an end-of-text token; divided by the original words."""
    lines, kept = [], 0
    for row in rows:
        line = row.removesuffix("\n").strip(" ")
        plain = detokenise(line)
        comes_back = retokenise(plain) == line
        lines.append(plain if comes_back else line)
        kept += not comes_back
    sequence = np.array([prefix.find(tokenizer).id, *_ids(tokenizer, "\n".join(lines))])
    facts = {
        "name": "gpt2_paper",
        "headline": "word_perplexity",
        "joiner": "\n",
        "bos": True,
        "context": context,
        "stride": stride,
        "num_words": sum(len(row.split()) + 1 for row in rows),
        "num_bytes": sum(len(row.encode()) for row in rows),
        "lines_kept": kept,  # that do not come back, and are left as they are
    }
    windows = list(sliding_window.windows([len(sequence) - 1], context, stride))
    return Text([sequence], windows, None, facts)


OPENING = ("(", "[", "$", "£", "€")
CLOSING = (".", ",", ";", ":", "!", "?", ")", "]", "%")
CLITICS = ("'s", "'t", "'re", "'ve", "'ll", "'d", "'m")
INFIX = {"@-@": "-", "@,@": ",", "@.@": "."}
# What keeps its full stop: initials (J., U.S.) and the titles and short forms that WikiText does.
ABBREVIATION = re.compile(
    r"[A-Z]|[A-Za-z](\.[A-Za-z])+|Mr|Mrs|Ms|Dr|St|Jr|Sr|No|vs|Lt|Col|Gen|Capt|Co|Sgt|Mt|Ft|Prof|Rev"
    r"|Bros|Inc|Ltd|Maj|Cpl|Gov|Sen|Rep|Adm|Op"
)
# @-@ between words, @,@ and @.@ between numbers, any of which may be unknown.
HYPHEN = re.compile(r"(?<=[\w>])-(?=[\w<])")
SEPARATOR = re.compile(r"(?:(?<=\d)|(?<=<unk>))([.,])(?=\d|<unk>)")


def detokenise(line: str) -> str:
    """A line of WikiText as it would be written: spaces before , after ( and around @-@ go.

    A space goes only where `_split` puts it back.
    """
    tokens = line.split(" ")
    chunks: list[list[str]] = []  # of tokens that are written as one word
    quotes = position = 0
    while position < len(tokens):
        token, last = tokens[position], chunks[-1] if chunks else None
        opens = last is not None and (
            last[-1] in OPENING or (last[-1] == '"' and quotes % 2 == 1) or last[-1] == token == "="
        )
        closes = token in CLOSING or token in CLITICS or (token == '"' and quotes % 2 == 1)
        grown = [token]
        if token in INFIX and position + 1 < len(tokens):
            grown, closes = [token, tokens[position + 1]], True
        if last is not None and (opens or closes) and _splits_into([*last, *grown]):
            last += grown
        else:
            grown = [token]
            chunks.append(grown)
        quotes += grown.count('"')
        position += len(grown)
    return " ".join(map(_written, chunks))


def retokenise(line: str) -> str:
    """The inverse of `detokenise`, for every line that it can be told of."""
    return " ".join(" ".join(_split(chunk)) for chunk in line.split(" "))


def _written(tokens: list[str]) -> str:
    return "".join([tokens[0], *(INFIX.get(token, token) for token in tokens[1:])])


def _splits_into(tokens: list[str]) -> bool:
    return _split(_written(tokens)) == tokens


def _split(chunk: str) -> list[str]:
    """A word with its punctuation as tokens."""
    if chunk.strip("=") == "":
        return list(chunk) or [""]
    head: list[str] = []
    tail: list[str] = []
    while len(chunk) > 1 and chunk[0] in (*OPENING, '"'):
        head.append(chunk[0])
        chunk = chunk[1:]
    while len(chunk) > 1 and chunk.strip("."):  # an ellipsis is one token
        end = next((c for c in CLITICS if chunk.endswith(c) and chunk != c), chunk[-1])
        if end not in (*CLOSING, *CLITICS, '"'):
            break
        if end == "." and ABBREVIATION.fullmatch(chunk[:-1]):
            break
        tail.insert(0, end)
        chunk = chunk[: -len(end)]
    core = SEPARATOR.sub(r" @\1@ ", HYPHEN.sub(" @-@ ", chunk))
    return [*head, *core.split(" "), *tail]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text of any length, with the tokenizer's `special` tokens or nothing added."""
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


PROTOCOLS = {"hf_guide": hf_guide, "gpt2_paper": gpt2_paper, "lm_eval": lm_eval}


# --------------------------------------------------------------------------- nats and what they are


def measure(
    prepared: nn.Module,
    text: Text,
    *,
    batch_tokens: int,
    precision: str,
    batching: str = PADDED,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """The protocol's facts with nll_nats, num_tokens, perplexity, per word and per byte.

    `headline` names the figure that the protocol's source prints.
    """
    nll = sliding_window.window_nll(
        prepared,
        text.windows,
        text.ids,
        batch_tokens=batch_tokens,
        batching=batching,
        accelerator=accelerator,
    )
    count = np.array([w.scored for w in text.windows])
    total, num_tokens = float(nll.sum()), int(count.sum())
    mean = total / num_tokens
    if text.weights is not None and text.weights.sum():
        mean = float((text.weights * nll / count).sum() / text.weights.sum())
    words, size = text.facts["num_words"], text.facts["num_bytes"]
    return text.facts | {
        "dtype": precision,
        "nll_nats": total,
        "num_tokens": num_tokens,
        "perplexity": _exp(mean),
        "word_perplexity": _exp(total / words),
        "byte_perplexity": _exp(total / size),
        "bits_per_byte": total / math.log(2) / size,
    }


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
