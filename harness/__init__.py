"""An experiment harness for parameter-efficient fine-tuning of GPT-2.

In a notebook: `from harness import compose, plan, run, collect` (`harness.api`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.api import collect, compose, plan, run

__version__ = "0.1.0"
__all__ = ["collect", "compose", "plan", "run"]


def __getattr__(name: str) -> Any:  # not before it is asked for: the controller imports no pandas
    if name not in __all__:
        raise AttributeError(f"module 'harness' has no attribute '{name}'")
    from harness import api

    return getattr(api, name)
