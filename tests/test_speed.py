"""Steps are about as fast as the same work in PyTorch, on one core.

CPU seconds of one process count, in turn and the least of several, so what else
the machine does hits both sides alike.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import runs

# Measured on one core, by vendor: EPYC (Zen 4), Xeon (Cascade Lake).
MEASURED = {
  "AuthenticAMD": {"cavmae": 0.92, "stack": 0.98},
  "GenuineIntel": {"cavmae": 0.74, "stack": 0.77},
}
FLOOR = 0.80  # whatever the processor
# XLA's products have 0.7 of the rate of PyTorch's (MKL) there, and the floor is
# known to be missed; elsewhere missing it fails.
MISSED = ("GenuineIntel",)


def measured(folder):
  """Rows by system: true widths and numbers of tokens, two blocks a stack."""
  path = folder / "ratios.json"
  command = [sys.executable, "-m", "avjax.speed_ratio", "cavmae", "stack"]
  command += ["--depth=2", "--batch_size=2", "--repeats=5", "--pin"]
  command += [f"--json={path}"]
  # Not the tests' simulated devices and quick compilation.
  clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  clean |= {"JAX_PLATFORMS": "cpu", "NPROC": "1", "OMP_NUM_THREADS": "1"}
  subprocess.run(
    command, cwd=runs.ROOT, env=clean, check=True, capture_output=True
  )
  return json.loads(path.read_text())["rows"]


def vendor():
  """Of the processor, as Linux names it."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  found = [line for line in lines if line.startswith("vendor_id")]
  return found[0].split(":")[1].strip() if found else ""


def test_no_slower_than_pytorch(tmp_path):
  rows = measured(tmp_path)
  for row in rows:
    known = MEASURED.get(vendor(), {}).get(row["system"], 0)
    assert row["ratio"] >= 0.85 * known, row
  missed = [row for row in rows if row["ratio"] < FLOOR]
  if missed and vendor() in MISSED:
    found = {row["system"]: round(row["ratio"], 3) for row in rows}
    pytest.xfail(f"floor {FLOOR} beside PyTorch on {vendor()}: {found}")
  assert not missed
