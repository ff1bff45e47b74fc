"""Triton kernels: one file per op, device code first, then the launcher that ``sadcl.ops`` calls.

Rules that hold in every file:

- no launch waits for the device. Grids are sized by capacity or by the part's multiprocessors; counts are read on the
  device and programs without work leave early. A step can be captured in a CUDA graph.
- no float atomics: the same inputs on the same part give the same bits.
- statistics are float32 (float64 for float64 inputs), norms float64, offsets int64 before the multiply.
- ``TRITON_INTERPRET=1`` runs all of it on CPU tensors. Operands of 16 bits are widened there (see ``_device.py``), so
  the tensor-core path is compiled by ``python -m benchmarks.gpu_static`` and not executed.

Imports triton; nothing under ``sadcl`` imports this package before a call asks for ``backend="triton"``.
"""
