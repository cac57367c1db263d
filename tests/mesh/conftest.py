"""The fixtures of the mesh's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from mesh_cell import Cell, SeededRandomness
from trio.testing import MockClock

from knode.transport.certificate import make_certificate
from knode.transport.memory import MemoryNetwork
from knode.world.real import RealClock


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a test virtual time when one of its fixtures asks for it; pytest-trio looks at its own alone."""
    for item in items:
        if item.path.parent == Path(__file__).parent and "autojump_clock" in getattr(
            item, "fixturenames", ()
        ):
            item.add_marker(pytest.mark.trio(run=_run_in_virtual_time), append=False)


def _run_in_virtual_time(test: Callable[..., Any], **options: Any) -> Any:
    return trio.run(test, **{**options, "clock": MockClock(autojump_threshold=0)})


@pytest.fixture
async def cell(tmp_path: Path, nursery: trio.Nursery, autojump_clock: object) -> Cell:
    """A network in memory, in virtual time."""
    return Cell(tmp_path, nursery, MemoryNetwork(SeededRandomness("network")))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "tls.pem"
    path.write_bytes(make_certificate(RealClock().wall()))
    return path
