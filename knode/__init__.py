"""knode: the machines that you own, as one private mesh of AI agents.

Each room of the house is a package; a room imports only from the floors below it
(`docs/architecture.md` has the picture, `pyproject.toml` the contract that keeps it so).
"""

__version__ = "0.1.0"
