"""Views of an experiment's results: the table, its statistics, equal budgets, learning curves.

    harness report outputs/main

`table` has a row per configuration; `evidence` intervals, paired tests (`stats`), ranks and fronts
(`ranking`) from nats per document; `views` the same runs at equal budgets; `summary` puts all on
the terminal and in CSV; `page` is the HTML page.

Imports `results` and below, and the names of metrics from `evaluation`.
"""

import harness

harness._make_callable(__name__)
