"""One run, from RUN_DIR/config.yaml to RUN_DIR/result.json: python -m harness.runs.worker RUN_DIR.

A fresh process per run: peak memory is a headline metric, so runs share no allocator and no caches.
A checkpoint in RUN_DIR is gone on from. Exit status: 0 finished, or paused at `launch.pause_at`; 75
told to stop (the same command goes on), 2 a mistake in the configuration, 1 any other failure.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

from harness import methods
from harness.config import ending
from harness.config.errors import ConfigError
from harness.config.run_config import RunConfig
from harness.data import overlap, pairs, token_data
from harness.evaluation import (
    base_model,
    classification,
    generation,
    latency,
    prefix,
    probes,
    protocols,
    ranks,
    sliding_window,
)
from harness.methods import adalora, invocation, merging, starts
from harness.methods.svd import CACHE_ENV
from harness.models import linear, loss, pretrained, weights
from harness.results import environment, run_record
from harness.runs import composition, estimate, quantisation_cost, saved_check, saved_costs
from harness.runs.finished_run import ADAPTER, Saved
from harness.system import contents, lock, machine, network
from harness.system.signals import Stop
from harness.training import checkpoint, loop, memory, optimizers, sharding
from harness.training.evaluator import Evaluator
from harness.training.neftune import Noise
from harness.training.run_state import Elapsed, RunState
from harness.training.start_text import start_text_of

RESUME_ME = 75  # exit status: EX_TEMPFAIL of sysexits.h
log = logging.getLogger("harness")


def main(run_dir: Path, *, run: RunConfig | None = None, quiet: bool = False) -> int:
    """Do the run; whatever happens ends in result.json, and the traceback in log.txt.

    Of several ranks all do the run, and the first one writes. `run` is what RUN_DIR/config.yaml
    says, for those who know it already; `quiet` leaves out the bar.
    """
    gc.freeze()  # a million imported objects, which the collector would look at again and again
    stop = Stop().listen()
    rank = int(os.environ.get("RANK", "0"))
    log_path = run_dir / (f"{run_record.RANK_LOG}{rank}.txt" if rank else "log.txt")
    handler = logging.FileHandler(log_path, delay=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
        handlers=[handler],
    )
    logging.raiseExceptions = False  # a full disk is told of once, by the result
    logging.captureWarnings(True)
    result: dict[str, Any] = {"status": "failed"}
    code = 1
    so_far = None
    try:
        try:
            with stop.interruptible(), log_path.open("a") as crash_log:
                faulthandler.enable(crash_log)  # a segfault leaves its stack there
                if rank == 0:
                    run_record.keep_reserve(run_dir)
                    so_far = Elapsed(time.time(), lock.concurrent_runs())
                run = run or composition.load(run_dir / "config.yaml")
                result |= run_record.describe(run, run_dir)
                perform(run, run_dir, result, stop, so_far or Elapsed(time.time()), quiet=quiet)
        finally:
            stop.ignore()
            faulthandler.disable()
        result["status"] = "finished"
        code = 0
    except loop.Paused:
        result["status"] = "paused"
        code = 0
    except KeyboardInterrupt:
        result["status"] = "interrupted"
        result["failure"] = dict(run_record.INTERRUPTED)
        log.warning("interrupted")
        code = RESUME_ME
    except ConfigError as error:
        result["failure"] = {"class": "config", "message": str(error)}
        log.exception("refused")
        code = 2
    except Exception as error:  # whatever it is, it is recorded and the sweep goes on
        message = f"{type(error).__name__}: {error}"
        result["failure"] = {"class": failure_class(error), "message": message}
        log.exception("failed")
    if "failure" in result:
        result["failure"]["log_tail"] = run_record.tail(log_path)
    if rank:
        if "failure" in result:
            run_record.write_rank_failure(run_dir, rank, result["failure"])
        return code
    if so_far:
        facts = so_far.facts()
        result["wall_seconds"] = facts["wall_seconds"]
        result["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        result.setdefault("environment", {})["runs_beside"] = facts["runs_beside"]
    run_record.free_reserve(run_dir)
    run_record.write(run_dir, result)
    if result["status"] == "finished":  # until then the run goes on from its last checkpoint
        run_record.clear(run_dir)
        _measure_costs(run, run_dir, result, so_far)
    if so_far:
        so_far.end()
    if result["status"] == "finished":
        _confirm_saved(run, run_dir, result)
    return code


def _measure_costs(
    run: RunConfig | None, run_dir: Path, result: dict[str, Any], so_far: Elapsed | None
) -> None:
    """Note in the result, which stands, how fast what was saved loads and runs (`saved_costs`)."""
    if run is None or run.evaluate.latency is None:
        return
    costs = result.setdefault("costs", {})
    costs["failure"] = saved_costs.UNMEASURED  # of a kill, which leaves no time to say so
    with suppress(OSError):
        run_record.write(run_dir, result)
    found = saved_costs.measure(Saved(run_dir, run, result))
    del costs["failure"]
    costs |= found
    if so_far:  # the most at any time of the run, and of this
        result["environment"]["runs_beside"] = so_far.facts()["runs_beside"]
    if failure := costs.get("failure"):
        print(f"warning: evaluate.latency failed ({failure})", file=sys.stderr)
    with suppress(OSError):
        run_record.write(run_dir, result)


def _confirm_saved(run: RunConfig | None, run_dir: Path, result: dict[str, Any]) -> None:
    """Load what was saved and note in the result, which stands, whether it is the same model."""
    if run is None or not result.get("saved"):
        return
    result["saved_check"] = saved_check.check(Saved(run_dir, run, result))
    if failure := result["saved_check"]["failure"]:
        print(f"warning: {failure}", file=sys.stderr)
    with suppress(OSError):
        run_record.write(run_dir, result)


def failure_class(error: Exception) -> str:
    """oom | nan | disk | killed (another rank) | error, for result.json."""
    if isinstance(error, loop.NonFiniteLossError):
        return "nan"
    if machine.out_of_memory(error):
        return "oom"
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
        return "killed"
    words = ("No space left on device", "os error 28", "Disk quota exceeded")
    if getattr(error, "errno", None) in run_record.DISK_ERRORS:
        return "disk"
    if any(word in str(error) for word in words):
        return "disk"
    return "error"


def perform(
    run: RunConfig,
    run_dir: Path,
    result: dict[str, Any],
    stop: Stop,
    so_far: Elapsed,
    *,
    quiet: bool,
) -> None:
    """data -> model -> method -> train -> evaluate; fills `result` as it goes."""
    if run.data.id or run.model.id or run.model.tokenizer:
        network.go_offline_if_unreachable()
    contents.check(run)
    run = contents.pinned(run)
    datasets.disable_progress_bars()  # the training bar is the only one
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    process = memory.ProcessPeaks("setup")
    os.environ[CACHE_ENV] = run.data.cache_dir  # factors of a base weight, for a whole sweep
    precision = environment.precision_of(run)
    if warning := environment.precision_warning(precision):
        log.warning(warning)
        print(f"warning: {warning}", file=sys.stderr)
    accelerator = Accelerator(
        mixed_precision=environment.mixed_precision(precision),
        cpu=not torch.accelerator.is_available(),  # which ranks on a CPU must be told
    )
    cores = run.launch.cores or environment.usable_cores()
    torch.set_num_threads(run.train.threads or max(1, cores // accelerator.num_processes))
    result["environment"] = environment.describe() | {
        "processes": accelerator.num_processes,
        "sharded": run.launch.sharded,
    }

    # Names and shapes are checked on the meta device, before anything is read or loaded.
    model_config = pretrained.load_config(run.model)
    result["model"] |= pretrained.facts(run.model, model_config)
    if not run.model.architecture:
        weights.check_files(pretrained.source_of(run.model))
    most = pretrained.max_context(model_config)
    methods.check_context(run, most)
    with suppress(methods.NeedsWeightsError):  # then on the real model
        checked = methods.check(pretrained.on_meta(run, model_config), run)
        optimizers.matches(checked, run.train.groups)

    # ----------------------------------------------------------------------- data
    tokenizer = pretrained.load_tokenizer(run.model, model_config)
    first = prefix.find(tokenizer, run.evaluate.prefix)
    with accelerator.main_process_first():
        limits = token_data.most_tokens(run)
        text = token_data.prepare(
            run.data, tokenizer, test=run.evaluate.test, begins=first.begins, most=limits
        )
        evaluated = text.facts.pop("evaluated", {})  # where a split is read in part
        further = {}
        for name, cfg in run.evaluate.also.items():
            further[name], part = token_data.prepare_test(
                cfg, tokenizer, begins=first.begins, most=limits["test"]
            )
            evaluated |= {name: part} if part else {}
        in_training, copies = overlap.of_further(
            run.evaluate.also, text.training, further, run.data
        )
        by_protocol = protocols.read(run, tokenizer)
        ids = {name: set(table["id"]) for name, table in text.held_out.items()}
        task = classification.read(run, tokenizer, first.begins, ids)
    context = run.evaluation_context
    stride = run.evaluate.stride or context
    result["data"] |= {"num_documents": text.num_documents, "num_blocks": text.num_blocks}
    result["evaluation"] = {
        "context": context,
        "stride": stride,
        "prefix": first.recorded(),
        "tokenizer": text.tokenizer,
    }
    if evaluated:  # runs whose parts differ are not compared
        result["evaluation"]["part"] = evaluated
    result["data"] |= text.facts
    log.info("data: %s, tokenised now: %s", text.num_documents, text.tokenized)
    said = [said for cfg in run.evaluate.also.values() for said in token_data.left_out(cfg)[1]]
    if in_training:
        result["data"]["further_in_training"] = in_training
    said += copies + (task.warnings if task else [])
    for warning in [*text.warnings, *said] if accelerator.is_main_process else []:
        log.warning(warning)
        print(f"warning: {warning}", file=sys.stderr)

    # ----------------------------------------------------------------------- model and method
    set_seed(run.seed)
    base, misfits = pretrained.load_with_misfits(run, model_config)
    if not run.model.strict:
        result["model"]["weights"] = {"random": misfits.random, "left_out": misfits.unexpected}
    if misfits:
        warning = f"model.strict=false: {misfits}"
        log.warning(warning)
        print(f"warning: {warning}", file=sys.stderr)
    result["parameters"] = {"base": pretrained.count_parameters(base).total}
    room = None if most is None else most - methods.num_virtual_tokens(run)
    with accelerator.autocast():
        changes = run.method.name not in ("none", "full")
        at_base = base_model.Base(base, run, room) if changes else None
    start_text = start_text_of(run, run_dir, text, accelerator)
    if start_text and not run.launch.sharded:  # or else the device need not hold all of it
        base = base.to(accelerator.device)
    with accelerator.main_process_first() if start_text else nullcontext():
        model = methods.adapt(base, run, start_text)
    if linear.is_turned(model):
        result["model"]["linear"] = True
    another = linear.needs_turned_base(model) or pretrained.wants_unfused(run, model_config)
    merged = wants_merged(run, another)
    if merged and (reason := merging.reason_unsupported(model)):
        if run.save_merged == "always":
            raise ConfigError(f"save_merged=always: {reason}; set save_merged=never")
        log.info("no model/ will be saved: %s", reason)
        merged = False
    said = invocation.check(model, run.data, text, further)
    for warning in said if accelerator.is_main_process else []:
        log.warning(warning)
        print(f"warning: {warning}", file=sys.stderr)
    if accelerator.is_main_process:
        checkpoint.keep_initial(model, run_dir)
    if not run.launch.sharded:  # or else the device need not hold all of it
        model = model.to(accelerator.device)
    result["method"] |= methods.svd_facts(model) | methods.trained_alone(model, run)
    counted = pretrained.count_parameters(model)
    result["parameters"] |= {
        "total": counted.total,
        "trainable": counted.trainable,
        "trainable_percent": counted.trainable_percent,
        "factored": methods.factored_total(model),  # with U, D, V in place of W; else None
    }
    log.info("parameters: %s, of %s", result["parameters"], result["method"].get("trained", "all"))
    if accelerator.process_index:  # the same start, and dropout of its own
        set_seed(run.seed + accelerator.process_index * 1_000_003)
    pretrained.checkpoint_activations(model, run.train)
    if run.train.compile:
        pretrained.compile_blocks(model)

    # Prepared once, so that every method is evaluated at the same precision, at every step.
    with accelerator.autocast():
        bare = loss.NextToken(model, run.train.label_smoothing)
        result["model"]["causal"] = probes.check_causal(bare, run.model.name, model_config, room)
        batch_tokens = run.evaluate.batch_tokens or sliding_window.batch_tokens(model_config)
        batching = probes.batching(
            bare, run.model.name, model_config, min(context, batch_tokens // 2)
        )
        log.info("evaluation batches: %s", batching)
        if run.data.source == "pairs":
            probes.check_blocks(bare, run, model_config)
    if run.evaluate.latency:
        with accelerator.autocast():
            latency.check(model, run.evaluate.latency, room)
    prompts, together = [], probes.PADDED
    if run.evaluate.generate:
        prompts = pairs.read(run.data)["test"][: run.evaluate.generate.prompts]
        together = generation.check(
            model,
            tokenizer,
            prompts,
            run.evaluate.generate,
            accelerator,
            room,
            first.begins,
            run.data.chat_template,
        )
    noise = None
    if counted.trainable and run.train.neftune_alpha:
        noise = Noise(model, run.train.neftune_alpha, run.seed, accelerator.process_index)
    contents.check(run)  # again, now that all of it was read
    if run.launch.sharded:
        prepared = accelerator.prepare_model(bare, device_placement=False, evaluation_mode=True)
        prepared = sharding.shard(prepared, accelerator)
    else:
        prepared = accelerator.prepare_model(bare, evaluation_mode=counted.trainable == 0)
    with accelerator.autocast():
        unadapted = at_base and at_base.apart(bare, prepared, model_config, accelerator)
    asked_steps = run.train.steps
    start = starts.facts_of(start_text)
    if run.train.max_flops:
        known = estimate.recorded(run, model_config, accelerator) or {}
        spent = starts.flops_of(start, known.get("evaluate_flops_per_token"))
        run = ending.within_flops(run, known.get("train_flops_per_token"), spent)
    optimizer = None
    if counted.trainable:
        optimizer = accelerator.prepare_optimizer(
            optimizers.make_optimizer(model, run.train, run.optimizer)
        )

    # ----------------------------------------------------------------------- train
    standing = RunState(run, run_dir, model, optimizer, accelerator, process, so_far)
    state = standing.state
    state.start_seconds = start.seconds if start else 0.0
    result["quality"] = standing.quality
    held_out = Evaluator(
        text.held_out | further,
        list(further),
        prepared,
        standing,
        context=context,
        stride=stride,
        bos=first.id,
        batch_tokens=batch_tokens,
        batching=batching,
        unadapted=unadapted or None,
    )
    setup_seconds = time.perf_counter() - began
    with standing.metrics:
        if state.validated < 0:
            held_out.evaluate_base()
        process.turn("train")
        try:
            penalty = methods.penalty(model, run)
            after_step, final = adalora.after_step(model, run), adalora.last_cut(run)
            training = loop.Training(
                prepared,
                text,
                run,
                accelerator,
                optimizer,
                penalty,
                standing.average,
                noise,
                after_step,
                final,
            )
            hooks = loop.Hooks(
                held_out.validate,
                standing.keep,
                standing.save,
                standing.metrics.log,
                standing.meter.read,
            )
            loop.train(training, state, hooks, stop, quiet=quiet)
        except loop.Paused:
            result["run"] |= {"paused_at": state.step, "resumed_at": state.resumed_at}
            raise
        standing.load_best()  # from here on with the weights that validation chose
        result["method"] |= methods.rank_facts(model)
        held_out.evaluate_adapted()
    result["run"]["resumed_at"] = state.resumed_at
    capped = "max_flops" if run.train.steps < asked_steps else "steps"
    result["run"]["ended_by"] = state.ended_by or capped
    step_blocks = run.train.batch_tokens // run.data.context
    result["train"] = {
        "epochs": text.epochs(state.step * step_blocks),
        "micro_batch_asked": run.train.micro_batch,
        "micro_batch": state.micro_batch,
    }
    if optimizer is not None:
        result["train"]["groups"] = optimizers.described(optimizer)

    # ----------------------------------------------------------------------- evaluate
    result["quality"] |= {
        "best_step": state.best_step,
        "validation": held_out.summarize("validation", standing.best),
    }
    if run.evaluate.test:  # read here, once, and nowhere else
        result["quality"]["test"] = held_out.summarize("test", held_out.nats("test"))
    # From here on a failure takes nothing away: what fails on one rank, all leave out.
    if by_protocol is not None:
        with process.phase("evaluate"), kept_result(result, "evaluate.protocol failed"):
            result["quality"]["test_protocol"] = protocols.measure(
                prepared,
                by_protocol,
                batch_tokens=held_out.batch_tokens,
                batching=held_out.batching,
                precision=precision,
                accelerator=accelerator,
            )
    if task is not None:
        with process.phase("evaluate"), kept_result(result, "evaluate.classify failed"):
            result["quality"]["classification"] = task.measure(
                prepared,
                run_dir,
                context=context,
                stride=stride,
                batch_tokens=held_out.batch_tokens,
                batching=held_out.batching,
                accelerator=accelerator,
            )
    if prompts and run.evaluate.generate:
        process.turn("generate")
        with kept_result(result, "evaluate.generate failed"):
            completed = generation.complete(
                model,
                tokenizer,
                prompts,
                run.evaluate.generate,
                accelerator,
                together,
                first.begins,
                run.data.chat_template,
            )
            if accelerator.is_main_process:
                result["quality"]["generation"] = generation.scored(prompts, completed, run_dir)

    # ----------------------------------------------------------------------- what it took
    result["speed"] = {
        "tokens_per_second": state.tokens_per_second,
        "train_seconds": state.train_seconds,
        "evaluate_seconds": state.evaluate_seconds,
        "setup_seconds": setup_seconds,
        "steps": state.step,
        "tokens": state.tokens,
    }
    if start:
        result["speed"] |= {"start_tokens": start.tokens, "start_seconds": start.seconds}
        result["method"]["start_passes"] = start.passes
    process.turn("export")
    result["memory"] = (state.memory or standing.at_evaluation) | {
        "phase": "train" if state.memory else "evaluate",
        "evaluate": standing.at_evaluation,
        "process_peak_bytes": process.peak_bytes,
        "process_peak_by_phase": process.by_phase,
    }
    # After the peaks are read: it is quick, but it takes memory of its own.
    done = replace(run, train=replace(run.train, micro_batch=state.micro_batch))
    validation = token_data.document_sizes(text.held_out["validation"])
    batches = estimate.batches_of(run, model_config, validation, held_out.batching)
    followed = batches[0] if batches else None
    predicted = None
    with kept_result(result, "memory and FLOPs could not be predicted"):
        predicted = estimate.recorded(done, model_config, accelerator, followed)
    result["predicted"] = predicted
    if start and predicted:
        flops = starts.flops_of(start, predicted["evaluate_flops_per_token"])
        result["speed"]["start_flops"] = flops
    result["costs"] = estimate.spent_flops(run, state, predicted)
    result["costs"]["energy"] = standing.energy()
    # Of pairs tokens are those of completions, and FLOPs those of every position.
    if predicted and state.tokens_per_second and run.data.source != "pairs":
        flops = predicted["train_flops_per_token"] * state.tokens_per_second
        result["speed"]["gflops_per_second"] = flops / 1e9
    with kept_result(result, "what was trained could not be saved"):
        if run.launch.sharded:
            with ranks.together(accelerator, divided=True):
                sharding.unshard(model, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            result["saved"] = checkpoint.export(model, tokenizer, run_dir, merged=merged)
            saved_check.keep(run_dir, text.held_out["validation"], standing.best, held_out.bos)
            bytes_to_ship = saved_costs.bytes_to_ship(run_dir, result["saved"])
            result["costs"]["adapter_bytes"] = bytes_to_ship
    if run.model.quantize != "none":
        with kept_result(result, "the cost of quantising could not be measured"):
            adapter = ADAPTER in result.get("saved", ())
            result["quality"]["quantization"] = quantisation_cost.measure(
                run, model_config, held_out, accelerator, adapter=adapter
            )


def wants_merged(run: RunConfig, another: bool) -> bool:
    """Whether the adapted model is to be saved as a whole, beside or in place of an adapter."""
    if run.save_merged == "auto":  # where an adapter alone would lack its base
        return another or bool(run.model.architecture) or run.method.name == "truncate"
    return run.save_merged == "always"


@contextmanager
def kept_result(result: dict[str, Any], what: str) -> Iterator[None]:
    """Note a failure after the test set was read in `result["problems"]`, and go on.

    A full disk still fails the run, which a retry resumes: nothing more could be written. So does
    what one rank alone has, of a model that is divided (`ranks.together`).
    """
    try:
        yield
    except ranks.RanksApartError:
        raise
    except Exception as error:
        if failure_class(error) == "disk":
            raise
        message = f"{what} ({type(error).__name__}: {error})"
        log.exception(what)
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {message}", file=sys.stderr)
        result.setdefault("problems", []).append(message)


if __name__ == "__main__":
    warnings.simplefilter("default")
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        machine.die_with_parent(signal.SIGKILL)  # no rank outlives the launcher of all
        if not lock.join(folder):
            sys.exit(f"{folder}: the launcher of this rank is gone")
    sys.exit(main(folder))
