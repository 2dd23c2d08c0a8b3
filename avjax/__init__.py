"""Audio-visual representation learning in JAX."""
