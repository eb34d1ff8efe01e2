"""An experiment harness for parameter-efficient fine-tuning of GPT-2.

From Python: `from harness import compose, plan, run, sweep, report, collect` (`harness.api`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.api import collect, compose, plan, report, run, sweep

__version__ = "0.1.0"
__all__ = ["collect", "compose", "plan", "report", "run", "sweep"]


def __getattr__(name: str) -> Any:  # not before it is asked for: the controller imports no pandas
    if name not in __all__:
        raise AttributeError(f"module 'harness' has no attribute '{name}'")
    if name == "report":  # the package, which can be called: Python sets this attribute to it, too
        return importlib.import_module("harness.report")
    from harness import api

    return getattr(api, name)
