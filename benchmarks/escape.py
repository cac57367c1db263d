"""The escape suite as one figure: how many of its tries got out of a sandbox."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.report import Row

SUITE = Path(__file__).parents[1] / "tests" / "agents" / "test_sandbox_escape.py"


def run() -> list[Row]:
    """Run the suite against every sandbox of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(SUITE), f"--junitxml={report}"],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    tries = int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
    escapes = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return [
        Row(
            name="escape suite, every sandbox here",
            figure=f"{escapes} of {tries} tries got out",
            floor="",
            ratio=float(escapes),
            target="no escape",
            met=escapes == 0 and tries > 0,
        )
    ]
