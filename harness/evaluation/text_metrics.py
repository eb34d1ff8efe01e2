"""Scores of generated text against several references, as the E2E NLG challenge defines them.

    harness score CANDIDATES.txt REFERENCES.txt

One candidate a line; references one a line, with an empty line between instances (the files of
github.com/tuetschek/e2e-metrics, whose `measure_scores.py -p` gives the published numbers):

bleu     Corpus BLEU-4, case-insensitive, on mteval-v13a's tokens: n-grams clipped by the maximum
         over references, the reference length closest to the candidate's (of two, the shorter), 0
         matches floored at 1e-15. That is sacrebleu -lc -tok 13a -s floor -sv 1e-15. e2e-metrics'
         pymteval gives the same where every candidate has three tokens; of a shorter one it counts
         -1 or -2 n-grams and calls an empty one a token: sacrebleu and mteval-v13a.pl count 0 (on
         E2E's test set, 0.01 BLEU less if one candidate in a hundred is empty, 0.4 if one in ten).
nist     NIST-5 (Doddington, HLT 2002) on the same tokens: information weights from all references
         of the corpus, n-grams clipped as for BLEU, brevity against the mean reference length.
         pymteval gives the same where every candidate has four tokens. (nltk takes n-grams and
         length of the one best reference, which is another number where there are several.)
meteor   METEOR 1.5 for English, of the corpus: its statistics are summed before the score.
rouge_l  Mean over instances of F with beta = 1.2 of the best precision and the best recall.
cider    Mean over instances of the clipped CIDEr with a length penalty, CIDEr-D in the paper;
         document frequencies are those of the references given: a part of them scores otherwise.

The last three are coco-caption's (by pycocoevalcap) on lower-case tokens of Stanford's PTBTokenizer
without punctuation. That tokenizer and METEOR are Java programs that pycocoevalcap ships.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from harness.config.errors import ConfigError
from harness.system.console import command

METRICS = {  # as result.json and as tables call them
    "bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr",
}  # fmt: skip
JAVA_SECONDS = 300.0  # without an answer, after which a Java process is taken for dead
NIST_ORDER = 5

Words = list[str]


@dataclass(frozen=True)
class Scores:
    """Scores by metric, and why others could not be computed here."""

    values: dict[str, float]  # bleu, meteor, rouge_l in per cent; nist and cider on their own scale
    skipped: dict[str, str]  # metric -> what is missing


class UnavailableError(Exception):
    """Something outside the texts is missing: a package, Java, memory."""


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """All METRICS of N candidates, each against one or more references; an empty one scores 0.

    Raises:
        ConfigError: no candidates, another number of instances, an instance without references, or
            what is not a string (a reference without a word), by its index.
    """
    _check(candidates, references)
    values: dict[str, float] = {}
    skipped: dict[str, str] = {}
    try:
        values |= _mteval(candidates, references)
    except UnavailableError as why:
        skipped |= dict.fromkeys(("bleu", "nist"), str(why))
    try:
        tokens = _ptb(candidates), _ptb_of_each(references)
        values |= _coco(*tokens)
    except UnavailableError as why:
        skipped |= dict.fromkeys(("meteor", "rouge_l", "cider"), str(why))
    else:
        try:
            values["meteor"] = 100 * _meteor(*tokens)
        except UnavailableError as why:
            skipped["meteor"] = str(why)
    return Scores({name: values[name] for name in METRICS if name in values}, skipped)


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not len(candidates):
        raise ConfigError("no candidates to score: expected one for each instance")
    if len(candidates) != len(references):
        raise ConfigError(
            f"{len(candidates)} candidates for the references of {len(references)} instances: "
            "expected one candidate for each"
        )
    for index, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        if not isinstance(candidate, str):
            raise ConfigError(f"candidates[{index}] is {candidate!r}: expected a string")
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ConfigError(f"references[{index}] is {texts!r}: expected a list of strings")
        if not texts:
            raise ConfigError(f"references[{index}] is empty: expected at least one reference")
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(
                    f"references[{index}][{number}] is {text!r}: expected a string with words"
                )


def _missing(error: ImportError) -> UnavailableError:
    package = (error.name or "").partition(".")[0]
    return UnavailableError(f"{package} is not installed: pip install 'peft-harness[nlg]'")


# --------------------------------------------------------------------------- BLEU and NIST


def _mteval(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as error:
        raise _missing(error) from error
    tokenizer = Tokenizer13a()

    def tokenize(text: str) -> str:
        # lower-cased after, not before: &AMP; is no entity to mteval
        return str(tokenizer(text.strip())).lower()

    outputs = [tokenize(text) for text in candidates]
    truths = [[tokenize(text) for text in texts] for texts in references]
    bleu = BLEU(tokenize="none", force=True, smooth_method="floor", smooth_value=1e-15)
    columns = [list(column) for column in itertools.zip_longest(*truths)]  # None: has fewer
    return {
        "bleu": float(bleu.corpus_score(outputs, columns).score),
        "nist": nist(
            [text.split() for text in outputs], [[text.split() for text in row] for row in truths]
        ),
    }


def _ngrams(words: Words) -> Counter[tuple[str, ...]]:
    orders = range(1, NIST_ORDER + 1)
    return Counter(tuple(words[i : i + n]) for n in orders for i in range(len(words) - n + 1))


def nist(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """NIST-5 of tokenised text (Doddington, HLT 2002, equation 3; clipped as mteval-v13a does).

    Info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn)) over all references, the count of the empty
    n-gram being their number of words.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    matched: list[Counter[tuple[str, ...]]] = []
    num_words = 0
    reference_length = 0.0
    for candidate, texts in zip(candidates, references, strict=True):
        reference_counts: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            ngrams = _ngrams(text)
            counts.update(ngrams)
            reference_counts |= ngrams
            num_words += len(text)
        reference_length += sum(map(len, texts)) / len(texts)
        matched.append(_ngrams(candidate) & reference_counts)
    counts[()] = num_words
    information = [0.0] * NIST_ORDER
    for hits in matched:
        for ngram, count in hits.items():
            information[len(ngram) - 1] += count * math.log2(counts[ngram[:-1]] / counts[ngram])
    totals = [sum(max(0, len(text) - n) for text in candidates) for n in range(NIST_ORDER)]
    if not totals[0] or not reference_length:
        return 0.0
    shortfall = min(1.0, totals[0] / reference_length)
    beta = math.log(0.5) / math.log(1.5) ** 2  # a candidate of two thirds the length keeps a half
    penalty = math.exp(beta * math.log(shortfall) ** 2)
    return penalty * sum(
        gain / max(total, 1) for gain, total in zip(information, totals, strict=True)
    )


# --------------------------------------------------------------------------- coco-caption


def _coco(candidates: list[str], references: list[list[str]]) -> dict[str, float]:
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise _missing(error) from error
    truths = dict(enumerate(references))
    outputs = {index: [text] for index, text in enumerate(candidates)}
    rouge, _ = Rouge().compute_score(truths, outputs)
    cider = 0.0  # of nothing but punctuation, on which the scorer trips
    if any(map(any, references)):
        cider, _ = Cider().compute_score(truths, outputs)
    return {"rouge_l": 100 * float(rouge), "cider": float(cider)}


def _ptb(texts: Sequence[str]) -> list[str]:
    """Texts as space-separated PTB tokens in lower case, without punctuation."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise _missing(error) from error
    lines = [" ".join(text.splitlines()) for text in texts]  # Java has as many kinds of line ends
    folder = Path(ptbtokenizer.__file__).parent
    with _java(
        "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines", "-lowerCase", folder=folder,
    ) as process:  # fmt: skip
        with _watched(process):
            output, _ = process.communicate("\n".join(lines) + "\n")
        if process.returncode:
            raise EOFError
    tokenized = output.split("\n")[:-1]
    if len(tokenized) != len(lines):
        raise UnavailableError(f"PTBTokenizer gave {len(tokenized)} lines for {len(lines)}")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(w for w in line.split(" ") if w not in dropped) for line in tokenized]


def _ptb_of_each(references: Sequence[Sequence[str]]) -> list[list[str]]:
    tokens = iter(_ptb([text for texts in references for text in texts]))
    return [list(itertools.islice(tokens, len(texts))) for texts in references]


def _meteor(candidates: list[str], references: list[list[str]]) -> float:
    try:
        from pycocoevalcap.meteor import meteor
    except ImportError as error:
        raise _missing(error) from error

    package = Path(meteor.__file__).parent
    with _plain_path(package) as plain, _java(
        "-Xmx1G", "-XX:+UseSerialGC",  # 0.6 GB resident, where pycocoevalcap's -Xmx2G takes 1.4
        "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm",
        "-a", str(plain / "data" / "paraphrase-en.gz"),  # the default, by another path
        folder=package,
    ) as process:  # fmt: skip
        commands, lines = process.stdin, process.stdout
        assert commands is not None and lines is not None

        def ask(command: str, *fields: str) -> str:
            commands.write(" ||| ".join((command, *fields)) + "\n")
            commands.flush()
            return answer()

        def answer() -> str:
            if not (line := lines.readline()):
                raise EOFError
            return line.strip()

        statistics = []
        for candidate, texts in zip(candidates, references, strict=True):
            with _watched(process):
                fields = [text.replace("|||", "") for text in (*texts, candidate)]
                statistics.append(ask("SCORE", *fields))
        with _watched(process):
            answers = [ask("EVAL", *statistics), *(answer() for _ in candidates)]
    try:
        return float(answers[-1])  # after one for each instance, the corpus'
    except ValueError as error:
        raise UnavailableError(f"METEOR answered {answers[-1]!r}") from error


# --------------------------------------------------------------------------- Java


@contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """A path to `folder` of plain characters, which METEOR needs for its table of paraphrases.

    It reads the table by a URL and finds no path with a blank or whatever else a URL writes as %20.
    Such a folder gets a link, in a new folder of this user's own among the temporary ones, which is
    gone afterwards.

    Raises:
        UnavailableError: the folder for temporary files has such a path, too.
    """
    plain = re.compile(r"[\w./~-]*", re.ASCII)
    if plain.fullmatch(str(folder)):
        yield folder
        return
    places = [place for place in (tempfile.gettempdir(), "/tmp") if plain.fullmatch(place)]
    if not places:
        raise UnavailableError(f"METEOR does not run in {folder}: its path is not plain characters")
    with tempfile.TemporaryDirectory(prefix="peft-harness-", dir=places[0]) as scratch:
        link = Path(scratch, "package")
        link.symlink_to(folder, target_is_directory=True)
        yield link


@contextmanager
def _java(*arguments: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A Java process on pipes that never outlives the block, nor leaves a file.

    Raises:
        UnavailableError: there is no Java, or it died (EOFError in the block) of what it said last.
    """
    java = shutil.which("java")
    if java is None:
        raise UnavailableError("java is not on the PATH")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        try:
            process = subprocess.Popen(
                [java, "-Dfile.encoding=UTF-8", "-XX:-UsePerfData", *arguments],  # no hsperfdata
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,  # a file, for a pipe that nobody reads fills up
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise UnavailableError(f"java does not start: {error}") from error
        try:
            yield process
        except (EOFError, BrokenPipeError) as error:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            complaints.seek(0)
            raise UnavailableError(_why(process.poll(), complaints.read())) from error
        finally:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            process.wait()


@contextmanager
def _watched(process: subprocess.Popen[str]) -> Iterator[None]:
    timer = threading.Timer(JAVA_SECONDS, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _why(status: int | None, output: str) -> str:
    if status == -9:
        return f"java was killed: no answer for {JAVA_SECONDS:g} s, or the machine's memory is full"
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    errors = (line for line in lines if "Error" in line or "Exception" in line)
    return f"java ended with status {status}: {next(errors, lines[-1])}"


# --------------------------------------------------------------------------- command line


def read(candidates: Path, references: Path) -> tuple[list[str], list[list[str]]]:
    """The two files of e2e-metrics: a candidate a line, references with empty lines between."""
    outputs = _lines(candidates)
    truths: list[list[str]] = [[]]
    for line in _lines(references):
        if line:
            truths[-1].append(line)
        else:
            truths.append([])
    while len(truths) > 1 and not truths[-1]:
        del truths[-1]
    if len(truths) == 1 and len(outputs) > 1:  # no empty line: one reference an instance
        truths = [[text] for text in truths[0]]
    return outputs, truths


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    return lines if lines[-1] else lines[:-1]


@command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    if {"-h", "--help"} & set(arguments) or len(arguments) != 2:
        print(__doc__)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    scores = score(*read(*map(Path, arguments)))
    for name in METRICS:
        shown = f"{scores.values[name]:8.4f}" if name in scores.values else "       -"
        print(f"{name:8}{shown}  {scores.skipped.get(name, '')}".rstrip())
    return 0
