"""DETECLAP: its labels, its loss, and what it leaves of CAV-MAE."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from avjax import config as config_lib
from avjax import methods, trees
from avjax.data import demo, object_scores, records
from avjax.errors import InputError
from avjax.methods import deteclap
from avjax.methods.cavmae_config import finetune_model
from data_prep import demo_objects
from tests import cavmae_golden as made

MODALITIES = ("audio", "video")
KEY, STEP = jax.random.key(0), jnp.int32(0)
NAN = float("nan")
# Three clips, four labels; the second lacks sound scores, the third both.
AUDIO = [[0.9, 0.5, 0.45, -0.2], [NAN] * 4, [NAN] * 4]
VIDEO = [[0.1, 0.45, 0.4, 0.8], [0.0, 0.7, 0.2, 1.0], [NAN] * 4]
SMALL = {**made.SMALL, **made.SMALL_DECODER}


def make(**model):
  config = config_lib.base_config()
  config.method = "deteclap"
  config.model = deteclap.default_model("B", **{**SMALL, **model})
  return methods.make(config)


@functools.cache
def inputs():
  scores = {"audio": AUDIO, "video": VIDEO}
  told = {f"objects/{m}": jnp.asarray(x, "f2") for m, x in scores.items()}
  return {**made.inputs(), **told}


@functools.cache
def first_params():
  return jax.jit(make().init)(KEY, inputs())


# --- Labels -------------------------------------------------------------------

BOTH = [[1, 1, 0, 1], [0, 1, 0, 1]]  # above .5 (sound) or .4 (pictures)


@pytest.mark.parametrize(
  ("labels", "targets", "known"),
  [
    ("or", BOTH, [True, True, False]),
    ("and", [[0, 0, 0, 0]], [True, False, False]),
    ("audio", [[1, 0, 0, 0]], [True, False, False]),
    ("visual", [[0, 1, 0, 1], [0, 1, 0, 1]], [True, True, False]),
    ("soft_audio", [[0.9, 0.5, 0.45, 0.0]], [True, False, False]),
    ("soft_visual", VIDEO[:2], [True, True, False]),
    ("soft_max", [[0.9, 0.5, 0.45, 0.8], VIDEO[1]], [True, True, False]),
  ],
)
def test_both_heads_learn_merged_labels(labels, targets, known):
  method = make(labels=labels)
  found = method.targets(inputs())
  assert found["audio"] is found["video"]
  target, told = found["audio"]
  assert told.tolist() == known
  assert np.isfinite(target).all()
  rows = np.flatnonzero(known)
  np.testing.assert_allclose(target[rows], targets, atol=1e-3)


def test_separate_heads_learn_their_own_labels():
  found = make(labels="separate").targets(inputs())
  assert found["audio"][0][0].tolist() == [1, 0, 0, 0]
  assert found["audio"][1].tolist() == [True, False, False]
  assert found["video"][0][0].tolist() == [0, 1, 0, 1]
  assert found["video"][1].tolist() == [True, True, False]


def test_thresholds_are_exclusive_and_choices_of_the_training():
  half = {**inputs(), "objects/audio": jnp.full((3, 4), 0.5, "f2")}
  for threshold, count in ((0.49, 12), (0.5, 0)):
    method = make(labels="audio", threshold_audio=threshold)
    assert method.targets(half)["audio"][0].sum() == count


def test_soft_and_hard_labels_agree_where_scores_are_sure():
  sure = jnp.asarray(np.eye(4)[[0, 2, 3]], "f2")
  same = {**inputs(), **{f"objects/{m}": sure for m in MODALITIES}}
  for labels in deteclap.LABELS:
    for target, known in make(labels=labels).targets(same).values():
      assert np.array_equal(target, sure) and known.all()


# --- Loss ---------------------------------------------------------------------


@functools.cache
def gradient(labels="or", **model):
  method = make(labels=labels, **model)

  def loss(params, inputs):
    return method.loss(params, inputs, KEY, STEP)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_label_loss_equals_pytorch():
  params = first_params()
  (total, aux), grads = gradient("separate")(params, inputs())
  seen, metrics = aux["intermediates"], aux["metrics"]
  base = metrics["loss_audio"] + metrics["loss_video"]
  base += 0.01 * metrics["loss_contrast"]
  expected = 0.0
  known = {"audio": [0], "video": [0, 1]}
  targets = {"audio": [[1, 0, 0, 0]], "video": [[0, 1, 0, 1], [0, 1, 0, 1]]}
  for m in MODALITIES:
    head = {
      k: torch.tensor(np.array(v), requires_grad=True)
      for k, v in params[f"objects_{m}"].items()
    }
    pooled = torch.tensor(np.array(seen[f"contrast/{m}"]))[known[m]]
    loss = torch.nn.BCEWithLogitsLoss()(
      pooled @ head["kernel"] + head["bias"],
      torch.tensor(targets[m], dtype=torch.float32),
    )
    loss.backward()
    np.testing.assert_allclose(
      metrics[f"loss_labels_{m}"], loss.item(), rtol=1e-6
    )
    for k, v in head.items():
      np.testing.assert_allclose(
        grads[f"objects_{m}"][k], v.grad, rtol=1e-4, atol=1e-7
      )
    expected += loss.item()
    assert metrics[f"labels_{m}"] == np.mean(np.sum(targets[m], axis=1))
  np.testing.assert_allclose(total, base + expected, rtol=1e-6)


def test_the_loss_reaches_the_encoders_of_both_modalities():
  """Without contrast and reconstruction nothing else does."""
  model = {"contrast_weight": 0.0, "mae_weight": 0.0}
  with pytest.raises(InputError, match="nothing to learn"):
    make(**model)
  params = first_params()
  run = gradient("or", contrast_weight=0.0, mae_weight=1e-30)
  (_, aux), grads = run(params, inputs())
  assert "loss_contrast" not in aux["metrics"]
  for m in MODALITIES:
    assert float(jnp.abs(grads[f"embed_{m}"]["kernel"]).max()) > 1e-6


def test_without_its_loss_it_is_cav_mae():
  plain = made.pretraining(scan=False, **SMALL)
  params = first_params()
  (total, aux), _ = gradient("or", label_weight=0.0)(params, inputs())
  ours = {k: v for k, v in params.items() if not k.startswith("objects_")}
  loss = jax.jit(lambda p, x: plain.loss(p, x, KEY, STEP))
  expected, other = loss(ours, made.inputs())
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  for name, value in other["metrics"].items():
    np.testing.assert_allclose(aux["metrics"][name], value, rtol=1e-6)


def test_clips_without_any_label_count_as_such():
  none = {f"objects/{m}": jnp.zeros((3, 4), "f2") for m in MODALITIES}
  (total, aux), _ = gradient()(first_params(), {**inputs(), **none})
  assert np.isfinite(total)
  assert aux["metrics"]["labels_audio"] == 0
  assert aux["metrics"]["loss_labels_audio"] > 0


def test_clips_without_scores_or_sound_change_nothing():
  """Neither in the value nor in the gradient, which stays finite."""
  gone = {
    f"objects/{m}": jnp.full((3, 4), NAN, jnp.float16) for m in MODALITIES
  }
  (total, aux), grads = gradient()(first_params(), {**inputs(), **gone})
  assert np.isfinite(total)
  assert aux["metrics"]["loss_labels_video"] == 0
  for name, leaf in trees.flatten(grads).items():
    assert np.isfinite(leaf).all(), name
    assert not name.startswith("objects_") or not np.any(leaf)
  deaf = {**inputs(), "has_audio": jnp.array([False, True, True])}
  (_, aux), _ = gradient()(first_params(), deaf)
  assert aux["metrics"]["labels_audio"] == 2  # the second clip's alone
  assert aux["metrics"]["labels_video"] == 2.5


# --- From and to CAV-MAE ------------------------------------------------------


def test_a_fine_tuning_takes_all_but_the_heads():
  config = config_lib.base_config()
  config.method = "cavmae_finetune"
  config.model = finetune_model("B", **made.SMALL, classes={"label": 7})
  target = methods.make(config)
  params = target.init(KEY, made.inputs())
  source = first_params()
  found = target.adapt(params, source, {})
  assert {"objects_audio/kernel", "objects_video/bias"} <= set(found.unused)
  kernel = found.params["encoder_audio"]["block_00"]
  expected = source["encoder_audio"]["block_00"]
  for a, b in zip(
    jax.tree.leaves(kernel), jax.tree.leaves(expected), strict=True
  ):
    assert np.array_equal(a, b)


def test_it_starts_from_cav_mae_and_from_heads_of_other_labels():
  params = first_params()
  source = dict(params)
  del source["objects_video"]
  source["objects_audio"] = {
    "kernel": jnp.zeros((16, 601)), "bias": jnp.zeros(601)
  }  # fmt: skip
  found = make().adapt(params, source, {})
  for m in MODALITIES:
    assert f"objects_{m}/kernel" in found.missing
    kernel = found.params[f"objects_{m}"]["kernel"]
    assert np.array_equal(kernel, params[f"objects_{m}"]["kernel"])


def test_embeddings_are_those_of_cav_mae():
  plain = made.pretraining(scan=False, **SMALL)
  ours = jax.jit(make().embed)(first_params(), made.inputs())
  theirs = jax.jit(plain.embed)(first_params(), made.inputs())
  for m in MODALITIES:
    np.testing.assert_allclose(ours[m], theirs[m], atol=1e-6)


def test_heads_are_a_group_of_the_optimizer():
  info = make().param_info("objects_audio/kernel")
  assert info.group == "head"
  assert info.layer == make().num_layers + 1


# --- Bad input ----------------------------------------------------------------


def test_missing_scores_are_said():
  with pytest.raises(InputError, match=r"data\.object_scores"):
    make().init(KEY, made.inputs())
  one = {k: v for k, v in inputs().items() if k != "objects/video"}
  with pytest.raises(InputError, match="needs video scores"):
    make(labels="and").loss(first_params(), one, KEY, STEP)
  assert make(labels="audio").targets(one)


def test_mixed_clips_are_refused():
  mixed = {**inputs(), "mix/video": jnp.full(3, 0.5)}
  with pytest.raises(InputError, match=r"data\.augment\.mixup"):
    make().loss(first_params(), mixed, KEY, STEP)


@pytest.mark.parametrize(
  ("model", "words"),
  [
    ({"labels": "xor"}, "Did you mean 'or'"),
    ({"threshold_audio": 1.5}, "threshold_audio=1.5"),
    ({"threshold": 0.5}, "threshold_"),
    ({"label_weight": -1.0}, r"label_weight=-1\.0"),
  ],
)
def test_wrong_keys_are_refused(model, words):
  with pytest.raises(InputError, match=words):
    make(**model)


# --- av_demo's own objects ----------------------------------------------------


def test_degraded_truth_errs_at_the_stated_rates():
  present = np.zeros((4_000, 24), bool)
  present[:, :4] = True
  found = np.stack(
    [
      demo_objects.scores(row, f"clip_{k}", 0, missed=0.2, imagined=0.05)
      for k, row in enumerate(present)
    ]
  )
  assert found.dtype == np.float16
  assert abs(np.mean(found[:, :4] <= 0.5) - 0.2) < 0.01
  assert abs(np.mean(found[:, 4:] > 0.5) - 0.05) < 0.005


def test_scores_of_av_demo_are_written_once(demo_data):
  section = config_lib.data_section()
  section.update(dir=demo_data, variant="frames10")
  out = demo_objects.ensure(section, pathlib.Path(demo_data))
  before = (out / "audio.npy").stat().st_mtime_ns
  assert demo_objects.ensure(section, out.parent) == out
  assert (out / "audio.npy").stat().st_mtime_ns == before
  split = records.Split(section, "train")
  found = object_scores.read(out)
  assert found["audio"].labels == list(demo.CLASSES)
  for m in MODALITIES:
    names, present = demo_objects.truth(split, m)
    column = object_scores.Column(found[m], split.column("id").tolist())
    values = np.stack([column[k] for k in range(len(names))])
    right = (values > 0.5) == present
    assert 0.85 < right.mean() < 1
    assert (
      json.loads((out / f"{m}.json").read_text())["source"]["missed"] == 0.3
    )
  heard, seen = (demo_objects.truth(split, m)[1] for m in MODALITIES)
  # What is out of sight, and what is silent.
  assert (heard & ~seen).any() and (seen & ~heard).any()


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_error_rates_lie_between_0_and_1(rate, demo_data):
  section = config_lib.data_section()
  section.update(dir=demo_data, variant="frames10")
  section.demo.missed = rate
  with pytest.raises(InputError, match=r"data\.demo\.missed"):
    demo_objects.ensure(section, demo_data)
