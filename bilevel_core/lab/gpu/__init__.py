"""What wants a GPU, in a few minutes of one: pieces in the order of their worth, each kept, stopped and taken up again.

`make gpu MINUTES=8` or `python3 -m bilevel_core.lab.gpu --minutes 8`; `make gpu-merge` turns what it left into results.
"""
