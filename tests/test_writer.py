"""metrics.jsonl, pictures and reports."""

import json

import numpy as np

from avjax import memory, report
from avjax.workdir import workdir
from avjax.writer import Writer


def test_lines_hold_step_and_metrics(tmp_path):
  run = workdir(tmp_path)
  writer = Writer(run)
  writer.scalars(1, {"loss": np.float32(0.5)})
  writer.scalars(2, {"loss": float("nan")})
  writer.picture("a/b", np.zeros((4, 4, 3), np.uint8), 2)
  writer.close()
  lines = [json.loads(x) for x in run.metrics.read_text().splitlines()]
  assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": "nan"}]
  assert (run.pictures / "a_b_0000002.png").exists()


def test_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
  run = workdir(tmp_path)
  writer = Writer(run)
  for step in (1, 2, 3):
    writer.scalars(step, {"loss": step})
  writer.close()
  with run.metrics.open("a") as file:
    file.write('{"step": 4, "lo')  # Cut short by a kill.
  Writer(run, first_step=2).close()
  steps = [json.loads(x)["step"] for x in run.metrics.read_text().splitlines()]
  assert steps == [1, 2]


def test_words():
  assert report.duration(3725.0) == "1 h 02 min"
  assert report.duration(65.0) == "1 min 05 s"
  assert memory.in_words(1536.0) == "1.5 KiB"
  assert report.in_words({"a": 0.12345, "b": 2.0}) == "a 0.1235, b 2"
