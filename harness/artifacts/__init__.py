"""What can be done with the files of a finished run: export it, sample from it, take it apart.

`export` makes a folder that transformers or PEFT load, `sample` completes prompts, `anatomy` looks
at what training added to each weight, `compress` and `interpolate` at how much of it is needed.

Imports `runs` and below.
"""
