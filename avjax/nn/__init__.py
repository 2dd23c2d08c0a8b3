"""Flax modules that papers share."""
