"""The tests of this folder run twice: in Triton's interpreter, and compiled for sm_80 and executed.

``TRITON_INTERPRET=1 pytest tests/interpreted`` and ``SADCL_EXECUTE_PTX=1 pytest tests/interpreted``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter

from sadcl._backends import triton_interprets


@functools.cache
def _languages(function: Any) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


@pytest.fixture(scope="session", autouse=True)
def _patched_once() -> Iterator[None]:
    """Triton's interpreter puts its operators into its language at every launch, and again, for half of its time, at
    every call of a device function, where they are in place already.
    """
    patch = interpreter._patch_lang

    def where_missing(function: Any) -> Any:
        compiled = tl.core.is_builtin
        if any(compiled(lang.load) or compiled(lang.tensor.__add__) for lang in _languages(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as change:
        if hasattr(interpreter, "_LangPatchScope"):
            change.setattr(interpreter, "_patch_lang", where_missing)
        yield


@pytest.fixture(autouse=True)
def _executed() -> Iterator[None]:
    if triton_interprets():
        yield
        return
    from tests.ptx.launching import executing

    with executing():
        yield
