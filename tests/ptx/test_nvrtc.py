"""What NVRTC's PTX has that Triton's has not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.ptxemu import run


def test_what_nvrtc_writes_otherwise() -> None:
    """A bound on threads, a struct passed by value, generic addresses, votes of a warp."""
    text = """.version 9.0
.target sm_80
.address_size 64
.visible .entry one(
    .param .u64 one_param_0,
    .param .align 8 .b8 one_param_1[24],
    .param .f64 one_param_2
)
.maxntid 32, 1, 1
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<8>;
    .reg .f64 %fd<4>;
    ld.param.u64 %rd1, [one_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    ld.param.u64 %rd3, [one_param_1+16];
    ld.param.f64 %fd1, [one_param_2];
    mov.u32 %r1, %tid.x;
    setp.gt.u32 %p1, %r1, 28;
    vote.sync.ballot.b32 %r2, %p1, -1;
    cvt.rn.f64.s64 %fd2, %rd3;
    cvt.rn.f64.u32 %fd3, %r2;
    add.f64 %fd2, %fd2, %fd1;
    add.f64 %fd2, %fd2, %fd3;
    mul.wide.u32 %rd4, %r1, 8;
    add.s64 %rd5, %rd2, %rd4;
    st.global.f64 [%rd5], %fd2;
    ret;
}
"""
    out = np.zeros(32)
    run(text, 1, [out, (1, 2, -3), 0.25])
    assert (out == -3 + 0.25 + 0xE0000000).all()
    with pytest.raises(ValueError):
        run(text, 1, [out, (1, 2), 0.25])
