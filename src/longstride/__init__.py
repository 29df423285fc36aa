"""Longstride: molecular dynamics with learned long strides, measured against plain MD."""

__version__ = "0.1.0"
