"""UAVM's configs: the paper's variants, their sizes, av_demo's features."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from avjax import methods, optim
from avjax.data import example
from avjax.data.features import Features
from avjax.errors import InputError
from configs import uavm_vgg
from data_prep import demo_features
from tests import runs


def load(arg=None, name="uavm_vgg"):
  return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize(
  ("arg", "variant", "layers", "total"),
  [
    (None, "unified", (3, 3), 113_755_445),
    ("variant=independent", "unified", (6, 0), 151_820_906),
    ("variant=stacked", "independent", (3, 3), None),
    ("variant=cross_modal", "cross_modal", (3, 3), None),
    ("shared_layers=6", "unified", (0, 6), None),
  ],
)
def test_variants_of_the_paper(arg, variant, layers, total):
  config = load(arg)
  model = config.model
  assert (model.variant, model.lambda_audio) == (variant, 0.5)
  assert (model.specific_layers, model.shared_layers) == layers
  assert model.width == model.shared_width == 1_024 and model.tokens == 30
  shapes = example.shapes(config.data, 2)
  assert shapes["features/audio"][0] == (2, 30, 1_024)
  assert "frames" not in shapes and "waveform" not in shapes
  batch = {k: jax.ShapeDtypeStruct(*how) for k, how in shapes.items()}
  made = methods.make(config)
  params = jax.eval_shape(made.init, jax.random.key(0), batch)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  # Without what the public code never trains.
  assert total in (None, count)
  modes = ("av",) if variant == "cross_modal" else ("a", "v", "av")
  assert config.evals.test.modes == modes


def test_arguments_of_the_figures():
  config = load("variant=stacked,shared_width=16,lambda_audio=0.3")
  assert config.model.shared_width == 16 and config.model.lambda_audio == 0.3
  with pytest.raises(InputError, match="Did you mean 'unified'"):
    load("variant=unifed")
  with pytest.raises(InputError, match="specific_layers=-1"):
    methods.make(load("shared_layers=7"))


@pytest.mark.parametrize(
  ("name", "first", "multilabel"),
  [("uavm_vgg", 5e-5, False), ("uavm_audioset", 1e-5, True)],
)
def test_the_rate_is_halved_after_every_epoch(name, first, multilabel):
  config = load(name=name)
  assert config.batch_size == 144 and config.data.multilabel == multilabel
  rate = optim.schedule(
    config.schedule, batch_size=144, steps_per_epoch=10, total_steps=100
  )
  found = [float(rate(10 * epoch + 5)) for epoch in range(10)]
  np.testing.assert_allclose(found, first * 0.5 ** np.arange(10), rtol=1e-6)
  assert ("layers" in config.evals) == (name == "uavm_vgg")


def test_features_of_av_demo_are_made_once(demo_data, monkeypatch):
  config = uavm_vgg.get_config("demo")
  config.data.demo.update(runs.DEMO)
  folder = demo_features.ensure(config.data, pathlib.Path(demo_data), steps=1)
  for m in ("audio", "video"):
    found = Features(folder, m)
    assert found.values.shape == (72, 9, config.data.feature_width)
    assert (found.lengths == 9).all() and not found.failed
    assert np.isfinite(found.values).all() and found.values.std() > 0
  monkeypatch.setattr(demo_features.train, "train_and_evaluate", None)
  monkeypatch.setattr(demo_features.extraction, "run", None)
  assert demo_features.ensure(config.data, pathlib.Path(demo_data)) == folder
