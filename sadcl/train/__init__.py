"""Reference training: the method's two steps, on scenes or one's own pictures. ``python -m sadcl.train``."""
