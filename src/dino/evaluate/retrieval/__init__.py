"""Image retrieval and copy detection (paper section 4.2.1)."""
