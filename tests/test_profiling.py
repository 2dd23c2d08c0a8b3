"""A trace by flag."""

import gzip
import json

import pytest

from avjax import profiling, train
from avjax.errors import InputError
from tests import runs


def test_steps_asked_for_are_traced(demo_data, tmp_path):
  config = runs.stage(
    "avmae_vgg_finetune", data__dir=demo_data, evals={}, total_steps=4,
    **runs.CONSTANT,
  )  # fmt: skip
  train.train_and_evaluate(runs.plain(config), tmp_path, profile="2:4")
  (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  steps = [e for e in events if e.get("name") == profiling.STEP]
  assert [int(e["args"]["step_num"]) for e in steps] == [2, 3]
  # And what was computed in them.
  assert any("dot" in e.get("name", "") for e in events)


def test_a_trace_that_is_cut_short_is_closed(tmp_path):
  trace = profiling.Trace("1:9", tmp_path / "profile")
  trace.before_step([])
  trace.close()
  trace.close()
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_trace_that_never_began_is_told(tmp_path, caplog):
  trace = profiling.Trace("3:5", tmp_path / "profile")
  trace.before_step([])
  with caplog.at_level("WARNING"):
    trace.close()
  assert "--profile=3:5 begins at step 3 of this process, which took 1" in (
    caplog.text
  )


@pytest.mark.parametrize("words", ["5", "5:5", "0:3", "a:b", "5:"])
def test_what_is_no_pair_of_steps_is_refused(words, tmp_path):
  with pytest.raises(InputError, match="10:15 traces the tenth"):
    profiling.Trace(words, tmp_path)
