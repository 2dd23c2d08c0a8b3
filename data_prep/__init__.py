"""TFDS builders, one per data set."""
