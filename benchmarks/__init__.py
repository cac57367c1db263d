"""How fast knode is, each figure beside the floor it was measured with in the same run.

A benchmark is a module here with `run() -> list[Row]`. Figures of a shared machine swing; ratios to a
floor measured in turn with the figure, median of ten, hold. Nothing in knode may import this package.
"""
