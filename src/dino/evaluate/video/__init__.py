"""Video object segmentation (paper section 4.2.2, Table 5)."""
