"""Where commands were before the harness had packages: `python -m harness.plan` still works.

`harness/__init__.py` adds this folder to the package's path, so that `harness.NAME` is found here.
Each says on standard error what to write now.
"""
