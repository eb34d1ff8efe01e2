"""Overrides of one short run of every kind: what `finished_run` is asked for."""

LORA = ("method=lora", "method.r=4", "train.lr=0.02")
QV = ("method=lora_paper", "train.lr=0.02")
FULL = ("method=full", "train.lr=0.002", "model.dropout=0.1")
UDV = ("method=udv", "train.lr=0.3")
TRUNCATE = ("method=truncate", "method.rank=0.9")
PROMPTS = (
    "method=peft", "method.peft_type=PROMPT_TUNING", "+method.fields.num_virtual_tokens=4",
    "train.lr=0.05",
)  # fmt: skip
NONE = ("method=none",)
