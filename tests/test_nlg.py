"""Scores of generated text against the definitions, other libraries and published examples."""

import math
import os
import random
import shutil
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from harness.config.errors import ConfigError
from harness.evaluation import text_metrics

pytest.importorskip("sacrebleu")
coco = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs java")


def tokens(text):
    """mteval-v13a's, of texts whose punctuation stands apart already."""
    return text.lower().split()


WORDS = tokens("the a blue spice is cheap pub near river it 's £20 , . family-friendly 5 out of")
E2E = [  # as E2E has them: references of several lengths, one to four an instance
    (
        "Blue Spice is a coffee shop in the city centre.",
        [
            "A coffee shop in the city centre area called Blue Spice.",
            "Blue Spice is a coffee shop in city centre.",
            "There is a coffee shop, Blue Spice; it's in the city centre, near nothing at all.",
        ],
    ),
    (
        "The Cricketers is a cheap, family-friendly pub near Café Sicilia (£20-25).",
        ["Near Café Sicilia there is a cheap pub, The Cricketers. Prices are £20-25."],
    ),
    (
        "Cocum has a customer rating of 5 out of 5 .",
        [
            "Cocum is rated 5 out of 5.",
            "Customers give Cocum 5 out of 5, the highest rating there is.",
            "Rated 5/5, Cocum isn't a place to miss.",
            "Cocum.",
        ],
    ),
    ("Giraffe is a restaurant by the river .", ["Giraffe is a pub.", "By the river is Giraffe."]),
]
CANDIDATES = [candidate for candidate, _ in E2E]
REFERENCES = [texts for _, texts in E2E]


def sentences(generator, count):
    lengths = [generator.randint(4, 18) for _ in range(count)]
    return [" ".join(generator.choices(WORDS, k=length)) for length in lengths]


def corpus(seed, instances=12):
    """Random candidates that share words and phrases with one to five random references."""
    generator = random.Random(seed)
    references = [sentences(generator, generator.randint(1, 5)) for _ in range(instances)]
    candidates = []
    for texts in references:
        words = generator.choice(texts).split()
        cut = generator.randint(0, len(words))
        candidates.append(" ".join(words[:cut] + sentences(generator, 1)[0].split()))
    return candidates, references


# ------------------------------------------------------------- BLEU and NIST by their definitions


def count(words, gram):
    return sum(tuple(words[i : i + len(gram)]) == gram for i in range(len(words)))


def grams(words, n):
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def bleu_by_definition(candidates, references):
    """Papineni et al. (2002), equations 1 to 4, in fractions; closest reference length."""
    precisions = []
    for n in range(1, 5):
        hits = total = 0
        for candidate, texts in zip(candidates, references, strict=True):
            for gram in grams(candidate, n):
                hits += min(count(candidate, gram), max(count(text, gram) for text in texts))
            total += max(0, len(candidate) - n + 1)
        precisions.append(Fraction(hits, total))
    c = sum(map(len, candidates))
    r = 0
    for candidate, texts in zip(candidates, references, strict=True):
        r += min((abs(len(text) - len(candidate)), len(text)) for text in texts)[1]
    if not all(precisions):
        return 0.0
    brevity = 1.0 if c > r else math.exp(1 - r / c)
    return 100 * brevity * math.exp(sum(math.log(p) for p in precisions) / 4)


def bleu_of_pymteval(candidates, references):
    """e2e-metrics' counting: a candidate of L tokens has L - n + 1 n-grams, below zero too."""
    hits, totals = [0] * 4, [0] * 4
    reference_length = 0
    for candidate, texts in zip(candidates, references, strict=True):
        for n in range(1, 5):
            totals[n - 1] += len(candidate) - n + 1
            hits[n - 1] += sum(
                min(count(candidate, gram), max(count(text, gram) for text in texts))
                for gram in grams(candidate, n)
            )
        closest = min(texts, key=lambda text: (abs(len(text) - len(candidate)), len(text)))
        reference_length += len(closest)
    brevity = 1.0 if totals[0] > reference_length else math.exp(1 - reference_length / totals[0])
    logs = sum(math.log(max(h, 1e-15) / t) for h, t in zip(hits, totals, strict=True)) / 4
    return 100 * brevity * math.exp(logs)


def nist_by_definition(candidates, references):
    """Doddington (2002), equations 2 and 3, counted text by text."""
    every = [text for texts in references for text in texts]

    def occurrences(gram):
        return sum(count(text, gram) for text in every) if gram else sum(map(len, every))

    score = 0.0
    for n in range(1, 6):
        gained = total = 0.0
        for candidate, texts in zip(candidates, references, strict=True):
            for gram in grams(candidate, n):
                hits = min(count(candidate, gram), max(count(text, gram) for text in texts))
                if hits:
                    gained += hits * math.log2(occurrences(gram[:-1]) / occurrences(gram))
            total += max(0, len(candidate) - n + 1)
        score += gained / total
    lengths = [sum(map(len, texts)) / len(texts) for texts in references]
    ratio = min(1, sum(map(len, candidates)) / sum(lengths))
    beta = math.log(0.5) / math.log(1.5) ** 2
    return score * math.exp(beta * math.log(ratio) ** 2)


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.mark.parametrize("seed", range(8))
def test_bleu_and_nist_are_those_of_the_definition(seed, without_java):
    candidates, references = corpus(seed)
    split = [tokens(text) for text in candidates], [list(map(tokens, row)) for row in references]
    found = text_metrics.score(candidates, references).values
    assert found["bleu"] == pytest.approx(bleu_by_definition(*split), rel=1e-9)
    assert found["nist"] == pytest.approx(nist_by_definition(*split), rel=1e-9)
    assert 0 < found["bleu"] < 100


@pytest.mark.parametrize("seed", range(3))
def test_bleu_is_that_of_e2e_metrics(seed, without_java):
    """To rounding where every candidate has three tokens, within 0.05 with one in 100 of two."""
    candidates, references = corpus(seed, instances=200)
    long = [(c, texts) for c, texts in zip(candidates, references, strict=True)
            if len(tokens(c)) >= 3]  # fmt: skip
    for made, tolerance in ((long, 1e-10), ([*long, ("A pub", ["A pub by the river ."])], 0.05)):
        candidates, references = zip(*made, strict=True)
        split = [tokens(text) for text in candidates], [list(map(tokens, r)) for r in references]
        assert text_metrics.score(candidates, references).values["bleu"] == pytest.approx(
            bleu_of_pymteval(*split), abs=tolerance
        )


def test_orders_and_case_do_not_matter_and_perfect_is_100(without_java):
    found = text_metrics.score(CANDIDATES, REFERENCES).values
    shuffled = [texts[::-1] for texts in REFERENCES[::-1]]
    again = text_metrics.score([text.upper() for text in CANDIDATES[::-1]], shuffled).values
    assert again == pytest.approx(found)
    best = text_metrics.score([texts[-1] for texts in REFERENCES], REFERENCES).values
    assert best["bleu"] == pytest.approx(100) and best["nist"] > found["nist"]
    some = text_metrics.score(["", *CANDIDATES[1:]], REFERENCES).values
    assert some["bleu"] < found["bleu"] and some["nist"] < found["nist"]
    nothing = text_metrics.score(["", ""], [["A pub."], ["A pub."]]).values
    assert nothing == {"bleu": 0, "nist": 0}


def test_brevity_counts_the_closest_reference_for_bleu_and_the_mean_for_nist(without_java):
    reference = list("abcdefghijkl")
    texts = [" ".join(reference), " ".join(reference[:9]), " ".join(reference[:5])]
    found = text_metrics.score([" ".join(reference[:7])], [texts]).values
    assert found["bleu"] == pytest.approx(100)  # of 5 and 9, as far from 7, the shorter
    found = text_metrics.score([" ".join(reference[:6])], [[texts[0], texts[1]]]).values
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 9 / 6))
    two_thirds = text_metrics.nist([reference[:8]], [[reference, reference]])
    full = text_metrics.nist([[*reference[:8], *"wxyz"]], [[reference, reference]])
    # eight words of twelve: half of what the same matches weigh without the brevity penalty
    info = math.log2(24 / 2)
    assert two_thirds == pytest.approx(info / 2)
    assert full == pytest.approx(info * 8 / 12)


def test_nist_is_nltks_where_there_is_one_reference():
    """nltk takes the one best reference, and so is right where there is only one."""
    nist_score = pytest.importorskip("nltk.translate.nist_score")
    candidates, references = corpus(3, instances=20)
    split = [text.split() for text in candidates]
    one = [[texts[0].split()] for texts in references]
    assert text_metrics.nist(split, one) == pytest.approx(nist_score.corpus_nist(one, split, n=5))
    several = [[text.split() for text in texts] for texts in references]
    assert text_metrics.nist(split, several) != pytest.approx(
        nist_score.corpus_nist(several, split, n=5)
    )


def test_published_example_of_bleu(without_java):
    """The example in sacrebleu's README, whose authors checked it against mteval-v13a.pl: 48.53."""
    first = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    second = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
    system = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    found = text_metrics.score(system, list(zip(first, second, strict=True)))
    assert found.values["bleu"] == pytest.approx(48.53, abs=0.005)


def test_clipping_as_in_the_paper():
    """Papineni et al. (2002), example 2: of seven times 'the' two count."""
    candidate = ["the"] * 7
    texts = [tokens("the cat is on the mat"), tokens("there is a cat on the mat")]
    weight = math.log2(13 / 3)
    assert text_metrics.nist([candidate], [texts]) == pytest.approx(weight * 2 / 7)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Prices: £20-25, i.e. cheap.", "prices : £20 - 25 , i . e . cheap ."),
        ("It's 4.5/5 at Café Ü", "it's 4.5 / 5 at café ü"),
        ("AT&amp;T (the &quot;pub&quot;)", 'at & t ( the " pub " )'),
        ("family-\nfriendly\npub", "familyfriendly pub"),
        ("1,000.50 well-known", "1,000.50 well-known"),
    ],
)
def test_tokens_are_those_of_mteval(text, expected, without_java):
    """A text and its tokens by mteval-v13a's rules, written out by hand, are the same text."""
    filler = " one two three four five"
    found = text_metrics.score([text + filler], [[expected + filler]]).values
    assert found["bleu"] == pytest.approx(100)


# ------------------------------------------------------------- coco-caption


def cider_by_definition(candidates, references):
    """CIDEr-D of Vedantam et al. (2015), equation 3 with its clipping, penalty and factor of 10."""

    def frequencies(text, n):
        return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))

    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        each = []
        for text in texts:
            for n in range(1, 5):

                def weigh(gram):
                    seen = sum(any(count(t, gram) for t in row) for row in references)
                    return math.log(len(references) / max(1, seen))

                a, b = frequencies(candidate, n), frequencies(text, n)
                va = {gram: k * weigh(gram) for gram, k in a.items()}
                vb = {gram: k * weigh(gram) for gram, k in b.items()}
                dot = sum(min(va[gram], vb.get(gram, 0)) * vb.get(gram, 0) for gram in va)
                norm = math.hypot(*va.values()) * math.hypot(*vb.values())
                penalty = math.exp(-((len(candidate) - len(text)) ** 2) / (2 * 6**2))
                each.append(10 * penalty * dot / norm if norm else 0)
        scores.append(sum(each) / len(each))
    return sum(scores) / len(scores)


def rouge_by_library(candidates, references):
    """Precision and recall by the rouge-score package, their best, and F with beta = 1.2."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    tokenizer = type("Split", (), {"tokenize": staticmethod(str.split)})()
    rouge = scorer.RougeScorer(["rougeL"], tokenizer=tokenizer)
    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        found = [rouge.score(text, candidate)["rougeL"] for text in texts]
        p, r = max(f.precision for f in found), max(f.recall for f in found)
        scores.append((1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p and r else 0)
    return 100 * sum(scores) / len(scores)


@pytest.fixture
def ptb_is_split(monkeypatch):
    """Texts of words already: no Java in the way of the two Python metrics."""
    monkeypatch.setattr(
        text_metrics, "_ptb", lambda texts: [" ".join(text.split()) for text in texts]
    )
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.mark.parametrize("seed", range(4))
def test_rouge_and_cider_are_those_of_the_definition(seed, ptb_is_split):
    candidates, references = corpus(seed)
    found = text_metrics.score(candidates, references)
    split = [text.split() for text in candidates], [[t.split() for t in row] for row in references]
    assert found.values["cider"] == pytest.approx(cider_by_definition(*split), rel=1e-6)
    assert found.values["rouge_l"] == pytest.approx(rouge_by_library(candidates, references))
    assert set(found.skipped) == {"meteor"}


def test_published_example_of_rouge(ptb_is_split):
    """Lin (2004), section 3.1: S2 and S3 against 'police killed the gunman' are 3/4 and 2/4."""
    reference = ["police killed the gunman"]
    for candidate, expected in (("police kill the gunman", 75), ("the gunman kill police", 50)):
        assert text_metrics.score([candidate], [reference]).values["rouge_l"] == pytest.approx(
            expected
        )


# ------------------------------------------------------------- with Java


def meteor_by_definition(*counts):
    """Denkowski and Lavie (2014), of (matches, words, reference words, chunks) that are summed.

    For words that only match exactly and are no function words; their parameters for English.
    """
    matches, words, reference_words, chunks = map(sum, zip(*counts, strict=True))
    precision, recall = matches / words, matches / reference_words
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    return 100 * mean * (1 - 0.6 * (chunks / matches) ** 0.2)


@needs_java
@pytest.mark.slow
def test_all_metrics_of_made_up_words_are_those_of_the_definitions(tmp_path, monkeypatch):
    """And Java leaves no process and no file, in the package's folder or in the temporary one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = Path(coco.__file__).parent.parent
    before = set(folder.rglob("*"))
    children = set(psutil.Process().children(recursive=True))

    candidates = ["zuqa vexo pliv trenk quob", "", "bliv zorp zorp mavu splonk grebt"]
    references = [
        ["drund grebt zuqa vexo pliv", "zuqa vexo pliv drund quob trunz"],
        ["drund grebt"],
        ["zorp bliv mavu splonk"],
    ]
    split = [tokens(text) for text in candidates], [list(map(tokens, row)) for row in references]
    found = text_metrics.score(candidates, references)
    assert not found.skipped and list(found.values) == list(text_metrics.METRICS)
    assert found.values["bleu"] == pytest.approx(bleu_by_definition(*split), abs=0.01)
    assert found.values["nist"] == pytest.approx(nist_by_definition(*split))
    assert found.values["cider"] == pytest.approx(cider_by_definition(*split))
    assert found.values["rouge_l"] == pytest.approx(rouge_by_library(candidates, references))
    expected = meteor_by_definition((4, 5, 6, 2), (0, 0, 2, 0), (4, 6, 4, 3))
    assert found.values["meteor"] == pytest.approx(expected)

    assert set(folder.rglob("*")) == before
    assert set(psutil.Process().children(recursive=True)) <= children
    assert not list(tmp_path.iterdir())


def test_a_path_with_a_blank_has_a_plain_one_for_as_long_as_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "data").write_text("here")
    with text_metrics._plain_path(folder) as plain:
        assert " " not in str(plain) and (plain / "data").read_text() == "here"
    assert not plain.exists() and (folder / "data").is_file() and len(list(tmp_path.iterdir())) == 1
    with text_metrics._plain_path(tmp_path) as plain:
        assert plain == tmp_path


@needs_java
@pytest.mark.slow
def test_meteor_is_the_same_from_a_path_with_a_blank(tmp_path, monkeypatch):
    """Its jar looks for its data by a URL, in which a blank is escaped, twice."""
    from pycocoevalcap.meteor import meteor

    there = text_metrics._meteor(["a b c d"], [["a b x d"]])
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "meteor").symlink_to(Path(meteor.__file__).parent)
    monkeypatch.setattr(meteor, "__file__", str(tmp_path / "a b" / "meteor" / "meteor.py"))
    assert text_metrics._meteor(["a b c d"], [["a b x d"]]) == there > 0


@needs_java
def test_ptb_tokens_are_those_of_pycocoevalcap():
    if not os.access(Path(coco.__file__).parent, os.W_OK):
        pytest.skip("pycocoevalcap's tokenizer writes into its own folder")
    expected = coco.PTBTokenizer().tokenize(
        {i: [{"caption": t} for t in texts] for i, texts in enumerate(REFERENCES)}
    )
    assert text_metrics._ptb_of_each(REFERENCES) == list(expected.values())
    found = text_metrics._ptb(["", "...", "a\u2028b\x0cc\rd\ne\x85f", "£20 Café 日本", "1 1/2", ""])
    assert found == ["", "", "a b c d e f", "# 20 café 日本", "1\u00a01/2", ""]


@needs_java
@pytest.mark.slow
def test_scores_are_those_of_pycocoevalcap_in_any_order():
    """Its own drivers of the two Java programs, in COCOEvalCap's order of things."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    tokenizer = coco.PTBTokenizer()
    truths = tokenizer.tokenize(
        {i: [{"caption": t} for t in texts] for i, texts in enumerate(REFERENCES)}
    )
    outputs = tokenizer.tokenize({i: [{"caption": t}] for i, t in enumerate(CANDIDATES)})
    found = text_metrics.score(CANDIDATES, REFERENCES).values
    scorers = {"meteor": (Meteor, 100), "rouge_l": (Rouge, 100), "cider": (Cider, 1)}
    for name, (scorer, scale) in scorers.items():
        expected = scale * scorer().compute_score(truths, outputs)[0]
        assert found[name] == pytest.approx(expected, rel=1e-12), name
    shuffled = [texts[::-1] for texts in REFERENCES[::-1]]
    again = text_metrics.score([text.upper() for text in CANDIDATES[::-1]], shuffled).values
    assert again == pytest.approx(found)


@needs_java
@pytest.mark.slow
def test_perfect_empty_and_odd_candidates():
    found = text_metrics.score(
        [texts[0] for texts in REFERENCES], [[texts[0]] for texts in REFERENCES]
    )
    for name, best in (("bleu", 100), ("meteor", 100), ("rouge_l", 100), ("cider", 10)):
        assert found.values[name] == pytest.approx(best), name
    nothing = text_metrics.score(
        ["", " "], [["A pub by the river."], ["A pub.", "It is a pub here."]]
    )
    assert (
        nothing.values == pytest.approx(dict.fromkeys(text_metrics.METRICS, 0))
        and not nothing.skipped
    )
    odd = ["...", "a\u2028b\x0cc\rd\ne", "|||", "日本 £ \ufffd \ud800 \U0001f600"]
    found = text_metrics.score(
        odd, [["a b c d e"], ["..."], ["x ||| y"], ["日本 £ \ufffd \U0001f600", "."]]
    )
    assert set(found.values) == set(text_metrics.METRICS) and not found.skipped
    assert all(math.isfinite(value) for value in found.values.values())


# ------------------------------------------------------------- what is missing


def test_without_java_the_rest_is_scored(without_java):
    found = text_metrics.score(CANDIDATES, REFERENCES)
    assert list(found.values) == ["bleu", "nist"]
    assert found.skipped == dict.fromkeys(("meteor", "rouge_l", "cider"), "java is not on the PATH")


@pytest.mark.parametrize(
    "package, metrics",
    [("sacrebleu", {"bleu", "nist"}), ("pycocoevalcap", {"meteor", "rouge_l", "cider"})],
)
def test_without_a_package_the_rest_is_scored(package, metrics, monkeypatch, ptb_is_split):
    if package == "pycocoevalcap":
        monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    found = text_metrics.score(CANDIDATES, REFERENCES)
    assert not metrics & set(found.values)
    for name in metrics:
        assert found.skipped[name].startswith(f"{package} is not installed")
    assert set(found.values) | set(found.skipped) == set(text_metrics.METRICS)


def fake_java(tmp_path, monkeypatch, script):
    path = tmp_path / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    "script, reason",
    [
        ("exec sleep 60", "no answer for 0.5 s"),
        ("echo No Java runtime present >&2; exit 1", "status 1: No Java runtime present"),
        (
            "echo 'Exception: java.lang.OutOfMemoryError' >&2; echo at x >&2; exit 3",
            "status 3: Exception: java.lang.OutOfMemoryError",
        ),
        ("exec head -n 1", "gave 1 lines for 4"),
        ("head -c 100000 /dev/zero >&2; exit 2", "status 2"),
    ],
)
def test_a_java_that_hangs_or_dies_is_a_reason(script, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(text_metrics, "JAVA_SECONDS", 0.5)
    fake_java(tmp_path, monkeypatch, script)
    children = set(psutil.Process().children(recursive=True))
    found = text_metrics.score(CANDIDATES, REFERENCES)
    assert list(found.values) == ["bleu", "nist"]
    assert set(found.skipped) == {"meteor", "rouge_l", "cider"}
    assert all(reason in text for text in found.skipped.values()), found.skipped
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.mark.parametrize(
    "script, reason",
    [
        ("read line; echo 1 2 3; read line; exec sleep 60", "no answer for 0.5 s"),
        ("read line; echo 1 2 3; exit 4", "status 4"),
        ("while read line; do echo oops; echo oops; echo oops; done", "METEOR answered 'oops'"),
    ],
)
@pytest.mark.usefixtures("ptb_is_split")
def test_a_meteor_that_hangs_or_dies_is_a_reason(script, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(text_metrics, "JAVA_SECONDS", 0.5)
    monkeypatch.setenv("PATH", os.defpath)
    fake_java(tmp_path, monkeypatch, script)
    found = text_metrics.score(CANDIDATES[:2], REFERENCES[:2])
    assert set(found.skipped) == {"meteor"} and reason in found.skipped["meteor"], found.skipped


def test_an_interrupt_leaves_no_java(tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, "exec sleep 60")
    children = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt), text_metrics._java("x", folder=tmp_path) as process:
        assert process.poll() is None
        raise KeyboardInterrupt
    assert process.returncode == -9
    assert set(psutil.Process().children(recursive=True)) <= children


# ------------------------------------------------------------- errors and the command line


@pytest.mark.parametrize(
    "candidates, references, message",
    [
        ([], [], "no candidates"),
        (["a", "b"], [["a"]], "2 candidates for the references of 1"),
        (["a", None], [["a"], ["b"]], r"candidates\[1\] is None"),
        (["a", "b"], [["a"], []], r"references\[1\] is empty"),
        (["a", "b"], [["a"], "b"], r"references\[1\] is 'b': expected a list"),
        (["a", "b"], [["a"], None], r"references\[1\] is None"),
        (["a"], [["a", 3]], r"references\[0\]\[1\] is 3"),
        (["a"], [["a", " "]], r"references\[0\]\[1\] is ' '"),
    ],
)
def test_errors_name_the_index(candidates, references, message):
    with pytest.raises(ConfigError, match=message):
        text_metrics.score(candidates, references)


def test_the_command_line(tmp_path, capsys, without_java):
    outputs, truths = tmp_path / "outputs.txt", tmp_path / "truths.txt"
    outputs.write_text("".join(f"{text}\n" for text in CANDIDATES))
    truths.write_text("\n\n".join("\n".join(texts) for texts in REFERENCES) + "\n\n\n")
    assert text_metrics.read(outputs, truths) == (CANDIDATES, REFERENCES)
    assert text_metrics.main([str(outputs), str(truths)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    expected = text_metrics.score(CANDIDATES, REFERENCES).values
    assert shown["bleu"] == f"{expected['bleu']:.4f}" and shown["nist"] == f"{expected['nist']:.4f}"
    assert shown["meteor"] == "-  java is not on the PATH"
    truths.write_text("\n".join(texts[0] for texts in REFERENCES))
    assert text_metrics.read(outputs, truths)[1] == [texts[:1] for texts in REFERENCES]
    outputs.write_text("one\n\nthree")
    assert text_metrics.read(outputs, truths)[0] == ["one", "", "three"]
    assert text_metrics.main([str(outputs), str(truths)]) == 2
    assert text_metrics.main([str(outputs), str(tmp_path / "none.txt")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
