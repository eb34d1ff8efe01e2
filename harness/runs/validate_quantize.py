"""What of `model.quantize` can be known to be wrong without torch or the model."""

from __future__ import annotations

import importlib.util

from harness.config.errors import ConfigError
from harness.config.method_schema import LoraMethod, PeftMethod
from harness.config.run_config import RunConfig

PACKAGE, EXTRA = "bitsandbytes", "quantised"
NEED_FLOATS = {  # methods, and why
    "full": "trains every weight, and packed weights cannot be trained",
    "adalora": "is untried on packed weights",
    "udv": "decomposes weights, and packed weights cannot be decomposed",
    "truncate": "decomposes weights, and packed weights cannot be decomposed",
}
# Methods of PEFT whose gradients on packed weights are those on the same weights written out, tried
# one by one with PEFT 0.21.2. Of the others most fail, and DEFT, HRA and PEANUT train on int8 and
# take the codes for weights.
TYPES = (
    "BEFT", "BOFT", "CARTRIDGE", "CPT", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LILY", "LORA",
    "MISS", "OFT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "RANDLORA", "ROAD",
    "SHIRA", "VERA", "WAVEFT",
)  # fmt: skip
ON_INT8 = ("LOHA", "LOKR")
STARTS = ("pissa", "olora", "mica", "corda", "loftq", "eva", "lora_ga")  # that read the weights


def validate_quantize(run: RunConfig) -> None:
    """The fields of a quantised base, and what cannot be done with one."""
    model = run.model
    choice = f"model.quantize={model.quantize}"
    fields = {"double_quant": model.double_quant, "compute_dtype": model.compute_dtype != "auto"}
    for field in (name for name, given in fields.items() if given):
        if model.quantize not in ("nf4", "fp4"):
            raise ConfigError(
                f"model.{field}={getattr(model, field)}: it is of weights of 4 bits, and {choice}: "
                "set model.quantize=nf4 or fp4, or leave it out"
            )
    if model.quantize == "none":
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"{choice} needs the package {PACKAGE}, which is not installed: "
            f"pip install -e '.[{EXTRA}]' (or pip install {PACKAGE})"
        )
    if model.compute_dtype == "fp32" and run.train.precision != "fp32":
        raise ConfigError(
            f"model.compute_dtype=fp32 with train.precision={run.train.precision}: products under "
            "autocast are in bf16 all the same; set model.compute_dtype=auto or "
            "train.precision=fp32"
        )
    _validate_method(run, choice)
    untried = {
        f"launch.num_processes={run.launch.num_processes}": run.launch.num_processes > 1,
        "launch.accelerate=fsdp": run.launch.sharded,
        "train.compile=true": run.train.compile,
    }
    instead = {"launch.num_processes": "1", "launch.accelerate": "null", "train.compile": "false"}
    for setting in (name for name, given in untried.items() if given):
        key = setting.partition("=")[0]
        raise ConfigError(
            f"{choice} with {setting} is untried: set {key}={instead[key]}, or model.quantize=none"
        )


def _validate_method(run: RunConfig, choice: str) -> None:
    method = run.method
    if reason := NEED_FLOATS.get(method.name):
        raise ConfigError(
            f"{choice}: method={method.name} {reason}; use method=lora, or model.quantize=none"
        )
    fields = method.fields if isinstance(method, PeftMethod | LoraMethod) else {}
    bias = getattr(method, "bias", None) or fields.get("bias") or "none"
    if bias != "none":
        where = "method.bias" if isinstance(method, LoraMethod) else "method.fields.bias"
        raise ConfigError(
            f"{choice} with {where}={bias}: layers of packed weights give no gradient to their "
            f"biases; set {where}=none, or model.quantize=none"
        )
    init = method.init if isinstance(method, LoraMethod) else fields.get("init_lora_weights")
    if str(init).startswith(STARTS):
        where = "init" if isinstance(method, LoraMethod) else "fields.init_lora_weights"
        raise ConfigError(
            f"{choice} with method.{where}={init}: this start reads the base's weights, which are "
            f"packed; set method.{where}=true, gaussian or orthogonal, or model.quantize=none"
        )
    tried = TYPES + (ON_INT8 if run.model.quantize == "int8" else ())
    if isinstance(method, PeftMethod) and method.peft_type.upper() not in tried:
        raise ConfigError(
            f"{choice}: method.peft_type={method.peft_type} needs weights that are not packed, or "
            f"is untried; choose one of {', '.join(tried)}, or model.quantize=none"
        )
