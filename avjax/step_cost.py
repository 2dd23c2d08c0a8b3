"""What a compiled step does, kernel by kernel, without running it.

Read from `compiled.as_text()`: how often each kernel runs (a loop's body as
often as the loop turns), the products that it does, the bytes that it reads
and writes and the operations on single numbers. Which of these costs how much
time is the business of avjax.device_rates.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avjax import collectives, hlo
from avjax.hlo import Line, Program

# Instructions that cost nothing by themselves.
FREE = frozenset({
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota",
  "after-all", "partition-id", "replica-id", "opt-barrier", "domain", "while",
  "call", "conditional", "broadcast", "async-start", "async-update",
  "async-done",
})  # fmt: skip
# Results of polynomials of some ten terms.
TRANSCENDENTAL = frozenset({
  "exponential", "log", "tanh", "power", "erf", "cosine", "sine", "logistic",
  "exponential-minus-one", "log-plus-one", "atan2", "tan", "cbrt",
})  # fmt: skip
SLOW = frozenset({"divide", "sqrt", "rsqrt", "remainder"})
MOVING = frozenset({
  "copy", "transpose", "slice", "dynamic-slice", "concatenate", "pad",
  "reverse", "reshape", "broadcast", "bitcast", "parameter", "constant", "iota",
  "tuple", "get-tuple-element", "dynamic-update-slice", "convert", "gather",
})  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product, as `jax.lax.dot_general` takes it.

  Attributes:
    dtype: of the operands, as numpy names it.
    left: shape.
    right: shape.
    dimensions: ((left, right) contracted, (left, right) of the batch).
  """

  dtype: str
  left: tuple[int, ...]
  right: tuple[int, ...]
  dimensions: tuple[
    tuple[tuple[int, ...], tuple[int, ...]],
    tuple[tuple[int, ...], tuple[int, ...]],
  ]

  @property
  def sizes(self) -> tuple[int, int, int, int]:
    """Batch, rows, inner and columns."""
    (left, right), (batch, other) = self.dimensions
    inner = math.prod(self.left[axis] for axis in left)
    many = math.prod(self.left[axis] for axis in batch)
    rows = math.prod(self.left) // (inner * many)
    columns = math.prod(
      n for axis, n in enumerate(self.right) if axis not in {*right, *other}
    )
    return many, rows, inner, columns

  @property
  def flops(self) -> int:
    """A multiply-add is two."""
    return 2 * math.prod(self.sizes)


@dataclasses.dataclass(frozen=True)
class Convolution:
  """A convolution, as `jax.lax.conv_general_dilated` takes it.

  Attributes:
    dtype: of the operands, as numpy names it.
    left: shape.
    right: shape of the kernel.
    result: shape.
    strides: of the window, by spatial axis.
    padding: before and after, likewise.
    dilations: of the left side and of the kernel, likewise.
    labels: axes of left, right and result, such as b01f, 01io and b01f.
    groups: of features and of the batch.
  """

  dtype: str
  left: tuple[int, ...]
  right: tuple[int, ...]
  result: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  dilations: tuple[tuple[int, ...], tuple[int, ...]]
  labels: tuple[str, str, str]
  groups: tuple[int, int]

  @property
  def flops(self) -> int:
    """A multiply-add is two; padding and holes count."""
    features = self.right[self.labels[1].index("o")]
    return 2 * math.prod(self.result) * math.prod(self.right) // features

  @property
  def axes(self) -> tuple[tuple[int, ...], ...]:
    """Of left, right and result in lax's order: b f, o i, b f, then space."""
    space = range(len(self.strides))
    return tuple(
      tuple(label.index(x) for x in (*first, *map(str, space)))
      for label, first in zip(self.labels, ("bf", "oi", "bf"), strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What one instruction does each time.

  Attributes:
    name: of the instruction.
    kind: product, convolution, elementwise, moving, reduction, scatter, sort
      or collective.
    times: how often it runs in a step.
    bytes: read and written.
    operations: on single numbers, products apart.
    transcendentals: exponentials and the like, not among `operations`.
    products: that it does.
    convolutions: likewise.
  """

  name: str
  kind: str
  times: int
  bytes: float
  operations: float = 0.0
  transcendentals: float = 0.0
  products: tuple[Product, ...] = ()
  convolutions: tuple[Convolution, ...] = ()

  @property
  def flops(self) -> int:
    """Of its products and convolutions, all times together."""
    parts = (*self.products, *self.convolutions)
    return self.times * sum(part.flops for part in parts)


def kernels(compiled: Any) -> list[Kernel]:
  """All that a program runs, by one device.

  Args:
    compiled: of `jax.stages.Lowered.compile`, or its text.

  A loop whose number of turns the compiler does not say counts once, and so
  does the dearest branch of a condition, the others not at all.
  """
  program = hlo.read(compiled)
  found = []
  for name, times in _turns(program).items():
    lines = program.computations[name]
    for line in lines.values():
      if line.op not in FREE:
        found.append(_kernel(line, lines, program, times))
  return found


def _turns(program: Program) -> hlo.Turns:
  """How often computations run; of branches the one with most products."""

  def dearest(ways: Sequence[hlo.Turns]) -> hlo.Turns:
    return max(ways, key=lambda way: _flops(program.computations, way))

  return program.turns(dearest, unknown=1)


def _flops(
  program: Mapping[str, dict[str, Line]], times: hlo.Turns
) -> tuple[int, int]:
  """Of the products; with equals, the number of lines decides."""
  total, count = 0, 0
  for name, turns in times.items():
    count += turns * len(program[name])
    for line in program[name].values():
      inside = _inside(line, program) or {line.name: line}
      places = inside if line.op == "fusion" else program[name]
      for one in inside.values():
        if one.op == "dot":
          total += turns * product(one, places).flops
  return total, count


def _kernel(
  line: Line,
  lines: dict[str, Line],
  program: Program,
  times: int,
) -> Kernel:
  inside = _inside(line, program.computations)
  body = inside or {line.name: line}
  places = inside or lines
  operations, transcendentals = _operations(body, places)
  products = tuple(
    product(one, places) for one in body.values() if one.op == "dot"
  )
  convolutions = tuple(
    convolution(one, places) for one in body.values() if one.op == "convolution"
  )
  kind = _kind(body)
  return Kernel(
    line.name,
    kind,
    times,
    _bytes(line, lines, inside),
    operations,
    transcendentals,
    products,
    convolutions,
  )


def _inside(
  line: Line, program: Mapping[str, dict[str, Line]]
) -> dict[str, Line] | None:
  """The lines of a fused kernel."""
  if line.op != "fusion":
    return None
  return program[hlo.CALLED.search(line.rest)[1]]


def _kind(body: dict[str, Line]) -> str:
  ops = {line.op for line in body.values()}
  if "dot" in ops:
    return "product"
  if "convolution" in ops:
    return "convolution"
  if any(op.removesuffix("-start") in collectives.SHARES for op in ops):
    return "collective"
  for op in ("sort", "scatter"):
    if op in ops:
      return op
  if ops & {"reduce", "reduce-window"}:
    return "reduction"
  return "moving" if ops <= MOVING else "elementwise"


def _operations(
  body: dict[str, Line], places: dict[str, Line]
) -> tuple[float, float]:
  """Operations on single numbers, and those that are transcendental."""
  plain, dear = 0.0, 0.0
  for line in body.values():
    count = hlo.elements(line.shape)
    if line.op in TRANSCENDENTAL:
      dear += count
    elif line.op in ("reduce", "reduce-window", "sort", "scatter"):
      first = places.get(line.operands[0])
      plain += hlo.elements(first.shape) if first else count
    elif line.op in SLOW:
      plain += 4 * count
    elif line.op not in MOVING and line.op not in ("dot", "convolution"):
      plain += count
  return plain, dear


def _bytes(
  line: Line, lines: dict[str, Line], inside: dict[str, Line] | None
) -> float:
  """Read and written; of what is sliced or updated, that part alone."""
  if inside is None:
    if line.op in SLICES:
      return 2 * hlo.size(line.shape)
    if line.op == "dynamic-update-slice":
      return 2 * hlo.size(lines[line.operands[1]].shape)
    shapes = [lines[name].shape for name in line.operands if name in lines]
    return float(sum(map(hlo.size, [line.shape, *shapes])))
  total, updated = 0.0, set()
  for one in inside.values():
    if one.op == "dynamic-update-slice":
      total += hlo.size(inside[one.operands[1]].shape)
      updated |= _sources(one.operands[0], inside)
  users = collections.defaultdict(list)
  for one in inside.values():
    for name in one.operands:
      users[name].append(one)
  for one in inside.values():
    if one.op == "parameter" and one.name not in updated:
      total += _read(one, users)
  if not updated:
    total += hlo.size(line.shape)
  return total


def _sources(name: str, inside: dict[str, Line]) -> set[str]:
  """The parameter that a chain of plain steps starts from."""
  while inside[name].op in ("bitcast", "copy", "convert"):
    name = inside[name].operands[0]
  return {name}


def _read(parameter: Line, users: dict[str, list[Line]]) -> float:
  whole = hlo.size(parameter.shape)
  ways = users[parameter.name]
  if ways and all(
    one.op in SLICES and one.operands[0] == parameter.name for one in ways
  ):
    return min(whole, sum(hlo.size(one.shape) for one in ways))
  return whole


def product(line: Line, lines: dict[str, Line]) -> Product:
  """A `dot` of a program; axes are put into the order of memory."""
  shapes, orders, kinds = [], [], []
  for name in line.operands[:2]:
    kind, sizes, layout = hlo.ARRAY.search(lines[name].shape).groups()
    shape = [int(n) for n in sizes.split(",") if n]
    order = [int(n) for n in (layout or "").split(",") if n][::-1]
    order = order or list(range(len(shape)))
    shapes.append(tuple(shape[axis] for axis in order))
    orders.append(order)
    kinds.append(kind)
  axes = [
    tuple(
      tuple(orders[side].index(axis) for axis in _axes(line, f"{word}_{what}"))
      for side, word in enumerate(("lhs", "rhs"))
    )
    for what in ("contracting_dims", "batch_dims")
  ]
  return Product(DTYPES[kinds[0]], *shapes, tuple(axes))


DTYPES = {
  "f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64",
  "s8": "int8", "u8": "uint8", "s32": "int32", "u32": "uint32", "pred": "bool",
  "s64": "int64",
}  # fmt: skip


def _axes(line: Line, what: str) -> list[int]:
  found = re.search(rf"{what}=\{{([\d,]*)\}}", line.rest)
  return [int(n) for n in found[1].split(",") if n] if found else []


def convolution(line: Line, lines: dict[str, Line]) -> Convolution:
  """A `convolution` of a program."""
  found = [hlo.ARRAY.search(lines[name].shape) for name in line.operands[:2]]
  found.append(hlo.ARRAY.search(line.shape))
  shapes = [tuple(int(n) for n in one[2].split(",") if n) for one in found]
  words = re.search(r"window=\{(.*?)\}", line.rest)
  window = dict(re.findall(r"(\w+)=(\S+)", words[1] if words else ""))
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest).groups()
  space = len(labels[0]) - 2

  def numbers(word: str, default: int) -> tuple[int, ...]:
    return tuple(map(int, window[word].split("x"))) if word in window else (
      (default,) * space
    )  # fmt: skip

  def count(word: str) -> int:
    said = re.search(rf"{word}_group_count=(\d+)", line.rest)
    return int(said[1]) if said else 1

  padding = window.get("pad", "x".join(["0_0"] * space)).split("x")
  return Convolution(
    DTYPES[found[0][1]],
    *shapes,
    numbers("stride", 1),
    tuple((int(a), int(b)) for a, b in (p.split("_") for p in padding if p)),
    (numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)),
    labels,
    (count("feature"), count("batch")),
  )


# ------------------------------------------------------------------- network


@dataclasses.dataclass(frozen=True)
class Transfer:
  """What a device sends in one kind of collective along the same axes.

  Attributes:
    kind: a key of `collectives.SHARES`.
    axes: of the mesh, joined by " x ".
    groups: positions in the mesh, of each group or (source, target).
    sent_bytes: that leave a device in a step.
  """

  kind: str
  axes: str
  groups: hlo.Groups
  sent_bytes: float

  @property
  def devices(self) -> tuple[int, ...]:
    """Positions in the mesh of the first group."""
    return self.groups[0]


def transfers(
  compiled: Any,
  mesh: Mapping[str, int],
  narrow: frozenset[tuple[int, ...]] = frozenset(),
) -> list[Transfer]:
  """Traffic of a program's collectives, by kind and axes, most first.

  Args:
    compiled: of `jax.stages.Lowered.compile`, or its text.
    mesh: axis -> devices; the last one's are next to each other.
    narrow: sizes, see `sizes`, of what `fsdp` gathers in half precision where
      the program has float32.
  """
  program = hlo.read(compiled)
  sums: dict[tuple[str, hlo.Groups], float] = collections.Counter()
  for name, times in _turns(program).items():
    for line in program.computations[name].values():
      one = collectives.of_line(line, program, times)
      if not one:
        continue
      groups, sent = program.groups(line), one.sent_bytes
      if one.kind == "all-gather" and _axes_of(groups, mesh) == "fsdp":
        sent *= _narrowed(collectives.result(line), narrow)
      sums[one.kind, groups] += sent
  found = [
    Transfer(kind, _axes_of(groups, mesh), groups, sent)
    for (kind, groups), sent in sums.items()
  ]
  return sorted(found, key=lambda one: -one.sent_bytes)


def sizes(shape: Sequence[int]) -> tuple[int, ...]:
  """Of an array, in order and without ones: the compiler turns arrays."""
  return tuple(sorted(n for n in shape if n > 1))


def _narrowed(shapes: str, narrow: frozenset[tuple[int, ...]]) -> float:
  """Share of the bytes that remains where some arrays have half of them."""
  total, less = 0.0, 0.0
  for kind, shape, _ in hlo.ARRAY.findall(shapes):
    own = [int(n) for n in shape.split(",") if n]
    count = hlo.size(f"{kind}[{shape}]")
    total += count
    less += count / 2 if kind == "f32" and sizes(own) in narrow else 0.0
  return 1 - less / total if total else 1.0


def _axes_of(groups: hlo.Groups, mesh: Mapping[str, int]) -> str:
  """The axes along which the positions of any group differ."""
  sides = tuple(mesh.values())
  ours = np.unravel_index([n for group in groups for n in group], sides)
  first = np.unravel_index([group[0] for group in groups for _ in group], sides)
  return " x ".join(
    axis
    for axis, own, other in zip(mesh, ours, first, strict=True)
    if (own != other).any()
  )
