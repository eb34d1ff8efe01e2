"""Text to tokens: sources, splits, packing, and the tables of tokens that runs share.

A text passes through these modules in order: `documents` has the sources by name (SOURCES),
`sources` reads files, strictly (`records`, `encodings`), `splits` divides the documents into train,
validation and test, `packing` and `token_tables` make tokens of them, `token_cache` finds these
again, `token_data` hands them to a run.
`pairs` is the same for prompts with completions.

Imports `results`, `system` and `config`.
"""
