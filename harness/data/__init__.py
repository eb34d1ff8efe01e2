"""Text to tokens: sources, splits, packing, and the tables of tokens that runs share.

A text passes through these modules in order: `sources` and `documents` read it (`records` and
`encodings` strictly), `splits` divides it into train, validation and test, `packing` and
`token_tables` make tokens of it, `token_cache` finds them again, `token_data` hands them to a run.
`pairs` is the same for prompts with completions.

Imports `results`, `system` and `config`.
"""
