"""What is measured follows the batch that is asked for."""

import jax
import pytest

from avjax import benchmark, experiment
from avjax.data import object_scores
from configs import cavmae_audioset
from data_prep import synthetic
from tests import runs


@pytest.mark.parametrize("asked, group", [(0, 27), (54, 27), (4, 0), (30, 0)])
def test_groups_that_do_not_divide_the_batch(asked, group, capsys):
  config = runs.plain(cavmae_audioset.get_config())
  found = benchmark.with_groups(config, asked)
  assert found.model.group_size == group
  said = capsys.readouterr().out
  assert ("model.group_size=27" in said) == (group == 0)
  assert said.count("\n") == (group == 0)
  assert config.model.group_size == 27


def test_a_small_batch_of_a_config_with_groups_is_measured(
  demo_data, monkeypatch
):
  """The step is traced, not compiled: what a group does not fit stops there."""

  def trace(setup, repeats):
    jax.eval_shape(
      lambda s, b: experiment.train_step(setup, s, b),
      setup.state_shapes,
      setup.batch_shapes,
    )
    return [benchmark.Row("step", float(repeats))], None

  monkeypatch.setattr(benchmark, "bench_step", trace)
  monkeypatch.setattr(
    benchmark, "bench_together", lambda *_: benchmark.Row("both", 1.0)
  )
  config = runs.stage(
    "cavmae_audioset", data__dir=demo_data, model__group_size=27
  )
  rows = benchmark.benchmark(runs.plain(config), batch_size=4, repeats=1)
  assert all(row.clips_per_s > 0 for row in rows)


def test_noise_stands_in_for_object_scores(tmp_path):
  found = object_scores.read(synthetic.scores(tmp_path, clips=3))
  assert set(found) == {"audio", "video"}
  for scores in found.values():
    assert scores.values.shape == (3, 601) and scores.scored().all()
    assert scores.clips[2] == synthetic.clip_id(2)
