"""What the devices of a compiled program send each other.

Read from `compiled.as_text()`: the compiler has placed every collective by
then, also those that nobody wrote.
"""

import dataclasses
import math
import re
from typing import Any

# Bytes of one number.
WIDTHS = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

# Bytes that leave a device, of the result's bytes on n devices.
SHARES = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}

# Where they are asynchronous, what is sent stands before the result.
PAIRED = ("all-gather", "collective-permute")

_MOVED = re.compile(rf"= (.*?) ({'|'.join(SHARES)})(?:-start)?\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LOOP = re.compile(
  r' while\(.*body=%?([\w.\-]+)(?:.*"known_trip_count":.*?"(\d+)")?'
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
# Groups of devices: lists, a reshaped range, axes of a mesh.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_RANGE = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_AXES = re.compile(r"replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: a key of SHARES.
    result_bytes: of what a device has afterwards.
    devices: in its group.
    times: how often it runs: more than once in a loop.
  """

  kind: str
  result_bytes: int
  devices: int
  times: int

  @property
  def sent_bytes(self) -> float:
    """That leave a device, all times together."""
    return self.times * SHARES[self.kind](self.devices) * self.result_bytes


def find(compiled: Any) -> list[Collective]:
  """All collectives of a program.

  Args:
    compiled: of `jax.stages.Lowered.compile`, or its text.

  Raises:
    ValueError: a collective stands in a loop whose number of turns the
      compiler does not say.
  """
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  text = re.sub(r"/\*.*?\*/", "", text)
  total = _total_devices(text)
  found, name = [], ""
  turns = _turns(text)
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    name = head[1] if head else name
    moved = _MOVED.search(line)
    if not moved:
      continue
    times = turns.get(name, 1)
    if not times:
      raise ValueError(f"{moved[2]} in a loop of unknown length: {name}")
    kind, devices = moved[2], _group_size(line, total)
    both = kind in PAIRED and moved[0].endswith("-start(")
    count = size(moved[1], half=both)
    found.append(Collective(kind, count, devices, times))
  return found


def traffic(compiled: Any) -> dict[str, float]:
  """Bytes that a device sends, by kind; see `find`."""
  sent: dict[str, float] = {}
  for one in find(compiled):
    sent[one.kind] = sent.get(one.kind, 0) + one.sent_bytes
  return sent


def _turns(text: str) -> dict[str, int]:
  """Computation -> how often its lines run; 0 = not known.

  A loop within a loop counts its own turns times the outer one's.
  """
  own, outer, name = {}, {}, ""
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    name = head[1] if head else name
    for called in re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)",
                             line):  # fmt: skip
      outer[called] = name
    branches = re.search(r"branch_computations=\{(.*?)\}", line)
    for called in re.findall(r"[\w.\-]+", branches[1] if branches else ""):
      outer[called] = name
    loop = _LOOP.search(line)
    if loop:
      own[loop[1]] = int(loop[2] or 0)
  found = {}
  for name in {*own, *outer}:
    times, place = own.get(name, 1), name
    while place in outer:
      place = outer[place]
      times *= own.get(place, 1)
    found[name] = times
  return found


def _total_devices(text: str) -> int:
  """Of the whole program."""
  head = text.split("\n", 1)[0]
  count = 1
  for key in ("num_partitions", "replica_count"):
    said = re.search(rf"{key}=(\d+)", head)
    count *= int(said[1]) if said else 1
  return count


def _group_size(line: str, total: int) -> int:
  listed = _LISTED.search(line)
  if listed:
    return len(listed[1].split(","))
  ranged = _RANGE.search(line)
  if ranged:
    return int(ranged[2])
  axes = _AXES.search(line)
  if axes:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", axes[2]))
  return total


def size(shapes: str, half: bool = False) -> int:
  """Bytes of a result's shapes as the compiler writes them.

  Args:
    shapes: an array's, or several in parentheses.
    half: the later half of the arrays alone.
  """
  counts = [
    WIDTHS[kind] * math.prod(int(n) for n in shape.split(",") if n)
    for kind, shape in _ARRAY.findall(shapes)
    if kind in WIDTHS
  ]
  return sum(counts[len(counts) // 2 :] if half else counts)
