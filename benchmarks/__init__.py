"""Benchmarks: ``python -m benchmarks`` prints interleaved comparisons, ``pytest benchmarks`` keeps single timings."""
