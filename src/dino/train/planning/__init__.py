"""What a run will take, and which run fits a time."""
