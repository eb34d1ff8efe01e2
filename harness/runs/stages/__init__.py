"""The stages of a run, in the order in which `harness.runs.worker.perform` goes through them.

`setup` checks and begins, `texts` reads, `adaptation` puts the method on the base, `preparation`
finds out how the model may be evaluated, `training`, `evaluation` and `costs` do what they say, and
`saving` writes the model down. Each adds what it finds to the run's result.
"""
