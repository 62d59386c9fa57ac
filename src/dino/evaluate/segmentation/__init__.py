"""Segmentation from attention and patch features (paper section 4.2.2)."""
