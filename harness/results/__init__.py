"""What a run leaves on record: result.json, metrics.jsonl, and where they were made.

Imports `config` and `system`.
"""
