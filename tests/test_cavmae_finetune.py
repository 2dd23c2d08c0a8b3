"""CAV-MAE's classifier against the public code, and its own promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import losses, trees
from avjax.errors import InputError
from avjax.methods import supervised
from tests import cavmae_golden as made

KEY, STEP = jax.random.key(0), jnp.int32(0)
# The public names say which modality is there, ours which one is missing.
MODES = {
  "av": "multimodal",
  "a": "audioonly",
  "v": "videoonly",
  "missing_v": "missingaudioonly",
  "missing_a": "missingvideoonly",
}


def close(ours, name):
  np.testing.assert_allclose(ours, made.file()[name], **made.VALUES)


@functools.cache
def outputs():
  """Logits by mode and features; the weights are the fine-tuning model's."""
  method, (params, _) = made.finetuning(), made.weights("finetuning")

  def run(inputs):
    found = {m: method.predict(params, inputs, mode=m) for m in MODES}
    return found, method.embed(params, inputs)

  return jax.jit(run)(made.inputs())


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_public_code(mode):
  close(outputs()[0][mode]["label"], f"ft_{MODES[mode]}")


def test_features_equal_the_public_code():
  _, features = outputs()
  for m in ("audio", "video"):
    expected = losses.unit(jnp.asarray(made.file()[f"ft_feat_{m[0]}"]))
    np.testing.assert_allclose(features[m], expected, **made.VALUES)


@pytest.mark.parametrize(
  "options, name",
  [
    ({"multilabel": True}, "ft_bce"),
    ({"multilabel": False}, "ft_ce_soft"),
    ({"loss": "bce"}, "ft_bce"),
  ],
)
def test_losses_equal_the_public_code(options, name):
  method = made.finetuning(label_smoothing=0.0, **options)
  values = supervised.cross_entropy(
    method.criterion, outputs()[0]["av"]["label"], made.inputs()["label"]
  )
  close(losses.weighted_mean(values), name)


def test_number_of_parameters():
  sizes = {"width": 0, "heads": 0, "mlp": 0}
  method = made.finetuning(classes={"label": 527}, **sizes)
  inputs = {
    "fbank": jax.ShapeDtypeStruct((1, 1024, 128), jnp.float32),
    "frames": jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.float32),
  }
  params = jax.eval_shape(method.init, KEY, inputs)
  ours = sum(leaf.size for leaf in jax.tree.leaves(params))
  dead = made.dead_norms(decoder_blocks=0)
  assert ours + sum(dead.values()) == 164_907_023
  assert set(made.weights("finetuning")[1]) == set(dead)


# --- Labels ------------------------------------------------------------------


def test_labels_by_hand():
  labels = jnp.eye(4)[jnp.array([0, 1, 2, 2])]
  alone = losses.assign_labels(labels, 0.1)
  assert np.allclose(alone[0], [0.9, 0.025, 0.025, 0.025])
  weight = jnp.array([0.7, 0.7, 1.0, 1.0])
  mixed = losses.assign_labels(labels, 0.1, weight)
  assert np.allclose(mixed[0], [0.655, 0.295, 0.025, 0.025])
  assert np.allclose(mixed[1], [0.295, 0.655, 0.025, 0.025])
  assert np.allclose(mixed[2:], alone[2:])
  many = losses.assign_labels(jnp.array([[1.0, 1.0, 0.0, 0.0]]), 0.1)
  assert np.allclose(many, [[0.9, 0.9, 0.025, 0.025]])


# --- Our own promises, at small sizes ----------------------------------------


def small(**options):
  return made.finetuning(**{**made.SMALL, "scan": False, **options})


@functools.cache
def small_params():
  return jax.jit(small().init)(jax.random.key(1), made.small_inputs())


@pytest.mark.parametrize("modality", ["av", "a", "v"])
def test_what_a_mode_does_not_touch_is_frozen(modality):
  method, params = small(modality=modality), small_params()
  inputs = made.small_inputs()
  frozen = made.frozen_paths(method, params)
  # v is a with the names changed.
  if modality != "v":
    assert made.silent_paths(method, params, inputs) == frozen
  assert ("encoder_joint/norm/scale" in frozen) == (modality != "av")
  assert "encoder_joint/block_00/norm2_audio/bias" in frozen or modality == "a"
  assert method.param_info("classifier/norm/scale").group == "head"
  assert method.param_info("positions_audio").group != "head"


def test_frozen_base_trains_the_head_alone():
  method, params = small(freeze_base=True), small_params()
  silent = made.silent_paths(method, params, made.small_inputs())
  head = {path for path in trees.flatten(params) if "classifier" in path}
  assert silent == made.frozen_paths(method, params)
  assert silent == set(trees.flatten(params)) - head


@pytest.mark.parametrize("modality", ["a", "v"])
def test_one_modality_needs_no_inputs_of_the_other(modality):
  method, inputs = small(modality=modality), made.small_inputs(2)
  own, other = ("fbank", "frames")[:: 1 if modality == "a" else -1]
  alone = {k: v for k, v in inputs.items() if k != other}
  params = jax.eval_shape(method.init, KEY, alone)
  missing = {"fbank": "audio", "frames": "video"}[other]
  assert not [path for path in trees.flatten(params) if missing in path]
  out = jax.eval_shape(method.predict, params, alone)
  assert out["label"].shape == (2, 7)
  assert method.modes == ("av", modality)
  with pytest.raises(InputError, match=f"the inputs have no '{own}'"):
    method.predict(small_params(), {other: inputs[other]})


def test_an_example_that_lacks_a_modality_is_answered_by_the_other():
  method, params = small(), small_params()
  inputs = made.small_inputs(4)
  inputs["has_video"] = jnp.array([True, True, False, True])
  inputs["has_audio"] = jnp.array([False, True, True, True])
  given = {k: v for k, v in inputs.items() if not k.startswith("has_")}
  modes = ["missing_a", "av", "missing_v", "av"]

  @jax.jit
  def run(params, inputs):
    found = {m: method.predict(params, given, mode=m)["label"] for m in modes}
    # Such examples do not count in training.
    loss, aux = method.loss(params, inputs, KEY, STEP)
    logits = aux["intermediates"]["logits"][jnp.array([1, 3])]
    labels = losses.assign_labels(inputs["label"][jnp.array([1, 3])], 0.1)
    whole = losses.softmax_cross_entropy(logits, labels).mean()
    return found, method.predict(params, inputs)["label"], loss, whole

  found, ours, loss, whole = run(params, inputs)
  for row, mode in enumerate(modes):
    np.testing.assert_allclose(ours[row], found[mode][row], atol=1e-6)
  np.testing.assert_allclose(loss, whole, rtol=1e-5)


def test_mixed_labels_take_the_weight_of_what_is_trained():
  inputs = {"mix/audio": jnp.array([0.4]), "mix/video": jnp.array([0.8])}
  for names, weight in (
    (("audio", "video"), 0.6), (("audio",), 0.4), (("video",), 0.8),
  ):  # fmt: skip
    mixed = supervised.mixed(inputs, names)
    np.testing.assert_allclose(mixed, [weight], rtol=1e-6)
  assert supervised.mixed({}, ("audio",)) is None


def test_several_heads_and_refusals():
  method = small()
  method.config.data.heads = ("verb", "noun")
  sizes = {"verb": 3, "noun": 4}
  method.config.model.classes = sizes
  method = type(method)(method.config)
  inputs = made.small_inputs(2)
  for head, k in sizes.items():
    inputs[f"label/{head}"] = jnp.eye(k)[jnp.array([0, 1])]
  params = jax.eval_shape(method.init, KEY, inputs)
  _, aux = jax.eval_shape(method.loss, params, inputs, KEY, STEP)
  assert set(aux["metrics"]) == {"loss_verb", "loss_noun"}
  with pytest.raises(InputError, match="Did you mean 'missing_a'"):
    method.predict(params, inputs, mode="missing_audio")
  with pytest.raises(InputError, match="unknown model.loss 'sigmoid'"):
    small(loss="sigmoid")


# --- Starting from another model ---------------------------------------------


def test_starts_from_pretraining():
  method = made.finetuning()
  source, _ = made.weights("pretraining")
  shapes = jax.eval_shape(method.init, KEY, made.inputs())
  blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  loaded = method.adapt(blank, jax.device_get(source), {})
  assert not loaded.reshaped
  assert {path.split("/")[0] for path in loaded.missing} == {"classifier"}
  decoder = ("decoder", "head_", "mask_token")
  assert all(path.startswith(decoder) for path in loaded.unused)
  kernel = trees.flatten(loaded.params)["encoder_joint/norm_video/scale"]
  assert np.array_equal(kernel, made.state("pretraining")["norm_v.weight"])


def test_other_classes_keep_their_first_values():
  method = small(classes={"label": 5})
  shapes = jax.eval_shape(method.init, KEY, made.small_inputs())
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  loaded = method.adapt(params, jax.device_get(small_params()), {})
  assert loaded.missing == ["classifier/out/bias", "classifier/out/kernel"]
  assert loaded.loaded["classifier/norm/scale"] == "classifier/norm/scale"
