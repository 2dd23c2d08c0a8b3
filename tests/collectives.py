"""What the devices of a compiled program send each other."""

import re

import numpy as np

WIDTHS = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "f16": 2, "bf16": 2}
# Bytes that leave a device, of the result's bytes on n devices.
SHARES = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}
KINDS = "|".join(SHARES)


def traffic(text, devices):
  """Bytes that a device sends by kind of collective; loops count each turn.

  Args:
    text: `compiled.as_text()`.
    devices: in every group.
  """
  text, found = re.sub(r"/\*.*?\*/", "", text), {}
  turns = dict(
    re.findall(r' while\(.*body=%?([\w.\-]+).*"known_trip_count":.*?"(\d+)"',
               text)
  )  # fmt: skip
  assert len(turns) == len(re.findall(r" while\(", text))
  times = 1
  for line in text.splitlines():
    head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
    if head:
      times = int(turns.get(head[1], 1))
    moved = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
    if moved:
      kind = moved[2]
      sent = times * SHARES[kind](devices) * size(moved[1])
      found[kind] = found.get(kind, 0) + sent
  return found


def size(shapes):
  """Bytes of a result's shapes as the compiler writes them."""
  parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
  return sum(
    WIDTHS[kind] * int(np.prod([int(n) for n in shape.split(",") if n]))
    for kind, shape in parts
  )
