"""The sub-commands of `harness` that belong to no other package, and their common frame.

Imports everything else.
"""
