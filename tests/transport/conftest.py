"""The fixtures of the link tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from link_kinds import KINDS, Kind, Pair, open_pair
from trio.testing import MockClock

from knode.transport.certificate import make_certificate
from knode.world.real import RealClock


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "tls.pem"
    path.write_bytes(make_certificate(RealClock().wall()))
    return path


@pytest.fixture(params=["dialled", "accepted"])
def opener(request: pytest.FixtureRequest, kind: Kind, certificate: Path) -> Callable[[], Any]:
    """Opens pairs of links: the near end is the one that dialled, then the one that accepted."""

    @asynccontextmanager
    async def open_one() -> AsyncIterator[Pair]:
        async with open_pair(*kind.carriers(certificate), kind.listen_host) as (dialled, accepted):
            yield (dialled, accepted) if request.param == "dialled" else (accepted, dialled)

    return open_one


@pytest.fixture
async def pair(opener: Callable[[], Any]) -> AsyncIterator[Pair]:
    async with opener() as both:
        yield both


@pytest.fixture
def tenfold_clock() -> MockClock:
    """A clock that runs ten times as fast, for real sockets with deadlines of seconds."""
    return MockClock(rate=10)
