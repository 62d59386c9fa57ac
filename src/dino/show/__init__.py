"""Attention, components and reports of trained networks."""
