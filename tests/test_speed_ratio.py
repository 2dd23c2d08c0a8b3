"""What is measured beside PyTorch, and what of it is kept."""

import json

import jax
import pytest
from absl import flags

from avjax import benchmark, speed_ratio
from avjax.errors import InputError


def main(monkeypatch, *words):
  """The command, on as many threads as before."""
  values = flags.FlagValues()
  speed_ratio.define_flags(values)
  argv = values(["speed_ratio", *words])
  monkeypatch.setattr(flags, "FLAGS", values)
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  monkeypatch.setattr(benchmark, "pin", lambda: None)
  monkeypatch.setattr(
    "avjax.torch_standin.torch.set_num_threads", lambda count: None
  )
  speed_ratio.main(argv)


def row(name, batch_size, repeats, depth):
  rest = {"batch": batch_size or 4, "parameters": 5}
  rates = dict.fromkeys(
    ("flops_per_clip", "ours", "theirs", "ratio", "ours_share",
     "theirs_share", "ours_peak", "theirs_peak"), 1.0,
  )  # fmt: skip
  return speed_ratio.Row(system=name, **rest, **rates)


def test_batches_are_checked_before_anything_is_measured(monkeypatch):
  done = []
  monkeypatch.setattr(speed_ratio, "measure", lambda *args: done.append(args))
  with pytest.raises(InputError, match="batch_size=4: avsiam takes 6"):
    main(monkeypatch, "cavmae", "avsiam", "--batch_size=4")
  assert not done


def test_a_later_systems_failure_loses_nothing(monkeypatch, tmp_path, capsys):
  def measure(name, *args):
    if name == "stack":
      raise MemoryError(name)
    return row(name, *args)

  monkeypatch.setattr(speed_ratio, "measure", measure)
  path = tmp_path / "ratios.json"
  with pytest.raises(MemoryError):
    main(monkeypatch, "cavmae", "avsiam", "stack", f"--json={path}")
  record = json.loads(path.read_text())
  assert [found["system"] for found in record["rows"]] == ["cavmae", "avsiam"]
  title, _, _, _, *lines = capsys.readouterr().out.splitlines()
  assert title == record["title"]
  assert [line.split(" | ")[0] for line in lines] == ["| cavmae", "| avsiam"]


def test_no_pinned_core_feeds_a_gpu(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(speed_ratio, "measure", row)
  with pytest.raises(InputError, match="--pin binds the process to 1 of"):
    main(monkeypatch, "stack", "--pin")


@pytest.mark.parametrize("name", speed_ratio.SYSTEMS)
def test_batches_of_a_gpu_are_larger(name):
  small, large = (speed_ratio.batch_of(name, 0, x) for x in ("cpu", "gpu"))
  assert large >= 16 * small
  assert speed_ratio.batch_of(name, 12, "gpu") == 12


def test_products_of_pytorchs_peak_fill_the_device():
  found = speed_ratio.torch_peaks("meta")  # computes nothing
  assert len(found) == len(benchmark.PEAK_SHAPES)
  for count, function in found:
    assert count == pytest.approx(2e13, rel=0.05)
    function()


def test_what_the_stack_reads_lies_on_the_device():
  pair = speed_ratio.blocks("stack", 1, 1)
  with jax.transfer_guard_host_to_device("disallow"):
    pair.ours()
