"""How much freed memory the C library keeps for the process's next use."""

import contextlib
import ctypes
import glob
import os
import platform
import sys

# Options of mallopt.
ARENAS, MAPPED, MAP_FROM, TRIM_FROM = -8, -4, -3, -1
# One arena, nothing mapped apart, nothing returned.
KEEP = {ARENAS: 1, MAPPED: 0, TRIM_FROM: -1}
# Mapping apart from its upper limit on, little returned.
SETTLE = {MAP_FROM: 32 << 20, TRIM_FROM: 256 << 20}

_kept = False


def keep() -> bool:
  """Has the process keep memory that it frees, where JAX computes on CPUs.

  XLA asks for a program's temporary memory anew at each run. The C library
  would map and unmap it, so that in every step all its pages, up to gigabytes,
  would be cleared and faulted in again: 7 % of the time of a CAV-MAE step.

  Returns:
    Whether it does; it needs glibc, and no GPU or TPU.
  """
  global _kept
  devices = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")
  if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(glob.glob, devices)):
    return False
  if platform.libc_ver()[0] != "glibc":
    return False
  # XLA computes in a thread of its own, and only the first arena grows freely.
  _kept = _set(KEEP)
  return _kept


def settle() -> None:
  """Makes decoding in threads fast; nothing to do where `keep` holds.

  Megabytes are taken and freed for each clip. Given back to the system, they
  cost page faults that take longer than reading the record.
  """
  if sys.platform == "linux" and not _kept:
    with contextlib.suppress(OSError, AttributeError):
      _set(SETTLE)


def _set(options: dict[int, int]) -> bool:
  library = ctypes.CDLL(None)
  return all([library.mallopt(name, value) for name, value in options.items()])
