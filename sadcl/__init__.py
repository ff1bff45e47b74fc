"""Fused kernels and models for multi-label classification with label-level attention and dual contrastive losses."""

__version__ = "0.1.0"
