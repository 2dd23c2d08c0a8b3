"""What the devices of a compiled program send each other.

Read from `compiled.as_text()`: the compiler has placed every collective by
then, also those that nobody wrote.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from avjax import hlo

# Bytes that leave a device, of the result's bytes on n devices.
SHARES = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: a key of SHARES.
    result_bytes: of what a device has afterwards.
    devices: in its group; two where each sends to another.
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
  """All collectives of a program, those of all branches of a condition.

  Args:
    compiled: of `jax.stages.Lowered.compile`, or its text.

  Raises:
    ValueError: a collective stands in a loop whose number of turns the
      compiler does not say.
  """
  program = hlo.read(compiled)
  turns = program.turns(_all, unknown=0)
  found = []
  for name, lines in program.computations.items():
    for line in lines.values():
      one = of_line(line, program, turns.get(name, 1))
      if one and not one.times:
        raise ValueError(f"{one.kind} in a loop of unknown length: {name}")
      found += [one] if one else []
  return found


def of_line(
  line: hlo.Line, program: hlo.Program, times: int
) -> Collective | None:
  """The collective that an instruction is or begins; None = it is none."""
  kind = line.op.removesuffix("-start")
  if kind not in SHARES:
    return None
  count = hlo.size(result(line))
  return Collective(kind, count, len(program.groups(line)[0]), times)


def result(line: hlo.Line) -> str:
  """The shapes of what a collective gives.

  Where it is asynchronous, what is sent stands before them and what the
  compiler needs behind; all-reduce-start has the result alone.
  """
  if line.op.endswith("-start") and line.op != "all-reduce-start":
    return hlo.members(line.shape)[1]
  return line.shape


def _all(ways: Sequence[hlo.Turns]) -> hlo.Turns:
  total: collections.Counter[str] = collections.Counter()
  for way in ways:
    total.update(way)
  return total


def traffic(compiled: Any) -> dict[str, float]:
  """Bytes that a device sends, by kind; see `find`."""
  sent: dict[str, float] = {}
  for one in find(compiled):
    sent[one.kind] = sent.get(one.kind, 0) + one.sent_bytes
  return sent
