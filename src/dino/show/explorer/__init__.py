"""`dino explore`: a page in which similar patches of images light up under the pointer."""
