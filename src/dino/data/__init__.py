"""Images: their sources, how they are read, and the views DINO makes of them."""
