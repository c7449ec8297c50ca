"""Stillhouse: published systems of distillation and learning without labels, on one set of shared parts."""

__version__ = "0.1.0"
