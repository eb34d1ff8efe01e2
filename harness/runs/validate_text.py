"""What can be known of the texts of a configuration to be wrong before they are read."""

from __future__ import annotations

import re

from harness.config import parts
from harness.config.errors import ConfigError, nearest, require
from harness.config.run_config import RunConfig
from harness.config.schema import DataConfig, LatencyConfig, defaults
from harness.data import sources
from harness.data.documents import SOURCES, SPLITS  # needs the standard library only
from harness.data.forms import FORMS
from harness.system import encodings, files
from harness.system.files import find_files

CHOICES = {
    "data.source": (*SOURCES, "pairs", "mix"),
    "data.packing": ("packed", "padded"),
    "data.split": ("hash", "contiguous"),
    "data.prompt_style": ("as_is", "e2e"),
    "data.record_form": ("auto", *FORMS),
    "data.chat_template": ("auto", "plain"),
    "data.loss_on": ("assistant", "completion", "all"),
    "data.too_long": ("refuse", "cut", "drop", "window"),
}
OF_PAIRS = ("record_form", "chat_template", "loss_on", "too_long")  # say nothing of other text


# Keys of conf/data that say where text comes from and how it is read -> the sources that read them.
_FILES = ("text_files", "pairs")
KNOWN = ("kjv", "docstrings", "hub", *_FILES, "mix")
READ_BY = {
    "path": _FILES, "validation_path": _FILES, "test_path": _FILES, "encoding": _FILES,
    "text_field": ("text_files", "hub"), "document_separator": ("text_files",),
    "id": ("hub", "pairs"), "config_name": ("hub", "pairs"), "revision": ("hub", "pairs"),
    "split_names": ("hub", "pairs"), "streaming": ("hub", "pairs"), "max_rows": ("hub", "pairs"),
    "packages": ("docstrings",),
    "separator": ("pairs",), "prompt_field": ("pairs",), "completion_field": ("pairs",),
    "prompt_style": ("pairs",),
}  # fmt: skip


def _refuse_unread(data: DataConfig, where: str) -> None:
    """Refuse a key that the text's source does not read: the run would be of another text."""
    if data.source not in KNOWN:  # a source of one's own reads what it will
        return
    plain = defaults(DataConfig)
    for key, readers in READ_BY.items():
        value = getattr(data, key)
        if data.source in readers or value == plain[key]:
            continue
        meant = f"data=text_files data.path={value}" if key == "path" else f"data={readers[0]}"
        shown = f"{where}.{key}={value}"
        raise ConfigError(
            f"{shown}: data={data.name} does not read it; did you mean {meant}, or leave it out?"
        )


def validate_data(run: RunConfig) -> None:
    """Check the text that is trained on: its source, its files and its shares."""
    data, ev = run.data, run.evaluate
    require(
        data.context_length >= 2, "data.context_length", data.context_length, "at least 2 tokens"
    )
    also = {f"evaluate.also.{name}": text for name, text in ev.also.items()}
    for where, text in {"data": data, **also}.items():
        _validate_split(text, where)
        _refuse_unread(text, where)
        limit = text.document_chars
        require(limit is None or limit > 0, f"{where}.document_chars", limit, "1 or more, or null")
        _validate_rows(text, where)
    for key in ("validation_share", "test_share"):
        require(
            0 < getattr(data, key) < 0.5, f"data.{key}", getattr(data, key), "a share in (0, 0.5)"
        )
    share = data.train_share
    require(0 < share <= 1, "data.train_share", share, "a share in (0, 1]")
    if data.source == "text_files":
        _validate_files(data, "data")
    if data.source == "hub" and not data.id:
        raise ConfigError("data=hub needs data.id, the id of a text data set on the hub")
    if data.source == "pairs":
        _validate_pairs(data, "data")
    _validate_mixture(run)


def _validate_rows(text: DataConfig, where: str) -> None:
    """Check how a data set of the hub is read."""
    rows = text.max_rows
    require(rows is None or rows >= 3, f"{where}.max_rows", rows, "3 or more, or null")
    for key in ("streaming", "max_rows"):
        value = getattr(text, key)
        if value and text.source == "pairs" and not text.id:
            raise ConfigError(f"{where}.{key}={value}: {where}.path={text.path} is read without it")


def _validate_mixture(run: RunConfig) -> None:
    """The parts of data=mix, each as a text by itself."""
    data = run.data
    if (data.source == "mix") != bool(data.parts):
        raise ConfigError(
            f"data.parts={data.parts} with data={data.name}: parts belong to data=mix, as in "
            "data=mix data.parts={kjv:0.9,docstrings:0.1}"
        )
    if not data.parts:
        require(data.held_out_part is None, "data.held_out_part", data.held_out_part, "data=mix")
        return
    parts.held_out_part(data)
    for part in parts.parts(data):
        where, text = f"data.parts.{part.name}", part.text
        if text.source in ("pairs", "mix"):
            raise ConfigError(
                f"{where}: {text.source} cannot be part of a mixture, whose blocks are running "
                "text: leave it out, or evaluate it (evaluate.also)"
            )
        if text.source not in SOURCES:
            raise ConfigError(f"{where}.source={text.source}: {nearest(text.source, SOURCES)}")
        _validate_split(text, where)
        _refuse_unread(text, where)
        _validate_rows(text, where)
        for key in ("validation_share", "test_share"):
            share = getattr(text, key)
            require(0 < share < 0.5, f"{where}.{key}", share, "a share in (0, 0.5)")
        require(0 < text.train_share <= 1, f"{where}.train_share", text.train_share, "(0, 1]")
        if text.source == "text_files":
            _validate_files(text, where)
        if text.source == "hub" and not text.id:
            raise ConfigError(f"{where} needs {where}.id, the id of a text data set on the hub")
    if run.train.epochs is not None:
        raise ConfigError(
            f"train.epochs={run.train.epochs} with data=mix, whose parts end at different steps: "
            "set train.steps"
        )


def validate_evaluation(run: RunConfig) -> None:
    """Check what is evaluated, when and how: further texts, generation, windows, protocols."""
    data, ev = run.data, run.evaluate
    for name, text in ev.also.items():
        where = f"evaluate.also.{name}"
        if text.source == "pairs":
            _validate_pairs(text, where)
        if not re.fullmatch(r"\w+", name) or name in SPLITS:
            raise ConfigError(f"{where}: expected letters, digits, _, and no split's name")
        own = ("source", "path", "id", "config_name", "packages")
        if all(getattr(text, key) == getattr(parts.evaluated_text(data), key) for key in own):
            raise ConfigError(
                f"{where} is the text that is trained on ({data.name}), whose test set is read "
                "once, at the end: name another"
            )
        if text.source not in CHOICES["data.source"]:
            choices = [str(choice) for choice in CHOICES["data.source"]]
            raise ConfigError(f"{where}.source={text.source}: {nearest(text.source, choices)}")
        if text.source == "text_files":
            _validate_files(text, where)
        for key in ("validation_share", "test_share"):
            share = getattr(text, key)
            require(0 < share < 0.5, f"{where}.{key}", share, "a share in (0, 0.5)")
    if ev.also and not ev.test:
        raise ConfigError(
            "evaluate.test=false reads no test set, and evaluate.also reads those of "
            f"{', '.join(ev.also)}: leave one of them out"
        )
    if ev.generate is not None:
        _validate_generate(run)
    if ev.latency is not None:
        _validate_latency(ev.latency)
    if ev.classify == "always" and data.source != "pairs":
        raise ConfigError(
            f"evaluate.classify=always: data={data.name} has no completions to choose from; use a "
            "data set of pairs (data=pairs), or evaluate.classify=auto"
        )
    for key in ("validation_tokens", "test_tokens"):
        limit = getattr(ev, key)
        require(limit is None or limit > 0, f"evaluate.{key}", limit, "1 or more tokens, or null")
    if ev.test_tokens is not None and (ev.protocol != "documents" or ev.generate is not None):
        other = "generate" if ev.generate is not None else f"protocol={ev.protocol}"
        raise ConfigError(
            f"evaluate.test_tokens={ev.test_tokens} with evaluate.{other}, which reads the test "
            "set as a whole: leave one of them out"
        )
    require(ev.interval > 0, "evaluate.interval", ev.interval, "1 or more optimizer steps")
    require(
        ev.batch_tokens is None or ev.batch_tokens > 0,
        "evaluate.batch_tokens",
        ev.batch_tokens,
        "1 or more tokens, or null",
    )
    context = run.evaluation_context
    require(context >= 1, "evaluate.context_length", context, "1 or more tokens")
    stride = context if ev.stride is None else ev.stride
    require(1 <= stride <= context, "evaluate.stride", stride, f"1 to the context of {context}")

    if ev.protocol != "documents":
        _validate_protocol(run, context, stride)


def _validate_split(data: DataConfig, where: str) -> None:
    """How a text is split, and what says where its held-out text is."""
    for key in OF_PAIRS if data.source != "pairs" else ():
        if (value := getattr(data, key)) != getattr(DataConfig, key):
            raise ConfigError(
                f"{where}.{key}={value} is of records with something given and something "
                f"predicted: expected data=pairs, and this is data={data.name}"
            )
    if data.split not in CHOICES["data.split"]:
        choices = map(str, CHOICES["data.split"])
        raise ConfigError(f"{where}.split={data.split}: {nearest(data.split, choices)}")
    if data.encoding:
        encodings.check_name(data.encoding)
    for key in ("validation_path", "test_path"):
        if getattr(data, key) and not data.path:
            raise ConfigError(
                f"{where}.{key}={getattr(data, key)} belongs to text of your own: expected "
                f"data=text_files or data=pairs with {where}.path, and this is data={data.name}"
            )


def _validate_files(data: DataConfig, where: str) -> None:
    """The files of a text of one's own: all are there, and no two splits share one."""
    for key in ("path", "validation_path", "test_path"):
        value = getattr(data, key)
        several = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(entry, str) and entry for entry in several):
            raise ConfigError(
                f"{where}.{key}={value}: expected a file, a folder, a glob or a list of them"
            )
    sources.own_files(data, files.OF_PAIRS if data.source == "pairs" else files.KINDS)


def _validate_pairs(data: DataConfig, where: str) -> None:
    if bool(data.path) == bool(data.id):
        raise ConfigError(
            f"{where}: {data.name} needs one of {where}.path (a file or folder of pairs) and "
            f"{where}.id (a data set on the hub); it has path={data.path} and id={data.id}"
        )
    if data.path:
        _validate_files(data, where)
    for key in ("packing", "prompt_style", *OF_PAIRS):
        if (value := getattr(data, key)) not in CHOICES[f"data.{key}"]:
            choices = map(str, CHOICES[f"data.{key}"])
            raise ConfigError(f"{where}.{key}={value}: {nearest(value, choices)}")
    require(bool(data.separator), f"{where}.separator", repr(data.separator), "some characters")
    if unknown := set(data.split_names) - set(SPLITS):
        name = sorted(unknown)[0]
        raise ConfigError(f"{where}.split_names.{name}: {nearest(name, SPLITS)}")


def _validate_generate(run: RunConfig) -> None:
    cfg = run.evaluate.generate
    assert cfg is not None
    if run.data.source != "pairs":
        raise ConfigError(
            f"evaluate.generate completes prompts, and data={run.data.name} has none: use a data "
            "set of pairs (data=e2e_nlg, data=pairs), or evaluate.generate=null"
        )
    if not run.evaluate.test:
        raise ConfigError("evaluate.generate completes the test set, and evaluate.test=false")
    for key in ("num_beams", "max_new_tokens", "batch"):
        value = getattr(cfg, key)
        require(value > 0, f"evaluate.generate.{key}", value, "1 or more")
    n, limit = cfg.no_repeat_ngram, cfg.prompts
    require(n >= 0, "evaluate.generate.no_repeat_ngram", n, "a length, or 0 for off")
    require(limit is None or limit > 0, "evaluate.generate.prompts", limit, "1 or more, or null")


def _validate_latency(cfg: LatencyConfig) -> None:
    for key in ("prompt_tokens", "new_tokens"):
        value = getattr(cfg, key)
        require(value >= 2, f"evaluate.latency.{key}", value, "2 or more tokens")
    require(cfg.repeats >= 1, "evaluate.latency.repeats", cfg.repeats, "1 or more")
    sizes = cfg.batch_sizes
    fine = bool(sizes) and min(sizes) >= 1 and len(set(sizes)) == len(sizes)
    require(fine, "evaluate.latency.batch_sizes", sizes, "different numbers of 1 or more, as [1,8]")


def _validate_protocol(run: RunConfig, context: int, stride: int) -> None:
    """What a published protocol needs (`evaluate.protocol`): the test set's rows as they are."""
    data, where = run.data, f"evaluate.protocol={run.evaluate.protocol}"
    if not run.evaluate.test:
        raise ConfigError(f"{where} reads the test set, and evaluate.test=false: leave one out")
    if data.source not in ("hub", "text_files"):
        raise ConfigError(
            f"{where} with data={data.name}: it is of rows as WikiText has them; expected "
            "data=wikitext2, data=hub or data=text_files"
        )
    if data.document_chars is not None:
        raise ConfigError(f"{where} reads whole rows: leave out data.document_chars")
    if run.evaluate.protocol == "lm_eval" and stride != context:
        raise ConfigError(
            f"evaluate.stride={stride} with {where}, whose windows do not overlap: leave it out, "
            f"or set it to the context of {context}"
        )
    if data.source == "text_files":
        paths = find_files(data.path, encoding=data.encoding)
        if len(paths) != 1 or files.kind(paths[0]) != ".txt":
            raise ConfigError(f"{where}: expected data.path to be one .txt file, the test set")
        if run.method.trains:
            raise ConfigError(
                f"{where} reads all of {paths[0]}, which method={run.method.name} trains on: use "
                "data=hub data.id=FOLDER, with train.txt, valid.txt and test.txt, or method=none"
            )
