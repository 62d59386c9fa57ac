"""The page of a run: what is read from its folder, its verdict, its sections."""
