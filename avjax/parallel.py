"""The mesh, and which array lies where on it.

Axes: `data` splits the batch, `fsdp` splits the batch and the parameters,
`tensor` splits the parameters within a layer. All sharding is jit's: this file
only says where the arguments and results of the step lie.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from avjax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = P(("data", "fsdp"))

# First match of a parameter's path decides; the rest is replicated. Column
# and row parallel pairs keep one all-reduce per branch (Megatron-LM, §3).
RULES = (
  (r"(attention/qkv|cross/query|cross/kv)/kernel$", P("fsdp", "tensor")),
  (r"(attention|cross)/out/kernel$", P("tensor", "fsdp")),
  (r"mlp(_query)?/fc1/kernel$", P("fsdp", "tensor")),
  (r"mlp(_query)?/fc2/kernel$", P("tensor", "fsdp")),
  (
    r"(attention/qkv|cross/query|cross/kv|mlp(_query)?/fc1)/bias$",
    P("tensor"),
  ),
  # Convolutions of one channel each, and tables: of words, of places.
  (r"conv/kernel$", P(None, "fsdp")),
  (r"(embedding|positions\w*)$", P(None, "fsdp")),
  (r"kernel$", P("fsdp", None)),
)


def make_mesh(section: Any, devices: list[Any] | None = None) -> Mesh:
  """The mesh of `config.mesh`; one axis may be -1 (what is left).

  Raises:
    InputError: the axes do not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [int(section[axis]) for axis in AXES]
  if min(shape) < -1 or 0 in shape or shape.count(-1) > 1:
    raise InputError(f"mesh {dict(zip(AXES, shape, strict=True))} is not valid")
  known = int(np.prod([n for n in shape if n > 0]))
  if -1 in shape:
    if len(devices) % known:
      raise InputError(
        f"{len(devices)} devices do not divide by the {known} of the mesh's "
        f"other axes {dict(zip(AXES, shape, strict=True))}"
      )
    shape[shape.index(-1)] = len(devices) // known
  total = int(np.prod(shape))
  if total > len(devices) or (total < len(devices) and process_count() > 1):
    raise InputError(
      f"mesh {dict(zip(AXES, shape, strict=True))} needs {total} devices; "
      f"there are {len(devices)}"
    )
  mesh = jax.make_mesh(
    shape, AXES, devices=devices[:total], axis_types=(AxisType.Auto,) * 3
  )
  _check_owners(np.vectorize(lambda device: device.process_index)(mesh.devices))
  return mesh


def _check_owners(owners: np.ndarray) -> None:
  """Devices that compute the same examples belong to one process, which reads.

  Args:
    owners: [data, fsdp, tensor] the process of each device of a mesh.

  Raises:
    InputError: some do not.
  """
  if (owners != owners[..., :1]).any():
    _, counts = np.unique(owners, return_counts=True)
    raise InputError(
      f"mesh.tensor={owners.shape[-1]} goes over devices of several processes, "
      f"of which each has {counts.min()}: those of tensor read the same "
      "examples and have to be of one process"
    )


def process_count() -> int:
  """Number of JAX processes of the run."""
  return jax.process_count()


def ways(mesh: Any, axes: Sequence[str] = BATCH_SPEC[0]) -> int:
  """Number of devices along some axes; by default those that split a batch."""
  return math.prod(mesh.shape[axis] for axis in axes)


def check_batch(batch_size: int, mesh: Mesh, what: str = "batch size") -> None:
  """Raises InputError where a batch does not divide the mesh."""
  n = ways(mesh)
  if batch_size < 1:
    raise InputError(f"{what} {batch_size} is less than 1")
  if batch_size % n:
    raise InputError(
      f"{what} {batch_size} is not divisible by the {n} devices of the "
      f"mesh's data x fsdp axes {dict(mesh.shape)}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples are split over `data` and `fsdp`."""
  return NamedSharding(mesh, BATCH_SPEC)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


def path_name(path: tuple[Any, ...]) -> str:
  """'encoder/block_00/norm1/scale' of a jax tree path."""
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in path
  )


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The partition of one array by RULES.

  An axis that does not divide its dimension is left out. Stacked layers (a
  leading dimension in `…/blocks/…`) are not split along the layers.
  """
  rule = next((r for pattern, r in RULES if re.search(pattern, name)), None)
  if rule is None:
    return P()
  lead = len(shape) - len(rule)
  if lead < 0:
    return P()
  axes = [None] * lead + list(rule)
  return P(
    *(
      axis if axis and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(axes, shape, strict=True)
    )
  )


def shardings(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every array of a tree of parameters or moments."""

  def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    spec = spec_of(path_name(path), leaf.shape, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, tree)


def gathered(tree: Any, mesh: Mesh) -> Any:
  """Parameters as layers use them: what `fsdp` keeps in parts is whole.

  Without this the compiler may split a layer's channels like its kernel and
  send activations instead. The layers of a scan are gathered together.
  """
  if mesh.shape["fsdp"] == 1:
    return tree

  def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    spec = spec_of(path_name(path), leaf.shape, mesh)
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return lax.with_sharding_constraint(leaf, NamedSharding(mesh, whole))

  return jax.tree_util.tree_map_with_path(one, tree)


def to_host(tree: Any) -> Any:
  """Whole arrays as numpy, also where processes hold parts of them."""
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_get(tree)


def exchange(value: Any) -> list[Any]:
  """What each process passed, in their order; all have to call it.

  Args:
    value: as JSON can hold it; tuples come back as lists.
  """
  if jax.process_count() == 1:
    return [json.loads(json.dumps(value))]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(text)))
  padded = np.pad(text, (0, int(sizes.max()) - len(text)))
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(np.asarray(rows), sizes, strict=True)
  ]
