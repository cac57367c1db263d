"""`python -m benchmarks [NAME...]`: run the benchmarks that are named, or all, and print one table.

A target that is missed says so in its column and is no failure; a benchmark that does not run is one.
"""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import subprocess
import sys

import benchmarks
from benchmarks.report import Row, table

_NOT_BENCHMARKS = {"__main__", "memory", "report", "soak"}
# a fresh process for each, so that one's memory and imports do not slow another
_CHILD = "import sys; from benchmarks.__main__ import hand_over; hand_over(sys.argv[1])"


def names() -> list[str]:
    """Return the names of all benchmarks, sorted."""
    found = {module.name for module in pkgutil.iter_modules(benchmarks.__path__)}
    return sorted(name for name in found - _NOT_BENCHMARKS if not name.startswith("_"))


def hand_over(name: str) -> None:
    """Run one benchmark and write its rows, pickled, to the standard output."""
    rows: list[Row] = importlib.import_module(f"benchmarks.{name}").run()
    sys.stdout.buffer.write(pickle.dumps(rows))


def main(wanted: list[str]) -> int:
    """Run the benchmarks; return the exit code."""
    if unknown := sorted(set(wanted) - set(names())):
        print(f"no benchmark {', '.join(unknown)}: there are {', '.join(names())}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    failed = []
    for name in wanted or names():
        print(f"running {name}", file=sys.stderr, flush=True)
        child = subprocess.run([sys.executable, "-c", _CHILD, name], stdout=subprocess.PIPE, check=False)
        if child.returncode:
            failed.append(name)
        else:
            rows += pickle.loads(child.stdout)
    print(table(rows))
    if failed:
        print(f"did not run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
