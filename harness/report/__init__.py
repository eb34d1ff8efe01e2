"""Views of an experiment's results: the table, its statistics, equal budgets, learning curves.

    python -m harness.report outputs/main

`table` has a row per configuration; `evidence` intervals, paired tests, ranks and fronts from nats
per document; `views` the same runs at equal budgets; `summary` puts all on the terminal and in CSV.

In Python `harness.report(folder)` is the function of `harness.api`. Python sets a package's
attribute to a submodule when it imports it, so that this module is what must be callable.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package, which can be called as `harness.api.report`."""

    def __call__(self, folder: Any) -> Any:
        from harness import api

        return api.report(folder)


sys.modules[__name__].__class__ = _Callable
