"""One file per paper, data set and stage."""
