"""`dino export`: weights for other programs, with a model card."""
