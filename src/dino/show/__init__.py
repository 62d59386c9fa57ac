"""Pictures of what emerged."""
