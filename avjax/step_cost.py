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
    products: with how often each is done.
    flops: of convolutions.
  """

  name: str
  kind: str
  times: int
  bytes: float
  operations: float = 0.0
  transcendentals: float = 0.0
  products: tuple[Product, ...] = ()
  flops: float = 0.0


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
  convolved = sum(
    _convolution(one, places)
    for one in body.values()
    if one.op == "convolution"
  )
  kind = _kind(body, bool(products), bool(convolved))
  return Kernel(
    line.name,
    kind,
    times,
    _bytes(line, lines, inside),
    operations,
    transcendentals,
    products,
    convolved,
  )


def _inside(
  line: Line, program: Mapping[str, dict[str, Line]]
) -> dict[str, Line] | None:
  """The lines of a fused kernel."""
  if line.op != "fusion":
    return None
  return program[hlo.CALLED.search(line.rest)[1]]


def _kind(body: dict[str, Line], products: bool, convolved: bool) -> str:
  ops = {line.op for line in body.values()}
  if products:
    return "product"
  if convolved:
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


def _convolution(line: Line, lines: dict[str, Line]) -> float:
  """FLOPs; a kernel's share of output features comes from its labels."""
  kernel = hlo.ARRAY.search(lines[line.operands[1]].shape)[2].split(",")
  labels = re.search(r"dim_labels=\w+_(\w+)->", line.rest)[1]
  features = int(kernel[labels.index("o")])
  window = math.prod(map(int, kernel))
  return 2.0 * hlo.elements(line.shape) * window / features


# ------------------------------------------------------------------- network


@dataclasses.dataclass(frozen=True)
class Transfer:
  """What a device sends in one kind of collective along the same axes.

  Attributes:
    kind: a key of `collectives.SHARES`.
    axes: of the mesh, joined by " x ".
    devices: positions in the mesh of one group.
    sent_bytes: that leave a device in a step.
  """

  kind: str
  axes: str
  devices: tuple[int, ...]
  sent_bytes: float


def transfers(compiled: Any, mesh: Mapping[str, int]) -> list[Transfer]:
  """Traffic of a program's collectives, by kind and axes, most first.

  Args:
    compiled: of `jax.stages.Lowered.compile`, or its text.
    mesh: axis -> devices; the last one's are next to each other.
  """
  program = hlo.read(compiled)
  sums: dict[tuple[str, tuple[int, ...]], float] = collections.Counter()
  for name, times in _turns(program).items():
    for line in program.computations[name].values():
      one = collectives.of_line(line, program, times)
      if one:
        sums[one.kind, program.group(line)] += one.sent_bytes
  found = [
    Transfer(kind, _axes_of(group, mesh), group, sent)
    for (kind, group), sent in sums.items()
  ]
  return sorted(found, key=lambda one: -one.sent_bytes)


def _axes_of(group: tuple[int, ...], mesh: Mapping[str, int]) -> str:
  """The axes along which the positions of a group differ."""
  places = np.unravel_index(np.array(group), tuple(mesh.values()))
  return " x ".join(
    axis
    for axis, where in zip(mesh, places, strict=True)
    if len(set(where.tolist())) > 1
  )
