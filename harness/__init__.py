"""An experiment harness for parameter-efficient fine-tuning of GPT-2.

From Python: `from harness import compose, plan, run, sweep, report, collect` (`harness.api`). The
packages below, from the lowest to the highest: config, system, results, data, models, methods,
evaluation, training, report, runs, artifacts, commands. Each imports only those before it.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.api import RunFailedError, collect, compose, plan, report, run, sweep
    from harness.config.errors import ConfigError

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "RunFailedError",
    "collect",
    "compose",
    "plan",
    "report",
    "run",
    "sweep",
]
__path__.append(str(Path(__file__).with_name("commands") / "former"))


def __getattr__(name: str) -> Any:  # not before it is asked for: the controller imports no pandas
    if name == "ConfigError":
        from harness.config.errors import ConfigError

        return ConfigError
    if name not in __all__:
        raise AttributeError(f"module 'harness' has no attribute '{name}'")
    if name == "report":  # the package, which can be called: Python sets this attribute to it, too
        return importlib.import_module("harness.report")
    from harness import api

    return getattr(api, name)


class _ReportPackage(ModuleType):
    """The package `harness.report`, which can be called as the function `harness.api.report`.

    Python sets a package's attribute to a submodule when it imports it, so that after an import of
    anything in `harness.report` this module is what `harness.report(folder)` calls.
    """

    def __call__(self, folder: Any) -> Any:
        from harness import api

        return api.report(folder)


def _make_callable(module: str) -> None:
    sys.modules[module].__class__ = _ReportPackage
