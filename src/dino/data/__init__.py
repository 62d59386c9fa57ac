"""Images: where they lie, how they are read, and the views DINO makes of them."""
