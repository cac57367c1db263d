"""The fixtures of the mesh's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from mesh_cell import Cell, SeededRandomness

from knode.transport.certificate import make_certificate
from knode.transport.memory import MemoryNetwork
from knode.world.real import RealClock


@pytest.fixture
async def cell(tmp_path: Path, nursery: trio.Nursery, autojump_clock: object) -> Cell:
    """A network in memory, in virtual time."""
    return Cell(tmp_path, nursery, MemoryNetwork(SeededRandomness("network")))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "tls.pem"
    path.write_bytes(make_certificate(RealClock().wall()))
    return path
