"""CUDA C++ kernels (``csrc/cuda``), compiled by NVRTC when they are first used: for what is launch-bound.

One file an op, its launchers: ``<op>(x, out)`` and ``<op>_backward(upstream, x, saved, out)``, as the Triton ones.
Rules that hold in every file:

- a launch never waits for the device, takes all its sizes at run time, and can be captured in a CUDA graph (once the
  program is there: run a step before the capture, as torch asks for anyway);
- a program is a source, a kernel in it and a few defines (dtypes, flags), never a size: few versions serve all batches;
- memory comes from torch's allocator alone.

Needs no compiler at installation and none later: NVRTC comes with torch's CUDA wheels. Nothing imports this package
before a call asks for ``backend="cuda"``.
"""
