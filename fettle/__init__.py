"""Fettle: measured, certified variants of a transformer, served on Ray behind one router."""

__version__ = "0.1.0"
