"""The configuration of a run: its typed schema, its names, and what can be said of it by itself.

`schema` has the dataclasses that conf/ fills, `naming` a run's directory and identity, `errors` the
error that names a mistake. `rates` reads the learning rates that searches
have found, `rate_lookup` chooses one for a run, `default_rates` has the others.

Imports nothing else of the harness, and no torch: a typo is answered in well under a second.
"""
