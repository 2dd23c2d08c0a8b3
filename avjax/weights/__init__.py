"""Converters of public checkpoints, one file per family."""
