"""A compiled program's text, taken apart.

`compiled.as_text()` is what the compiler made of a program: computations of
instructions, among them the loops, branches and collectives that it placed.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Bytes of one number.
WIDTHS = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*))?")
# What an instruction runs: a loop, a call, a fused kernel.
CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(
  r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)"
)
# Groups of devices: lists, a reshaped range, axes of a mesh.
_LISTED = re.compile(r"(?:groups|pairs)=\{(\{[\d,{} ]+\})\}")
_RANGE = re.compile(
  r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_AXES = re.compile(r"replica_groups=mesh\[(.*?)\](.*?)\{([^}]*)\}")
_ORDER = re.compile(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Line:
  """One instruction of a program.

  Attributes:
    name: unique within its computation.
    shape: of the result, as the compiler writes it.
    op: its kind.
    operands: names.
    rest: attributes.
    root: its result is the computation's.
  """

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  rest: str
  root: bool


Turns = Mapping[str, int]
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of one device.

  Attributes:
    computations: lines by name, of each computation, as the text has them.
    entry: the computation that is the program.
    devices: that run it.
  """

  computations: dict[str, dict[str, Line]]
  entry: str
  devices: int

  def turns(
    self, pick: Callable[[Sequence[Turns]], Turns], unknown: int
  ) -> Turns:
    """How often each computation that is no part of a kernel runs.

    Args:
      pick: makes one of those of a condition's branches.
      unknown: turns of a loop of which the compiler does not say how many.
    """

    def of(name: str, count: int) -> Turns:
      times: dict[str, int] = collections.Counter({name: count})
      for line in self.computations[name].values():
        if line.op == "conditional":
          times.update(pick([of(way, count) for way in _branches(line)]))
        elif line.op in ("while", "call", "async-start"):
          known = re.search(r'"known_trip_count":.*?"(\d+)"', line.rest)
          often = int(known[1]) if known else unknown
          often = often if line.op == "while" else 1
          for called in CALLED.findall(line.rest):
            times.update(of(called, count * often))
      return times

    return of(self.entry, 1)

  def groups(self, line: Line) -> Groups:
    """Numbers of all groups of devices, or pairs, of a collective."""
    listed = _LISTED.search(line.rest)
    if listed:
      found = re.findall(r"\{([\d,]+)\}", listed[1])
      return tuple(tuple(map(int, one.split(","))) for one in found)
    ranged = _RANGE.search(line.rest)
    if ranged:
      grid = _grid(ranged[3], ranged[4])
      return _rows(grid.reshape(int(ranged[1]), -1))
    named = _AXES.search(line.rest)
    if named:
      axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
      order = _ORDER.search(named[2])
      grid = _grid(*order.groups()) if order else np.arange(self.devices)
      grid = grid.reshape([int(n) for n in axes.values()])
      kept = re.findall(r"'(\w+)'", named[3])
      last = sorted(range(grid.ndim), key=lambda n: list(axes)[n] in kept)
      size = math.prod(int(axes[axis]) for axis in kept)
      return _rows(grid.transpose(last).reshape(-1, size))
    return (tuple(range(self.devices)),)


def read(compiled: Any) -> Program:
  """Takes a program apart.

  Args:
    compiled: of `jax.stages.Lowered.compile`, or its text.
  """
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  rows = re.sub(r"/\*.*?\*/", "", text).splitlines()
  program: dict[str, dict[str, Line]] = {}
  entry, lines = "", {}
  for row in rows:
    head = None if row.startswith(" ") else _HEAD.match(row)
    if head:
      lines = program.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
      continue
    match = _LINE.match(row)
    if match:
      root, name, shape, op, inner, rest = match.groups()
      operands = tuple(
        part.split()[-1].lstrip("%") for part in inner.split(",") if part
      )
      lines[name] = Line(name, shape, op, operands, rest, bool(root))
  devices = math.prod(
    int(count)
    for count in re.findall(r"(?:num_partitions|replica_count)=(\d+)", rows[0])
  )
  return Program(program, entry, devices)


def _grid(sizes: str, order: str | None) -> np.ndarray:
  """Numbers of devices in these sizes, the axes then in this order."""
  shape = [int(n) for n in sizes.split(",")]
  grid = np.arange(math.prod(shape)).reshape(shape)
  return grid.transpose([int(n) for n in order.split(",")]) if order else grid


def _rows(grid: np.ndarray) -> Groups:
  return tuple(tuple(map(int, row)) for row in grid)


def size(shapes: str) -> int:
  """Bytes of a result's shapes as the compiler writes them.

  Args:
    shapes: an array's, or several in parentheses.
  """
  return sum(
    WIDTHS[kind] * math.prod(int(n) for n in shape.split(",") if n)
    for kind, shape, _ in ARRAY.findall(shapes)
    if kind in WIDTHS
  )


def members(shapes: str) -> list[str]:
  """What a tuple consists of, inner tuples whole; of an array, itself."""
  if not shapes.startswith("("):
    return [shapes]
  found, depth = [""], 0
  for letter in shapes[1:-1]:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      found.append("")
    else:
      found[-1] += letter
  return [one.strip() for one in found]


def elements(shape: str) -> int:
  """Numbers in a result, of a tuple all together."""
  return sum(
    math.prod(int(n) for n in sizes.split(",") if n)
    for _, sizes, _ in ARRAY.findall(shape)
  )


def _branches(line: Line) -> list[str]:
  found = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line.rest)
  for many in re.findall(r"branch_computations=\{(.*?)\}", line.rest):
    found += re.findall(r"[\w.\-]+", many)
  return found
