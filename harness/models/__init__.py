"""The base model: loaded from a package, a folder, the hub or a GGUF file; and its loss.

`pretrained` loads, `loss` is head and cross-entropy in one, `next_token` a language model with that
loss, `split_qkv` divides GPT-2's fused attention projection so that q, k and v can be adapted
apart, `linear` turns its `Conv1D` into `nn.Linear`.

Imports `data` and below. An import of the package makes transformers know the small LSTM.
"""

from harness.models.lstm import register_lstm

register_lstm()  # `model_type: lstm` for AutoConfig and AutoModelForCausalLM
