"""Measurements of features: one file, one protocol."""
