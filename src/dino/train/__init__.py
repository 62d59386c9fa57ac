"""Pretraining: settings, recipes, the loop, checkpoints, the record of a run."""
