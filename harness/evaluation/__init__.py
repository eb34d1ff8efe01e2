"""What a model is worth: perplexity, published protocols, generation, classification.

`sliding_window` is the one that every run uses. Everything here gives nats, tokens, bytes and
documents, from which tables make perplexities with their intervals.

Imports `methods`, `models` and below.
"""
