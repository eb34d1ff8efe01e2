"""From what was typed to finished runs: composed, checked, launched, tracked and resumed.

`overrides` and `composition` make a configuration of arguments, `validation` and `early_checks`
refuse what cannot be, `grids` and `search` are the sweeps, `decision` says what becomes of a
run's directory and `launcher` does it, `worker` is one run from start to end by its `stages`,
`finished_run` reads it back. `estimate` predicts what a run will need.

Imports `report` and below; not `artifacts` or `commands`.
"""
