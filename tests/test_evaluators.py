"""Evaluators with methods whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avjax import evaluators, plots
from avjax.config import base_config, eval_section
from avjax.data import augment
from avjax.errors import InputError
from avjax.evaluators.base import Context
from avjax.evaluators.classification import fold_views
from avjax.methods.base import Method
from avjax.workdir import workdir

CLASSES = 6


class Reader(Method):
  """Reads the logits of 'label' from the pixels that the test has put there.

  Mode 'a' gives the negative of mode 'av'.
  """

  modes = ("av", "a")

  def predict(self, params, inputs, *, mode="av"):
    pixels = inputs["frames"][:, 0, 0, :, 0]  # [b w]
    sign = {"av": 1, "a": -1}[mode]
    logits = params["scale"] * sign * pixels
    heads = {
      "label": logits,
      "verb": logits,
      "noun": logits[:, ::-1],
      "segment": jnp.stack([logits, logits[:, ::-1]], axis=1),
    }
    return {head: heads[head] for head in self.config.data.heads}


PARAMS = {"scale": jnp.float32(1)}


def config(heads=("label",), multilabel=False):
  made = base_config()
  made.data.heads, made.data.multilabel = heads, multilabel
  return made


def context(made, batches, method=None, tmp_path=".", pictures=None):
  return Context(
    config=made,
    method=method or Reader(made),
    prepare=lambda b, rng, train: augment.prepare(b, made.data, rng, train),
    batches=lambda section: iter([(b, []) for b in batches]),
    workdir=workdir(tmp_path),
    picture=lambda name, image, step: pictures.append((name, image, step)),
  )


def batch(levels, classes, valid=None, heads=("label",)):
  """Frames whose first row holds `levels` [b w]; labels of all heads."""
  levels = np.asarray(levels, np.uint8)
  b, w = levels.shape
  frames = np.zeros((b, 1, 2, w, 3), np.uint8)
  frames[:, 0, 0, :, 0] = levels
  one_hot = np.eye(w, dtype=np.float32)[np.asarray(classes)]
  values = {
    "frames": frames,
    "index": np.arange(b, dtype=np.uint32),
    "valid": np.ones(b, bool) if valid is None else np.asarray(valid),
  }
  for head in heads:
    key = "label" if head == "label" else f"label/{head}"
    values[key] = one_hot
    if head == "segment":
      values[key] = np.stack([one_hot, one_hot], axis=1)
  return values


def evaluate(made, batches, **options):
  section = eval_section("classification", **options)
  evaluator = evaluators.make(context(made, batches), section)
  return evaluator, evaluator.run(PARAMS, 0)


RANKED = [255, 200, 150, 100, 50, 0]


def test_top1_top5_and_loss_count_valid_examples_only():
  first = batch([RANKED] * 4, [0, 0, 1, 5])
  last = batch([RANKED] * 4, [0, 1, 1, 1], valid=[True, False, False, False])
  evaluator, found = evaluate(config(), [first, last])
  assert found["top1"] == pytest.approx(3 / 5)
  assert found["top5"] == pytest.approx(4 / 5)
  logits = np.array(RANKED) / 255 * 2 - 1
  logs = logits - np.log(np.exp(logits).sum())
  assert found["loss"] == pytest.approx(
    -np.mean(logs[[0, 0, 1, 5, 0]]), rel=1e-5
  )
  assert evaluator._step._cache_size() == 1


def test_several_modes_are_prefixed():
  made = batch([RANKED] * 2, [0, 5])
  _, found = evaluate(config(), [made], modes=("av", "a"))
  assert found["av/top1"] == found["a/top1"] == 0.5
  assert found["av/top5"] == 0.5
  assert "top1" not in found


def test_unknown_mode_is_refused():
  section = eval_section("classification", modes=("va",))
  with pytest.raises(InputError, match="Known: a, av"):
    evaluators.make(context(config(), []), section)


def test_a_method_of_one_modality_uses_its_own_mode():
  class Deaf(Reader):
    modes = ("v",)

  section = eval_section("classification")
  made = context(config(), [], Deaf(config()))
  assert evaluators.make(made, section).modes == ("v",)


def test_logits_are_averaged_over_views():
  # The views vote 0 and 1; together they favour class 1.
  views = batch([[200, 190, 0], [0, 190, 200]], [0, 0])
  frames = views["frames"][None]  # [b=1 v=2 t h w c]
  one = {k: v[:1] for k, v in views.items()}
  one["frames"] = frames
  one["label"] = np.eye(3, dtype=np.float32)[[1]]
  _, found = evaluate(config(), [one], views=2)
  assert found["top1"] == 1.0


def test_fold_views_repeats_what_has_none():
  values = {
    "frames": jnp.zeros((2, 3, 1, 2, 2, 3), jnp.uint8),
    "waveform": jnp.zeros((2, 8), jnp.int16),
    "index": jnp.array([7, 9], jnp.uint32),
  }
  flat, views = fold_views(values)
  assert views == 3
  assert flat["frames"].shape == (6, 1, 2, 2, 3)
  assert flat["waveform"].shape == (6, 8)
  assert flat["index"].tolist() == [7, 7, 7, 9, 9, 9]


def test_different_numbers_of_views_are_refused():
  values = {
    "frames": jnp.zeros((2, 3, 1, 2, 2, 3), jnp.uint8),
    "waveform": jnp.zeros((2, 4, 8), jnp.int16),
  }
  with pytest.raises(InputError, match="'frames': 3, 'waveform': 4"):
    fold_views(values)


def test_verb_noun_and_action():
  heads = ("noun", "verb")
  # The verb reads class 0 first; the noun reads the reverse, class 5 first.
  made = batch([RANKED] * 2, [0, 0], heads=heads)
  made["label/noun"] = np.eye(6, dtype=np.float32)[[5, 0]]
  _, found = evaluate(config(heads), [made])
  assert found["verb_top1"] == 1.0
  assert found["noun_top1"] == 0.5
  assert found["noun_top5"] == 0.5
  assert found["action_top1"] == 0.5
  assert {"verb_top5", "action_top5", "loss"} <= set(found)


def test_segments():
  made = batch([RANKED] * 2, [0, 5], heads=("segment",))
  made["label/segment"][1, 1] = 0  # no label in the last second
  _, found = evaluate(config(("segment",)), [made])
  # Seconds: 0 right, 0 against 5 wrong; 5 against 0 wrong, none.
  assert found["segment_accuracy"] == pytest.approx(1 / 3)


def test_multilabel_scores():
  labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]], np.float32)
  levels = [[250, 10, 9], [20, 240, 8], [200, 220, 7], [10, 20, 200]]
  made = batch(levels, [0] * 4, valid=[True, True, True, False])
  made["label"] = labels
  _, found = evaluate(config(multilabel=True), [made])
  assert found["mAP"] == 1.0
  assert found["mAP_left_out"] == 1.0  # its only positive is padding
  assert found["mAUC"] == 1.0
  assert "dprime" not in found
  assert "top1" not in found
  assert found["loss"] > 0


def test_multilabel_scores_of_two_modes():
  labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)
  made = batch([[9, 0], [0, 5], [3, 4], [6, 1]], [0] * 4)
  made["label"] = labels
  _, found = evaluate(config(multilabel=True), [made, made], modes=("av", "a"))
  assert found["av/mAUC"] == pytest.approx(1 - found["a/mAUC"])
  assert np.isfinite(found["av/dprime"])


def test_a_batch_spread_over_devices_gives_the_same():
  made = batch([RANKED] * 8, [0, 1, 2, 3, 4, 5, 0, 0])
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = jax.device_put(made, NamedSharding(mesh, PartitionSpec("data")))
  params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
  section = eval_section("classification")
  evaluator = evaluators.make(context(config(), [spread]), section)
  _, alone = evaluate(config(), [made])
  assert evaluator.run(params, 0) == pytest.approx(alone)


def test_an_empty_split_is_refused():
  with pytest.raises(InputError, match="no labelled example"):
    evaluate(config(), [])


# ---------------------------------------------------------------- pictures


class Copier(Method):
  """Removes the left half or the first half, and returns the input + 0.5."""

  def reconstruct(self, params, inputs, rng):
    made = {}
    for m, name in (("video", "frames"), ("audio", "fbank")):
      x = inputs[name]
      axis = 3 if m == "video" else 1
      shape = [1] * x.ndim
      shape[axis] = x.shape[axis]
      left = jnp.arange(x.shape[axis]) < x.shape[axis] // 2
      mask = jnp.broadcast_to(left.reshape(shape), x.shape)
      made[f"{m}/input"] = x
      made[f"joint/{m}/output"] = x + jnp.where(mask, 0.5, 9.0)
      made[f"joint/{m}/mask"] = mask
      # Of a modality that is not there nothing can be inpainted.
      lacks = ~inputs["has_video"].reshape(-1, *[1] * (x.ndim - 1))
      made[f"inpaint/{m}/output"] = x + 1.0 + 9.0 * lacks
      made[f"inpaint/{m}/mask"] = jnp.ones_like(mask)
    return made


def clips(valid, lacks_video=None):
  rng = np.random.default_rng(0)
  count = len(valid)
  ramp = np.linspace(40, 220, 16).astype(np.uint8)
  frames = np.broadcast_to(ramp[:, None, None], (count, 4, 16, 16, 3)).copy()
  frames[..., 1] = rng.integers(0, 256, (count, 4, 1, 1))
  return {
    "frames": frames,
    "waveform": rng.integers(-9000, 9000, (count, 8000)).astype(np.int16),
    "index": np.arange(count, dtype=np.uint32),
    "valid": np.asarray(valid),
    "has_video": np.arange(count) != lacks_video,
  }


def test_reconstruction_errors_and_pictures(tmp_path):
  made, pictures = config(), []
  batches = [clips([True, True]), clips([True, False], lacks_video=0)]
  section = eval_section("reconstruction", pictures=3)
  evaluator = evaluators.make(
    context(made, batches, Copier(made), tmp_path, pictures), section
  )
  found = evaluator.run(PARAMS, 7)
  assert found == pytest.approx(
    {
      "mse/video": 0.25,
      "mse/audio": 0.25,
      "mse/video_inpaint": 1.0,
      "mse/audio_inpaint": 1.0,
    },
    rel=1e-4,
  )
  names = [name for name, _, _ in pictures]
  assert names == ["test_clip_00", "test_clip_01", "test_clip_02"]
  for _, image, step in pictures:
    assert step == 7
    assert image.dtype == np.uint8
    assert image.ndim == 3 and image.shape[2] == 3
  assert evaluator._step._cache_size() == 1


def test_reconstruction_needs_the_method_to_offer_it():
  section = eval_section("reconstruction")
  with pytest.raises(InputError, match="Reader has no reconstruct"):
    evaluators.make(context(config(), []), section)


class Whole(Copier):
  """Removes nothing."""

  def reconstruct(self, params, inputs, rng):
    made = super().reconstruct(params, inputs, rng)
    return {
      name: jnp.zeros_like(x) if name.endswith("/mask") else x
      for name, x in made.items()
    }


def test_without_masks_there_is_no_error_of_reconstruction():
  made, section = config(), eval_section("reconstruction", pictures=0)
  batches = [clips([True, True])]
  evaluator = evaluators.make(context(made, batches, Whole(made)), section)
  assert evaluator.run(PARAMS, 0) == {}


def test_reconstruction_of_an_empty_split_is_refused():
  made = config()
  section = eval_section("reconstruction")
  evaluator = evaluators.make(context(made, [], Copier(made)), section)
  with pytest.raises(InputError, match="no valid example"):
    evaluator.run(PARAMS, 0)


def test_stack_fills_up_with_white():
  stacked = plots.stack(
    [np.zeros((1, 2, 3), np.uint8), np.zeros((2, 1, 3), np.uint8)]
  )
  assert stacked[:, :, 0].tolist() == [[0, 0], [0, 255], [0, 255]]


def test_curves_and_bars_are_pictures(tmp_path):
  curve = plots.line_plot(
    {"a": ([1, 2, 4], [0.5, 0.4, 0.3]), "b": ([1, 2], [0.6, 0.5])},
    spread={"a": [0.1, 0.1, 0.1]},
    log_x=True,
    line=0.2,
  )
  bars = plots.bar_plot(
    ["early", "mid"],
    {"top1": [(0.5, 0.1), (float("nan"), 0.0)], "top5": [(1, 0), (1, 0)]},
    line=0.1,
  )
  for image in (curve, bars):
    assert image.dtype == np.uint8
    assert 0 < (image < 250).mean() < 0.7  # drawn upon, not full
  plots.save(tmp_path / "bars.png", bars)
  assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
