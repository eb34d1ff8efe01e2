"""Files, locks, signals and the network: what a run asks of the operating system.

`atomic` writes a file whole or not at all, `digests` and `contents` fix what a run reads by its
content, `lock` keeps two workers out of one directory, `console` ends every command the same way.

Imports `config`.
"""
