"""The views that DINO makes of an image (paper section 3.1, multi-crop)."""
