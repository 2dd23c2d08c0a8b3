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
_LISTED = re.compile(r"(?:groups|pairs)=\{\{([\d,]+)\}")
_RANGE = re.compile(
  r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_AXES = re.compile(r"replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}")


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

  def group(self, line: Line) -> tuple[int, ...]:
    """Numbers of the first group of devices, or pair, of a collective."""
    listed = _LISTED.search(line.rest)
    if listed:
      return tuple(map(int, listed[1].split(",")))
    ranged = _RANGE.search(line.rest)
    if ranged:
      sizes = [int(n) for n in ranged[3].split(",")]
      grid = np.arange(math.prod(sizes)).reshape(sizes)
      if ranged[4]:
        grid = grid.transpose([int(n) for n in ranged[4].split(",")])
      return tuple(map(int, grid.reshape(int(ranged[1]), -1)[0]))
    named = _AXES.search(line.rest)
    if named:
      axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
      grid = np.arange(self.devices).reshape([int(n) for n in axes.values()])
      kept = re.findall(r"'(\w+)'", named[2])
      first = tuple(slice(None) if axis in kept else 0 for axis in axes)
      return tuple(map(int, grid[first].reshape(-1)))
    return tuple(range(self.devices))


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


def size(shapes: str, half: bool = False) -> int:
  """Bytes of a result's shapes as the compiler writes them.

  Args:
    shapes: an array's, or several in parentheses.
    half: the later half of the arrays alone.
  """
  counts = [
    WIDTHS[kind] * math.prod(int(n) for n in shape.split(",") if n)
    for kind, shape, _ in ARRAY.findall(shapes)
    if kind in WIDTHS
  ]
  return sum(counts[len(counts) // 2 :] if half else counts)


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
