"""Audio-visual representation learning in JAX."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
  # Importing avjax must stay cheap and must not start JAX.
  if name == "load":
    from avjax.model import load

    return load
  raise AttributeError(f"module 'avjax' has no attribute {name!r}")
