"""Nested dicts <-> flat dicts whose keys are paths such as `encoder/norm`."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by path, in the tree's own order.

  Any pytree will do: a list's keys are its positions, a named tuple's its
  fields. None is an empty node, not a leaf.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
    for keys, leaf in leaves
  }


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict; inverse of `flatten` for trees made of dicts alone."""
  return traverse_util.unflatten_dict(dict(leaves), sep="/")
