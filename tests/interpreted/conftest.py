"""The tests of this folder run twice: in Triton's interpreter, and compiled for sm_80 and executed.

``TRITON_INTERPRET=1 pytest tests/interpreted`` and ``SADCL_EXECUTE_PTX=1 pytest tests/interpreted``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sadcl._backends import triton_interprets


@pytest.fixture(autouse=True)
def _executed() -> Iterator[None]:
    if triton_interprets():
        yield
        return
    from tests.ptx.launching import executing

    with executing():
        yield
