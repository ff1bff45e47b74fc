"""Plain torch operators that run on any device: one file an op, under the op's name.

Files here know no op: ``forward(x)`` and ``backward(upstream, x, saved, wanted)`` read fields of the tuples that
:mod:`sadcl.ops` declares, and answer with mappings of field names.
"""
