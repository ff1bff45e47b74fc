"""The runtime of the CUDA C++ kernels without a GPU: compiler, disk cache, arguments, launches on a made-up driver."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sadcl.cuda import _cache, _launch, _nvrtc, _small
from sadcl.cuda._launch import Program
from sadcl.ops._library import OPS
from sadcl.testing.examples import EXAMPLES, PUBLISHED, Maker, Size

needs_nvrtc = pytest.mark.skipif(_nvrtc.path() is None, reason="NVRTC is not installed")
BACKWARD = Program("asl", "asl_backward", {"LOGITS": "bf16"})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_CACHE", str(tmp_path / "cache"))


def kept() -> list[Path]:
    """The files in the cache."""
    return sorted(path for path in _cache.folder().glob("*") if path.is_file())


@needs_nvrtc
def test_a_program_is_compiled_once_and_read_from_the_disk_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    first = BACKWARD.compiled("sm_90")
    assert first[:4] == b"\x7fELF" and len(kept()) == 1
    monkeypatch.setattr(_nvrtc, "compile_source", lambda *args: pytest.fail("compiled again"))
    assert BACKWARD.compiled("sm_90") == first


@needs_nvrtc
def test_every_part_of_the_key_makes_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("asl", {"LOGITS": "float", "KERNEL_asl_backward": 1}, "sm_90")
    keys = {_cache.key_of(*given), _cache.key_of(*given[:2], "sm_80")}
    keys.add(_cache.key_of("asl", {**given[1], "LOGITS": "bf16"}, "sm_90"))
    keys.add(_cache.key_of("bank", given[1], "sm_90"))
    with monkeypatch.context() as patch:
        patch.setattr(_nvrtc, "FLAGS", (*_nvrtc.FLAGS, "-G"))
        keys.add(_cache.key_of(*given))
    with monkeypatch.context() as patch:
        patch.setattr(_nvrtc, "version", lambda: (12, 9))
        keys.add(_cache.key_of(*given))
    with monkeypatch.context() as patch:  # a header of a header
        patch.setitem(_nvrtc.headers(), "simd.h", _nvrtc.headers()["simd.h"] + " ")
        keys.add(_cache.key_of(*given))
    assert len(keys) == 7
    assert _cache.key_of(*given) in keys


@needs_nvrtc
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"",
                                    lambda content: content[:-1] + bytes([content[-1] ^ 1])])  # fmt: skip
def test_a_broken_file_is_made_anew(damage: Any) -> None:
    made = BACKWARD.compiled("sm_80")
    (path,) = kept()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert BACKWARD.compiled("sm_80") == made
    assert path.read_bytes() == whole and kept() == [path]


@needs_nvrtc
def test_a_folder_that_cannot_be_written_is_said_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SADCL_CACHE", str(tmp_path / "file"))
    assert BACKWARD.compiled("sm_80")[:4] == b"\x7fELF"
    assert "cannot keep a compiled kernel" in capsys.readouterr().err


@needs_nvrtc
def test_a_compiler_error_holds_the_log() -> None:
    with pytest.raises(_nvrtc.CompileError, match=r"(?s)asl.cu for sm_90 with .*'LOGITS': 'nonsense'.*identifier"):
        Program("asl", "asl_backward", {"LOGITS": "nonsense"}).compiled("sm_90")
    assert kept() == []


@needs_nvrtc
def test_a_part_that_the_compiler_does_not_know_gets_ptx_of_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _nvrtc.target_of(90) == "sm_90"
    monkeypatch.setattr(_nvrtc, "supported", lambda: (80, 90, 100))
    assert _nvrtc.target_of(101) == "compute_100"
    with pytest.raises(RuntimeError, match="sm_75, older than the sm_80"):
        _nvrtc.target_of(75)
    assert b".target sm_80" in BACKWARD.compiled("compute_80")


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _nvrtc.library.cache_clear()
    monkeypatch.setattr(_nvrtc, "path", lambda: None)
    with pytest.raises(RuntimeError, match="NVRTC was not found"):
        _nvrtc.library()


def test_sources_are_plain() -> None:
    """NVRTC has no header of C or C++; and one kernel alone is compiled of each source."""
    for path in sorted(_nvrtc.folder().glob("cuda/*")):
        text = path.read_text()
        assert "#include <" not in text and text.isascii(), path.name
        if path.suffix == ".cu" and text.count("__global__") > 1:
            assert text.count("__global__") == text.count("#ifdef KERNEL_"), path.name
    for name in _small.implemented():
        assert _nvrtc.included(name)


class Driver:
    """Stands for the driver's library: keeps what it is asked, and reads the arguments of a launch as it would."""

    def __init__(self, form: str) -> None:
        self.form, self.asked = form, list[tuple[Any, ...]]()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if "Launch" in name:
                words = self.form.split()  # one a parameter
                places = [ctypes.string_at(args[9][k], 8 * len(word)) for k, word in enumerate(words)]
                values = [struct.unpack(f"<{word}", place) for word, place in zip(words, places, strict=True)]
                self.asked.append((name, *args[1:8], values))
            else:
                self.asked.append((name, *args[1:]))
            return 0

        return call


def test_arguments_arrive_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers, integers, doubles and structs, in the order of the kernel; more shared memory is asked for."""
    tensor = torch.zeros(3)
    driver = Driver("Q Q q d qqq")
    monkeypatch.setattr(_launch, "driver", lambda: driver)
    monkeypatch.setattr(_launch, "_module", lambda program, index: ctypes.c_void_p(7))
    monkeypatch.setattr(_launch, "_functions", {})
    _launch._primary.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=11))
    args = (tensor, None, -5, 0.25, (1, 2, -3))
    for cooperative in (False, True):
        _launch.launch(BACKWARD, grid=4, threads=128, shared=50 << 10, args=args, cooperative=cooperative)
    values = [(tensor.data_ptr(),), (0,), (-5,), (0.25,), (1, 2, -3)]
    names = [row[0] for row in driver.asked]
    made_current = ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]  # it had none
    assert names[:6] == [*made_current, "cuFuncSetAttribute", "cuLaunchKernel"]
    assert names[6:] == ["cuCtxGetCurrent", "cuCtxSetCurrent", "cuLaunchCooperativeKernel"]
    assert driver.asked[4][1:] == (8, 50 << 10)
    for row in (driver.asked[5], driver.asked[8]):
        assert row[1:8] == (4, 1, 1, 128, 1, 1, 50 << 10)
        assert row[8] == values
    _launch.launch(BACKWARD, grid=0, threads=128, args=args)
    assert len(driver.asked) == 9


def record(op: str, size: Size) -> dict[int, list[Any]]:
    """The launches of an op, forward and backward, on meta tensors, by the number of its example."""
    declared, found = OPS[op], dict[int, list[Any]]()
    for number, x in enumerate(EXAMPLES[op](Maker(size, torch.bfloat16, "meta"))):
        with (
            _launch.recording(_launch.PARTS["sm_90"]) as found[number],
            contextlib.suppress(ValueError if op == "mlc" else ()),  # some weightings are Triton's alone
        ):
            out = declared.run(x, "cuda")
            if declared.derivative is not None:
                declared.derivative.run(declared.derivative.pack(out[: declared.results], x, out), "cuda")
    return found


def test_few_programs_serve_every_batch() -> None:
    """Of one loss in one dtype: at most six compiled versions a kernel, over batches from 1 to 256."""
    programs: dict[tuple[str, int, str], set[Program]] = {}
    for b in (*range(1, 20), *range(20, 257, 59), 256):
        for op in (name for name, op in OPS.items() if "cuda" in op.backends):
            if op != "dual_mean" or b * PUBLISHED.c <= 1 << 13:
                for number, launches in record(op, replace(PUBLISHED, b=b)).items():
                    for launch in launches:
                        programs.setdefault((op, number, launch.name), set()).add(launch.program)
    assert len(programs) >= 16
    assert all(len(found) <= 6 for found in programs.values()), {n: len(found) for n, found in programs.items()}
