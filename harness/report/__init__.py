"""Views of an experiment's results: the table, its statistics, equal budgets, learning curves.

    python -m harness.report outputs/main

`table` has a row per configuration; `evidence` intervals, paired tests, ranks and fronts from nats
per document; `views` the same runs at equal budgets; `summary` puts all on the terminal and in CSV.
"""
