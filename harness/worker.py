"""One run, from RUN_DIR/config.yaml to RUN_DIR/result.json: python -m harness.worker RUN_DIR.

A fresh process per run: peak memory is a headline metric, so runs share no allocator and no caches.
Exit status: 0 finished, 2 a mistake in the configuration, 1 any other failure.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import config, network, results
from harness.config import ConfigError, RunConfig

log = logging.getLogger("harness")


def main(run_dir: Path) -> int:
    """Do the run; whatever happens ends in result.json, and the traceback in log.txt."""
    logging.basicConfig(
        filename=run_dir / "log.txt",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.captureWarnings(True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    started = time.time()
    result: dict[str, Any] = {"status": "failed"}
    try:
        run = config.load(run_dir / "config.yaml")
        result |= describe(run, run_dir)
        perform(run, run_dir, result)
        result["status"] = "finished"
        code = 0
    except KeyboardInterrupt:
        result["failure"] = {"class": "interrupted", "message": "interrupted"}
        log.warning("interrupted")
        code = 130
    except ConfigError as error:
        result["failure"] = {"class": "config", "message": str(error)}
        log.exception("refused")
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Exception as error:  # whatever it is, it is recorded and the sweep goes on
        kind = "nan" if isinstance(error, ArithmeticError) else "error"
        kind = "oom" if isinstance(error, MemoryError) or "out of memory" in str(error) else kind
        message = f"{type(error).__name__}: {error}"
        result["failure"] = {"class": kind, "message": message}
        log.exception("failed")
        print(f"error: {message.splitlines()[0]} (see {run_dir / 'log.txt'})", file=sys.stderr)
        code = 1
    result["wall_seconds"] = time.time() - started
    results.write(run_dir, result)
    return code


def _interrupt(number: int, frame: Any) -> None:
    """Stop at the first signal; a second one must not cut off the writing of the result."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def describe(run: RunConfig, run_dir: Path) -> dict[str, Any]:
    """What is known before anything is loaded."""
    command = run_dir / "command.txt"
    return {
        "run": {
            "name": config.run_name(run),
            "experiment": run.experiment_name,
            "seed": run.seed,
            "identity": config.identity(run),
            "command": command.read_text("utf-8").strip() if command.is_file() else None,
        },
        "config": config.to_dict(run),
        "model": {"name": run.model.name},
        "data": {"name": run.data.name},
        "method": describe_method(run),
    }


def describe_method(run: RunConfig) -> dict[str, Any]:
    """What tables show of the method; what it does not have is None."""
    method = run.method
    found = {key: getattr(method, key, None) for key in ("r", "train", "residual")}
    rank = getattr(method, "kept", found["r"])
    return found | {
        "name": method.name,
        "label": config.label(method),
        "rank": rank and str(rank),  # r of LoRA, k of the SVD methods (or "full", or a share)
        "alpha": getattr(method, "lora_alpha", None),
        "targets": None if method.name in ("none", "full") else run.targets.name,
        "lr": None if method.name in ("none", "truncate") else run.train.lr,
    }


def perform(run: RunConfig, run_dir: Path, result: dict[str, Any]) -> None:
    """data -> model -> method -> train -> evaluate; fills `result` as it goes."""
    if run.data.id or run.model.id or run.model.tokenizer:
        network.go_offline_if_unreachable()
    # Imported here: a mistake in the configuration is answered without them.
    import datasets
    import pandas as pd
    import torch
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from harness import checkpoint, data, environment, evaluate, loss, memory, methods, models
    from harness import plan, train  # isort: skip
    from harness.methods.svd import CACHE_ENV

    datasets.disable_progress_bars()  # the training bar is the only one
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    process = memory.ProcessPeaks("setup")
    os.environ[CACHE_ENV] = run.data.cache_dir  # factors of a base weight, for a whole sweep
    torch.set_num_threads(run.train.threads or environment.usable_cores())
    precision = environment.precision(run.train.precision)
    if run.model.frozen_dtype == "bf16" and precision == "fp32":
        raise ConfigError(
            f"model.frozen_dtype=bf16: train.precision={run.train.precision} is fp32 here, whose "
            "products need fp32 weights; set train.precision=bf16"
        )
    if warning := environment.precision_warning(precision):
        log.warning(warning)
        print(f"warning: {warning}", file=sys.stderr)
    accelerator = Accelerator(mixed_precision={"fp32": "no", "bf16": "bf16"}[precision])
    result["environment"] = environment.describe()

    # Names and shapes are checked on the meta device, before anything is read or loaded.
    model_config = models.load_config(run.model)
    methods.check_context(run, models.max_context(model_config))
    context = run.evaluate.context or run.data.context
    with suppress(methods.NeedsWeightsError):  # then on the real model
        methods.check(models.on_meta(run, model_config), run)

    tokenizer = models.load_tokenizer(run.model, model_config)
    text = data.prepare(run.data, tokenizer)
    result["data"] |= {"num_documents": text.num_documents, "num_blocks": text.num_blocks}
    log.info("data: %s, tokenised now: %s", text.num_documents, text.tokenized)

    set_seed(run.seed)
    base = models.load_model(run, model_config)
    result["parameters"] = {"base": models.count_parameters(base).total}
    model = methods.adapt(base, run).to(accelerator.device)
    result["method"] |= methods.svd_facts(model)
    counted = models.count_parameters(model)
    result["parameters"] |= {
        "total": counted.total,
        "trainable": counted.trainable,
        "trainable_percent": counted.trainable_percent,
        "factored": methods.factored_total(model),  # with U, D, V in place of W; else None
    }
    log.info("parameters: %s", result["parameters"])
    models.checkpoint_activations(model, run.train)
    if run.train.compile:
        models.compile_blocks(model)

    # Prepared once, so that every method is evaluated at the same precision, at every step.
    with accelerator.autocast():
        bare = loss.NextToken(model, run.train.label_smoothing)
    prepared = accelerator.prepare_model(bare, evaluation_mode=counted.trainable == 0)
    batch_tokens = run.evaluate.batch_tokens or evaluate.batch_tokens(model_config)
    at_evaluation: dict[str, Any] = {}

    def measure(split: str, **following: Any) -> tuple[dict[str, Any], Any]:
        """Quality on a split, and its table of nats per document."""
        documents = text.held_out[split]
        with process.phase("evaluate"):
            nll, count = evaluate.document_nll(
                prepared,
                documents,
                context=context,
                stride=run.evaluate.stride or context,
                bos=tokenizer.eos_token_id,
                batch_tokens=batch_tokens,
                accelerator=accelerator,
                **following,
            )
        table = pd.DataFrame({"id": documents["id"], "nll_nats": nll, "num_tokens": count})
        for column in ("num_words", "num_bytes"):
            table[column] = documents[column]
        return evaluate.quality(nll, count, documents), table

    best: tuple[float, dict[str, Any], Any] = (math.inf, {}, None)  # of validation

    def validate(**following: Any) -> float:
        nonlocal best
        quality, table = measure("validation", **following)
        nll = quality["nll_nats"] / quality["num_tokens"]
        if nll < best[0] or not best[1]:
            best = (nll if math.isfinite(nll) else math.inf, quality, table)
        return nll

    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8", buffering=1) as stream:

        def log_row(row: dict[str, Any]) -> None:
            if accelerator.is_main_process:
                stream.write(json.dumps(results.finite(row)) + "\n")

        setup_seconds = time.perf_counter() - began
        process.turn("train")
        step0 = validate(following=lambda: memory.measured(model, None, at_evaluation))
        result["quality"] = {"step0": {"validation": best[1]}}
        log_row({"step": 0, "tokens": 0, "eval/validation/nll": step0})
        done = train.train(
            prepared,
            text,
            run,
            accelerator,
            validate=validate,
            log=log_row,
            step0_nll=step0,
            best_path=run_dir / "best.safetensors",
            penalty=methods.penalty(model, run),
        )
    result["speed"] = {
        "tokens_per_second": done.tokens_per_second,
        "train_seconds": done.train_seconds,
        "setup_seconds": setup_seconds,
        "steps": done.steps,
        "tokens": done.tokens,
    }

    # The weights are now the best on validation; test is read here, once, and nowhere else.
    _, quality, table = best
    result["quality"] |= {"best_step": done.best_step, "validation": quality}
    table.to_parquet(run_dir / "documents-validation.parquet", index=False)
    result["quality"]["test"], table = measure("test")
    table.to_parquet(run_dir / "documents-test.parquet", index=False)

    process.turn("export")
    result["memory"] = (done.memory or at_evaluation) | {
        "phase": "train" if done.memory else "evaluate",
        "evaluate": at_evaluation,
        "process_peak_bytes": process.peak_bytes,
        "process_peak_by_phase": process.by_phase,
    }
    # After the peaks are read: it is quick, but it takes memory of its own.
    try:
        predicted = plan.predict(run, model_config, accelerator)
        result["predicted"] = predicted and predicted.as_record()
        if predicted and done.tokens_per_second:
            flops = predicted.train_flops_per_token * done.tokens_per_second
            result["speed"]["gflops_per_second"] = flops / 1e9
    except Exception:  # a model that looks at values, which fake tensors do not have
        log.exception("no prediction")
        result["predicted"] = None
    if accelerator.is_main_process:
        alone = models.wants_unfused(run) or run.model.architecture or run.method.name == "truncate"
        merged = bool(alone) if run.save_merged == "auto" else run.save_merged == "always"
        result["saved"] = checkpoint.export(model, tokenizer, run_dir, merged=merged)
        (run_dir / "best.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main(Path(sys.argv[1])))
