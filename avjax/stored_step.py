"""One stored step: its arrays, their checksums and the record beside them.

Layout of `<directory>/<step>/`: `state` (Orbax) and `record/metadata` (JSON).
"""

import contextlib
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from avjax import trees
from avjax.errors import InputError


class DamageError(Exception):
  """A stored step that cannot be trusted; says which array or file."""


def load(path: pathlib.Path, template: Any, choose: Any) -> tuple[Any, Any]:
  """Record and verified state of one step's folder.

  Raises:
    DamageError: a file is missing or unreadable, or a checksum differs.
    InputError: the template does not fit.
  """
  body = read_record(path)
  stored = {name: body["arrays"][name] for name in choose(list(body["arrays"]))}
  if template is None:
    wanted = {name: _host_leaf(row) for name, row in stored.items()}
  else:
    wanted = {p: _stored_form(x) for p, x in trees.flatten(template).items()}
    _check_template(path, wanted, stored)
  arguments = ocp.args.PyTreeRestore(
    item=trees.unflatten(wanted),
    restore_args=trees.unflatten({p: _how(x) for p, x in wanted.items()}),
    partial_restore=True,
  )
  try:
    with _silent_leftovers():
      handler = ocp.PyTreeCheckpointHandler()
      tree = handler.restore(path / "state", args=arguments)
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise  # Out of memory says nothing about the files.
  except Exception as error:
    # A flipped byte in Orbax's own metadata may end in any of them.
    reason = f"checkpoint {path} cannot be read: {first_line(error)}"
    raise DamageError(reason) from error
  found = trees.flatten(tree)
  leaves = {name: found.get(name) for name in stored}
  _verify(path, leaves, stored)
  for name, row in stored.items():
    if row["key"]:
      leaves[name] = jax.random.wrap_key_data(leaves[name], impl=row["key"])
  empty = {key: {} for key in body["empty"]} if choose is list else {}
  return body, {**empty, **trees.unflatten(leaves)}


def _verify(path, leaves, stored) -> None:
  """Raises DamageError unless the arrays are those of the record."""
  for name, row in stored.items():
    leaf = leaves[name]
    # What Orbax did not find may come back as the template's own leaf.
    there = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not there or [list(leaf.shape), str(leaf.dtype)] != [
      row["shape"],
      row["dtype"],
    ]:
      raise DamageError(f"checkpoint {path} is damaged: {name} is not there")
  sums = checksums(leaves)
  bad = [name for name, row in stored.items() if sums[name] != row["sum"]]
  if bad:
    raise DamageError(
      f"checkpoint {path} is damaged: the checksum of {bad[0]} is "
      f"{sums[bad[0]]}, not {stored[bad[0]]['sum']}"
      + (f" ({len(bad) - 1} more arrays differ)" if len(bad) > 1 else "")
    )


@contextlib.contextmanager
def _silent_leftovers():
  """Keeps one unreadable array from printing a message for every other one.

  Orbax gives up at the first and closes its event loop, under the feet of the
  reads that are still running.
  """
  hook = sys.unraisablehook

  def filtered(info):
    if "Event loop is closed" not in str(info.exc_value):
      hook(info)

  sys.unraisablehook = filtered
  try:
    yield
  except Exception:
    time.sleep(0.2)  # Till they have come to their ends.
    raise
  finally:
    sys.unraisablehook = hook


def _check_template(path, wanted, stored) -> None:
  for name in sorted(wanted.keys() | stored.keys()):
    if name not in stored:
      raise InputError(
        f"checkpoint {path} has no array {name!r}, which the model expects "
        f"with shape {list(wanted[name].shape)}"
      )
    row = stored[name]
    if name not in wanted:
      raise InputError(
        f"checkpoint {path} holds an array {name!r} with shape "
        f"{row['shape']}, which the model does not have"
      )
    ours = [list(wanted[name].shape), str(wanted[name].dtype)]
    theirs = [row["shape"], row["dtype"]]
    if ours != theirs:
      raise InputError(
        f"{name!r} is {theirs[1]} {theirs[0]} in checkpoint {path} and "
        f"{ours[1]} {ours[0]} in the model"
      )


# --- Arrays ------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and sharding of what is stored for a template's leaf."""
  sharding = getattr(leaf, "sharding", None)
  if _is_key(leaf):
    leaf = jax.eval_shape(
      jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    )
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _host_leaf(row: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(row["shape"]), jnp.dtype(row["dtype"]))


def _how(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
  if leaf.sharding is None:
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
  return ocp.ArrayRestoreArgs(
    restore_type=jax.Array,
    sharding=leaf.sharding,
    global_shape=leaf.shape,
    dtype=leaf.dtype,
  )


def pack(step, state, metrics, extra) -> tuple[dict[str, Any], dict[str, Any]]:
  """Arrays by path, and the record that goes beside them."""
  keys, _ = jax.tree_util.tree_flatten_with_path(state)
  for path, leaf in keys:
    if not all(isinstance(k, jax.tree_util.DictKey) for k in path):
      name = jax.tree_util.keystr(path)
      raise InputError(f"state{name} is not in nested dicts; {type(leaf)}")
  arrays, rows = {}, {}
  for name, leaf in trees.flatten(state).items():
    key = str(jax.random.key_impl(leaf)) if _is_key(leaf) else ""
    leaf = jax.random.key_data(leaf) if key else leaf
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    arrays[name] = leaf
    rows[name] = {
      "shape": list(leaf.shape),
      "dtype": str(leaf.dtype),
      "key": key,
    }
  for name, value in checksums(arrays).items():
    rows[name]["sum"] = value
  body = {
    "step": step,
    "arrays": rows,
    "empty": [key for key, value in state.items() if not trees.flatten(value)],
    "metrics": {name: float(value) for name, value in metrics.items()},
    "extra": dict(extra),
  }
  try:
    body = json.loads(json.dumps(body))
  except TypeError as error:
    raise InputError(
      f"extra of checkpoint {step} is not JSON: {error}"
    ) from error
  return arrays, {"body": body, "crc32": _crc32(body)}


def _crc32(body: Any) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read_record(path: pathlib.Path) -> dict[str, Any]:
  """The record of one step's folder, verified; raises DamageError."""
  file = path / "record" / "metadata"
  try:
    record = json.loads(file.read_text())
    body, crc32 = record["body"], record["crc32"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    reason = f"checkpoint {path}: {file} cannot be read: {first_line(error)}"
    raise DamageError(reason) from error
  if _crc32(body) != crc32:
    raise DamageError(f"checkpoint {path}: {file} fails its checksum")
  return body


def checksums(arrays: Mapping[str, Any]) -> dict[str, str]:
  """64 bits per array, as 16 hexadecimal digits.

  Two sums, modulo 2^32, of mixed words: each word is mixed with its position
  in the whole array, so any change of one word shows, any other change but
  for one in 2^64 does, and the result does not depend on how the array is
  spread over devices and processes.
  """
  sums = {}
  for name, array in arrays.items():
    on_host = not isinstance(array, jax.Array) or (
      array.is_fully_addressable and _on_cpu(array)
    )
    sums[name] = _host_sums(array) if on_host else _device_sums(array)
    if jax.process_count() > 1:
      # Processes that add up several arrays at a time wait for each other, each
      # for the sum that another has not begun.
      jax.block_until_ready(sums[name])
  return {
    name: f"{int(first):08x}{int(second):08x}"
    for name, (first, second) in jax.device_get(sums).items()
  }


def _on_cpu(array: jax.Array) -> bool:
  return all(d.platform == "cpu" for d in array.sharding.device_set)


def _mix(words: Any) -> Any:
  """The final mix of MurmurHash3: a bijection of 32 bits."""
  words = words ^ (words >> np.uint32(16))
  words = words * np.uint32(0x85EBCA6B)
  words = words ^ (words >> np.uint32(13))
  words = words * np.uint32(0xC2B2AE35)
  return words ^ (words >> np.uint32(16))


def _two_sums(words: Any, position: Any) -> tuple[Any, Any]:
  position = _mix(position + np.uint32(0x9E3779B9))
  first = _mix(words ^ position)
  second = _mix(first + position)
  return first.sum(dtype=np.uint32), second.sum(dtype=np.uint32)


def _host_sums(array: Any) -> tuple[int, int]:
  array = np.ascontiguousarray(array).reshape(-1)
  size = array.dtype.itemsize
  words = array.view(np.uint32 if size >= 4 else f"u{size}")
  totals, chunk = [0, 0], 1 << 16  # Words that stay in the cache.
  for start in range(0, words.size, chunk):
    part = words[start : start + chunk].astype(np.uint32)
    position = np.arange(start, start + part.size).astype(np.uint32)
    for i, value in enumerate(_two_sums(part, position)):
      totals[i] = (totals[i] + int(value)) % 2**32
  return totals[0], totals[1]


@jax.jit
def _device_sums(array: jax.Array) -> tuple[jax.Array, jax.Array]:
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  size = array.dtype.itemsize
  words = jax.lax.bitcast_convert_type(
    array, jnp.uint32 if size >= 4 else f"uint{8 * size}"
  ).astype(jnp.uint32)
  position, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    position = position + index * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return _two_sums(words, position)


def first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:500]}"
