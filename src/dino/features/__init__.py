"""Frozen features: extraction, tables, cache, search, export."""
