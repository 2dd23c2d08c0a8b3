"""Memory in words: of a compiled program, and of the device just now."""

import pathlib
from typing import Any, NamedTuple

import jax


class Bytes(NamedTuple):
  """What a program needs of one device: its arrays, and what it works with."""

  held: int
  temporary: int


def of_program(compiled: Any) -> str:
  """What one device holds while a compiled program runs."""
  found = analysis(compiled)
  if found is None:
    return "memory not known"
  return (
    f"{in_words(sum(found))} per device ({in_words(found.held)} held, "
    f"{in_words(found.temporary)} temporary)"
  )


def analysis(compiled: Any) -> Bytes | None:
  """The same as numbers, by the compiler; None where it does not tell."""
  stats = compiled.memory_analysis()
  if stats is None:
    return None
  held = stats.argument_size_in_bytes + stats.output_size_in_bytes
  held -= stats.alias_size_in_bytes
  return Bytes(held, stats.temp_size_in_bytes)


def measured_peak() -> int:
  """Most bytes in use so far on the first device; 0 where it does not tell."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use", 0)


def now() -> str:
  """Bytes in use and the peak on the first device; else of the process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_in_use" in stats:
    peak = stats.get("peak_bytes_in_use", stats["bytes_in_use"])
    return f"{in_words(stats['bytes_in_use'])} in use, peak {in_words(peak)}"
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    for line in status.read_text().splitlines():
      if line.startswith("VmRSS:"):
        return f"{in_words(1024 * int(line.split()[1]))} of host memory"
  return "memory not known"


def in_words(count: float) -> str:
  """1.5 GiB."""
  for unit in ("B", "KiB", "MiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.3g} GiB"
