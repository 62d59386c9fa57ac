"""`dino data`: check, stats, preview."""
