"""The simulated world: clock, randomness, disk and links under which the real node runs.

A run is a function of its seed: same seed, same bytes. This room must never touch real time, disk,
network, threads or randomness, and holds no logic of a node.
"""
