"""The processes of the group's tests end with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ranks


@pytest.fixture(scope="session", autouse=True)
def _processes_end() -> Iterator[None]:
    yield
    ranks.close_all()
