"""Reproducible comparisons: each prints a table with its hardware, and then one JSON line."""
