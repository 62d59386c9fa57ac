"""The method: section 3 of the paper."""
