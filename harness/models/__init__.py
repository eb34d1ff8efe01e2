"""The base model: loaded from a package, a folder, the hub or a GGUF file; and its loss.

`pretrained` loads and counts, `loss` is head and cross-entropy in one, `split_qkv` divides GPT-2's
fused attention projection so that q, k and v can be adapted apart.

Imports `data` and below.
"""
