"""One server for all tests here that neither end nor fill one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.serving import slow_readers
from benchmarks.serving.served import Served, served


@pytest.fixture(scope="session")
def idle_server() -> Iterator[Served]:
    """A server with nothing under way."""
    with served(*slow_readers.FLAGS) as found:
        yield found
