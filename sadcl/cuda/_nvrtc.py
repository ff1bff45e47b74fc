"""NVRTC through ctypes: sources of ``csrc/cuda`` to a cubin for a part, or to PTX."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

OLDEST = 80  # sm_80: bfloat16, mma.sync of it, cp.async
# fmad: as csrc's kernels contract. No fast math: divisions and square roots are rounded correctly.
FLAGS = ("--std=c++17", "--fmad=true", "-default-device", "-lineinfo", "--extra-device-vectorization")
_PACKAGE = Path(__file__).resolve().parents[1]


class CompileError(RuntimeError):
    """NVRTC refused a source; the message holds its log."""


@functools.cache
def folder() -> Path:
    """``csrc``: inside the installed package, beside it in a checkout."""
    for found in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (found / "cuda").is_dir():
            return found
    raise FileNotFoundError(f"csrc/cuda is neither in {_PACKAGE} nor beside it")


@functools.cache
def headers() -> dict[str, str]:
    """Name, as it is included, to text: ``csrc/cuda/*.h`` and the formulas that the C++ kernels share."""
    paths = sorted((*folder().glob("cuda/*.h"), folder() / "vmath.h", *folder().glob("*_formula.h")))
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


@functools.cache
def source(name: str) -> str:
    """Text of ``csrc/cuda/<name>.cu``."""
    return (folder() / "cuda" / f"{name}.cu").read_text(encoding="utf-8")


def _candidates() -> Iterator[Path]:
    """Where NVRTC may be, best first: beside torch's own CUDA libraries, the toolkit, the loader's path."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations if spec is not None else None) or ():
        yield from sorted(Path(place).glob("*/lib/libnvrtc.so.*"), reverse=True)  # cu13 before cuda_nvrtc (12)
        yield from sorted(Path(place).glob("*/bin/**/nvrtc64_*_0.dll"), reverse=True)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield from sorted(Path(home).glob("lib64/libnvrtc.so.*"), key=lambda path: len(path.name))
            yield from sorted(Path(home).glob("bin/**/nvrtc64_*_0.dll"), reverse=True)


@functools.cache
def path() -> Path | None:
    """NVRTC's library file, or None. Loads nothing."""
    return next((found for found in _candidates() if ".alt." not in found.name), None)


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC, loaded.

    Raises:
        RuntimeError: it is not there, or cannot be loaded.
    """
    found = path()
    if found is None:
        raise RuntimeError("NVRTC was not found: it comes with torch's CUDA wheels (nvidia-cuda-nvrtc) and the toolkit")
    try:
        for builtins in sorted(found.parent.glob("libnvrtc-builtins.so.*")):  # NVRTC looks for it by name alone
            if ".alt." not in builtins.name:
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        nvrtc = ctypes.CDLL(str(found))
    except OSError as error:
        raise RuntimeError(f"NVRTC cannot be loaded from {found}: {error}") from error
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


@functools.cache
def version() -> tuple[int, int]:
    """Of the library that is loaded."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


@functools.cache
def supported() -> tuple[int, ...]:
    """Compute capabilities, as 90, that this NVRTC knows."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    found = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(found), "nvrtcGetSupportedArchs")
    return tuple(found)


def target_of(capability: int) -> str:
    """What to compile for a device: its own ``sm_90``, or PTX of an older ``compute_90``, which its driver takes.

    Raises:
        RuntimeError: the device is older than the kernels.
    """
    if capability < OLDEST:
        raise RuntimeError(f"backend='cuda': this GPU is sm_{capability}, older than the sm_{OLDEST} that it needs")
    if capability in supported():
        return f"sm_{capability}"
    return f"compute_{max(known for known in supported() if known <= capability)}"


def compile_source(name: str, defines: Mapping[str, object], target: str) -> bytes:
    """Compile ``csrc/cuda/<name>.cu``.

    Args:
        name: of the source.
        defines: macros.
        target: ``"sm_90"`` gives a cubin, ``"compute_90"`` PTX.

    Raises:
        CompileError: with NVRTC's log.
        RuntimeError: there is no NVRTC.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    names, texts = list(headers()), list(headers().values())
    array = ctypes.c_char_p * len(names)
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source(name).encode(), f"{name}.cu".encode(), len(names),
            array(*(text.encode() for text in texts)), array(*(header.encode() for header in names)),
        ),
        "nvrtcCreateProgram",
    )  # fmt: skip
    try:
        options = [f"--gpu-architecture={target}", *FLAGS, *(f"-D{key}={value}" for key, value in defines.items())]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = nvrtc.nvrtcCompileProgram(program, len(options), given)
        if code != 0:
            log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            why = nvrtc.nvrtcGetErrorString(code).decode()
            raise CompileError(f"{name}.cu for {target} with {dict(defines)}: {why}\n{log.strip(chr(0)).strip()}")
        if target.startswith("compute_"):
            return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).rstrip(b"\0")
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: object, fill: object, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "size")  # type: ignore[operator]
    buffer = ctypes.create_string_buffer(size.value)
    _check(fill(program, buffer), "result")  # type: ignore[operator]
    return buffer.raw[: size.value]


def _check(code: int, what: str) -> None:
    if code != 0:
        raise RuntimeError(f"NVRTC: {what}: {library().nvrtcGetErrorString(code).decode()}")


def included(name: str) -> tuple[str, ...]:
    """The texts that a source is made of: its own, and those of the headers that it includes, directly or not."""
    texts, wanted = [source(name)], [source(name)]
    seen: set[str] = set()
    while wanted:
        for header in re.findall(r'#include "([^"]+)"', wanted.pop()):
            if header not in seen:
                seen.add(header)
                texts.append(headers()[header])
                wanted.append(headers()[header])
    return tuple(texts)
