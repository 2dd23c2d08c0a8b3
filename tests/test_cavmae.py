"""CAV-MAE's pretraining against the public code, and its own promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import collectives, losses, optim, trees
from avjax import config as config_lib
from avjax.errors import InputError
from avjax.methods import cavmae as method_lib
from avjax.nn import cav_encoder, masking, transformer
from avjax.nn.positions import sincos_2d
from avjax.weights import cavmae, transfer
from tests import cavmae_golden as made
from tests import runs
from tests.cavmae_golden import GRAD_NORM, VALUES

MODALITIES = ("audio", "video")
KEY, STEP = jax.random.key(0), jnp.int32(0)


@functools.cache
def gradient():
  """(params, inputs) -> ((loss, aux), gradient) of the norm-pix model."""
  method = made.pretraining()

  def loss(params, inputs):
    return method.loss(params, inputs, KEY, STEP)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def golden_step():
  params, _ = made.weights("pretraining")
  (total, aux), grads = gradient()(params, made.inputs())
  return total, aux["metrics"], aux["intermediates"], grads


def close(ours, name, tolerance=VALUES):
  np.testing.assert_allclose(ours, made.file()[name], **tolerance)


def public_norms(tree, name):
  """Float64 norms under the public names, in the file's order."""
  flat = cavmae.to_reference(tree, made.weights(name)[1], prefix="")
  return [
    np.linalg.norm(np.asarray(flat[str(key)], np.float64))
    for key in made.file()["param_names"]
  ]


def numbers(total, metrics):
  """In the order of the public code, the contrastive loss weighted."""
  both = metrics["loss_audio"] + metrics["loss_video"]
  audio, video = metrics["loss_audio"], metrics["loss_video"]
  contrast = 0.01 * metrics["loss_contrast"]
  return [total, both, audio, video, contrast, metrics["contrast_accuracy"]]


# --- The public code ---------------------------------------------------------


def test_losses_and_stages_equal_the_public_code():
  total, metrics, seen, _ = golden_step()
  close(numbers(total, metrics), "np1_losses")
  close(metrics["loss_contrast"], "nce_one_way")
  close(seen["joint/av"].mean(1), "joint_tokens_mean")
  for m in MODALITIES:
    assert np.array_equal(seen[f"removed/{m}"], made.file()[f"mask_{m[0]}"])
    close(seen[f"contrast/{m}"], f"contrast_{m[0]}")
  close(seen["prediction/audio"][:, ::31, ::5], "pred_a_sample")
  close(seen["prediction/video"][:, ::13, ::7], "pred_v_sample")


def test_raw_targets_and_both_directions_equal_the_public_code():
  """Predictions do not depend on the targets, so no pass is needed."""
  _, metrics, seen, _ = golden_step()
  raw, inputs = made.pretraining(norm_pix=False), made.inputs()
  prediction = {m: seen[f"prediction/{m}"] for m in MODALITIES}

  @jax.jit
  def run(prediction, inputs):
    ids = raw.draw(inputs, KEY)
    removed = {
      m: masking.removed(ids[m], x.shape[1]) for m, x in prediction.items()
    }
    rows, _ = raw.errors(prediction, inputs, removed)
    return {
      f"loss_{m}": losses.mean_error(rows[f"errors/{m}"]) for m in removed
    }

  found = run(prediction, inputs)
  total = sum(found.values()) + 0.01 * metrics["loss_contrast"]
  close(numbers(total, {**metrics, **found}), "np0_losses")
  both = made.pretraining(contrast_two_way=True)
  pooled = {m: seen[f"contrast/{m}"] for m in MODALITIES}
  close(both.contrast(pooled, inputs)[0], "nce_two_way")


def test_gradients_equal_the_public_code():
  grads = golden_step()[3]
  ours = cavmae.to_reference(grads, prefix="")
  positions = {key for key in ours if "pos_embed" in key}
  assert not any(np.any(ours[key]) for key in positions)
  expected = made.file()["grad_norms"]
  names = made.file()["param_names"]
  told = {str(key) for key, v in zip(names, expected, strict=True) if v == v}
  # No gradient in the public code: no parameter here, or frozen.
  dead = set(made.weights("pretraining")[1])
  assert set(ours) - positions - dead == told
  assert {str(key) for key in names} - told == dead
  norms = public_norms(grads, "pretraining")
  for key, ours, theirs in zip(names, norms, expected, strict=True):
    if str(key) in told:
      np.testing.assert_allclose(ours, theirs, **GRAD_NORM, err_msg=str(key))


def test_five_adam_steps_equal_the_public_code():
  method, params = made.pretraining(), made.weights("pretraining")[0]
  section = config_lib.base_config().optimizer
  section.update(name="adam_l2", b1=0.95, weight_decay=0.1)
  optimizer = optim.make(
    section, lambda _: 1e-3, params, method.param_info, method.num_layers
  )
  state, seen = optimizer.init(params), []
  update = jax.jit(optimizer.update)
  total, _, _, grads = golden_step()
  for step in range(5):
    if step:
      (total, _), grads = gradient()(params, made.inputs())
    seen.append(total)
    params, state, _ = update(grads, state, params)
  close(seen, "adam_wd0.1_lr1e-3_losses")
  norms = public_norms(params, "pretraining")
  close(norms, "adam_param_norms", {"rtol": 1e-4, "atol": 0})


def test_retrieval_features_equal_the_public_code():
  method, (params, _) = made.pretraining(), made.weights("pretraining")
  inputs = made.inputs()
  module = method.encoder(inputs)
  passes = [cav_encoder.ALONE[m] for m in MODALITIES]

  @jax.jit
  def run(params, inputs):
    tokens = method.apply(module, params, inputs, passes)
    return tokens, method.embed(params, {"fbank": inputs["fbank"]})

  (audio, video), features = run(params, inputs)
  close(audio.mean(1), "feat_a")
  close(video.mean(1), "feat_v")
  close(audio[:, ::37], "feat_a_tokens_sample")
  close(video[:, ::17], "feat_v_tokens_sample")
  assert list(features) == ["audio"]
  np.testing.assert_allclose(
    features["audio"], losses.unit(audio.mean(1)), atol=1e-6
  )
  np.testing.assert_allclose(jnp.square(features["audio"]).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_positions_equal_the_public_code(name):
  for m, grid in (("a", (8, 64)), ("v", (14, 14))):
    close(sincos_2d(grid, 32), f"{name}_{m}_sample", {"atol": 1e-6})


# --- Public weights ----------------------------------------------------------


@pytest.mark.parametrize("name", ["pretraining", "finetuning"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_round_trip_is_exact(name, prefix):
  state = {prefix + key: v for key, v in made.state(name).items()}
  params, aside = cavmae.to_house(state)
  back = cavmae.to_reference(params, aside, prefix=prefix)
  assert set(back) == set(state)
  assert all(np.array_equal(back[key], state[key]) for key in state)
  fresh = cavmae.to_reference(params)
  assert {key.removeprefix("module.") for key in fresh} == set(made.state(name))
  assert np.array_equal(fresh["module.blocks_a.3.norm1_v.weight"], np.ones(32))
  assert not fresh["module.blocks_v.10.norm2_a.bias"].any()


def test_patches_are_flattened_as_the_kernels_are():
  """A convolution of the public kernel gives our tokens."""
  state, inputs = made.state("pretraining"), made.inputs()
  params, _ = made.weights("pretraining")
  ours = cav_encoder.patches(inputs, made.pretraining().model)
  images = {
    "audio": np.asarray(inputs["fbank"]).swapaxes(1, 2)[:, None],
    "video": np.asarray(inputs["frames"])[:, 0].transpose(0, 3, 1, 2),
  }
  for m, image in images.items():
    kernel = state[f"patch_embed_{m[0]}.proj.weight"]
    tokens = jax.lax.conv(
      jnp.asarray(image), jnp.asarray(kernel), (16, 16), "VALID"
    )
    tokens = tokens.reshape(3, 32, -1).swapaxes(1, 2)
    made_here = ours[m] @ params[f"embed_{m}"]["kernel"]
    np.testing.assert_allclose(made_here, tokens, atol=1e-4)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"blocks_a.0.attn.qvk.weight": np.zeros((96, 32))},
     r"1 of \d+ keys .* \(nearest: 'blocks_a.0.attn.qkv.weight'"),
    ({"blocks_v.7.mlp.fc1.weight": np.zeros((64, 32))},
     r"'blocks_v.7.mlp.fc1.weight' has shape \(64, 32\); expected \(128, 32\)"),
    ({"blocks_u.0.attn.qkv.bias": np.zeros(32)},
     r"has shape \(32,\); expected \(96,\) as modality_a has it"),
    ({"decoder_pos_embed_a": np.zeros((1, 100, 32))},
     r"\(1, 100, 32\); expected \(1, 512, 32\) as .*pos_embed_a has it"),
  ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(change, words):
  state = made.state("pretraining")
  state = {**state, **change}
  with pytest.raises(InputError, match=words):
    cavmae.to_house(state)


def test_parameters_without_a_public_place_are_refused():
  with pytest.raises(InputError, match="no place for 'encoder/norm/scale'"):
    cavmae.to_reference({"encoder": {"norm": {"scale": np.ones(4)}}})


# --- Sizes -------------------------------------------------------------------


def test_number_of_parameters():
  config = config_lib.base_config()
  config.model = method_lib.default_model("B")
  method = method_lib.CAVMAE(config)
  inputs = {
    "fbank": jax.ShapeDtypeStruct((1, 1024, 128), jnp.float32),
    "frames": jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.float32),
  }
  params = jax.eval_shape(method.init, KEY, inputs)
  leaves = trees.flatten(params)
  ours = sum(leaf.size for leaf in leaves.values())
  dead = made.dead_norms(decoder_blocks=8)
  assert len(dead) == 240 and sum(dead.values()) == 167_936
  assert ours + sum(dead.values()) == 191_036_160
  assert set(made.weights("pretraining")[1]) == set(made.dead_norms(2))
  frozen = made.frozen_paths(method, params)
  assert sum(leaves[path].size for path in frozen) == 906_240
  assert frozen == {
    f"{kind}positions_{m}" for kind in ("", "decoder_") for m in MODALITIES
  }


def test_layers_and_decay_of_parameters():
  method = made.pretraining()
  layers = {
    "embed_audio/kernel": 0,
    "positions_video": 0,
    "encoder_audio/block_00/norm1/scale": 1,
    "encoder_video/block_10/mlp/fc1/bias": 11,
    "encoder_joint/block_00/norm1_audio/scale": 12,
    "encoder_joint/norm/scale": 13,
    "decoder/block_00/mlp/fc1/kernel": 13,
  }
  assert method.num_layers == 12
  for path, layer in layers.items():
    info = method.param_info(path)
    assert (info.layer, info.decay) == (layer, True)


# --- Our own promises, at small sizes ----------------------------------------


@functools.cache
def small(**model):
  sizes = {**made.SMALL, **made.SMALL_DECODER}
  return made.pretraining(**{**sizes, "scan": False, **model})


@functools.cache
def small_params():
  init = jax.jit(small().init)
  return init(jax.random.key(1), made.small_inputs())


def partial_inputs():
  """Inputs of which one lacks the sound, one the picture and one is padding."""
  inputs = made.small_inputs()
  inputs["has_audio"] = jnp.arange(8) != 2
  inputs["has_video"] = jnp.arange(8) != 5
  inputs["valid"] = jnp.arange(8) != 7
  return inputs


def test_first_values():
  values = trees.flatten(small_params())
  bound = np.sqrt(6 / (4 * 16))  # Xavier of the whole [d 3d]
  kernel = values["encoder_audio/block_00/attention/qkv/kernel"]
  assert 0.95 * bound < np.abs(kernel).max() <= bound
  assert not values["decoder/block_00/mlp/fc1/bias"].any()
  bias = values["embed_audio/bias"]
  assert 0.7 / 16 < np.abs(bias).max() <= 1 / 16
  assert 0.01 < values["mask_token"].std() < 0.03
  assert np.array_equal(values["positions_audio"], sincos_2d((2, 4), 16))


def test_loss_does_not_depend_on_the_devices():
  params, inputs = small_params(), partial_inputs()
  function = made.gradient(small())
  (one, metrics), grads = function(params, inputs)
  spread = runs.over_devices(inputs)
  compiled = function.lower(params, spread).compile()
  (eight, spread_metrics), spread_grads = compiled(params, spread)
  np.testing.assert_allclose(one, eight, rtol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(value, spread_metrics[name], rtol=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (grads, spread_grads)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  # The sounds' vectors are gathered, and who counts; tokens stay put.
  moved = collectives.find(compiled)
  sizes = [x.result_bytes for x in moved if x.kind == "all-gather"]
  assert max(sizes) == 4 * 8 * 16 and sum(sizes) <= 4 * (8 * 16 + 8)
  kinds = {"all-gather", "all-reduce", "reduce-scatter"}
  assert {one.kind for one in moved} <= kinds


@pytest.mark.parametrize(
  "weights, names",
  [
    ({"contrast_weight": 0.0}, {"loss_audio", "loss_video"}),
    ({"mae_weight": 0.0}, {"loss_contrast", "contrast_accuracy"}),
  ],
)
def test_ablations_freeze_what_they_do_not_use(weights, names):
  method, inputs = small(**weights), made.small_inputs()
  params = small_params()
  silent = made.silent_paths(method, params, inputs)
  assert silent == made.frozen_paths(method, params)
  shapes = jax.eval_shape(method.loss, params, inputs, KEY, STEP)
  assert set(shapes[1]["metrics"]) == names


def test_scan_and_remat_equal_unrolled():
  plain, method = small(), small(scan=True, remat="full")
  inputs, params = partial_inputs(), small_params()
  stacked = transformer.stack_layers(params)
  (value, _), grads = made.gradient(plain)(params, inputs)
  (other, _), found = made.gradient(method)(stacked, inputs)
  np.testing.assert_allclose(value, other, rtol=1e-6)
  found = transformer.unstack_layers(found)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, found
  )


def test_missing_modality_does_not_count():
  """The inputs of what is missing change nothing."""
  inputs = partial_inputs()
  run, params = made.gradient(small()), small_params()
  (total, metrics), grads = run(params, inputs)
  no_sound = jnp.array([2, 7])
  no_picture = jnp.array([5, 7])
  inputs["fbank"] = inputs["fbank"].at[no_sound].add(3.0)
  inputs["frames"] = inputs["frames"].at[no_picture].add(3.0)
  (_, changed), _ = run(params, inputs)
  names = ("loss_contrast", "contrast_accuracy")
  for name in names:
    np.testing.assert_allclose(metrics[name], changed[name], rtol=1e-5)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  # Of the 5 examples that count, each is one vote.
  votes = float(metrics["contrast_accuracy"]) * 5
  assert abs(votes - round(votes)) < 1e-5
  inputs["fbank"] = inputs["fbank"].at[0].add(3.0)
  (_, changed), _ = run(params, inputs)
  assert abs(metrics["loss_contrast"] - changed["loss_contrast"]) > 1e-4


def test_half_precision_runs():
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params())
  method, inputs = small(dtype="bfloat16"), made.small_inputs()
  total, aux = jax.eval_shape(method.loss, half, inputs, KEY, STEP)
  assert total.dtype == jnp.float32
  assert aux["intermediates"]["prediction/video"].dtype == jnp.bfloat16


def test_reconstructions():
  method, inputs = small(), made.small_inputs(2, frames=70)
  seen = jax.jit(method.reconstruct)(small_params(), inputs, KEY)
  assert set(seen) == {
    name
    for m in MODALITIES
    for name in (f"{m}/input", f"joint/{m}/output", f"joint/{m}/mask")
  }
  for m in MODALITIES:
    mask = seen[f"joint/{m}/mask"]
    shape = seen[f"{m}/input"].shape
    assert mask.shape == seen[f"joint/{m}/output"].shape == shape
    assert mask.dtype == bool
  mask = np.asarray(seen["joint/audio/mask"])
  np.testing.assert_allclose(mask[:, :64].mean(), 6 / 8)
  assert not mask[:, 64:].any()
  # A perfect prediction is the input.
  for m, x in cav_encoder.patches(inputs, method.model).items():
    target, mean, deviation = cav_encoder.standardise(m, x, method.model)
    canvas = inputs[cav_encoder.INPUTS[m]]
    image = cav_encoder.paste(
      m, target * deviation + mean, canvas, method.model
    )
    np.testing.assert_allclose(image, canvas, atol=1e-5)
  variance = np.asarray(target).var(-1, ddof=1)
  np.testing.assert_allclose(variance, 1, rtol=1e-4)


def test_inputs_that_do_not_fit_are_refused():
  method, inputs = small(), made.small_inputs(2)
  with pytest.raises(InputError, match="needs 'fbank'"):
    method.loss(small_params(), {"frames": inputs["frames"]}, KEY, STEP)
  longer = made.small_inputs(2, frames=96)
  with pytest.raises(InputError, match="8 rows, .* 2 x 6 = 12 patches"):
    method.embed(small_params(), longer)
  with pytest.raises(InputError, match="mask_video=0.8 keeps 0 of the 4"):
    small(mask_video=0.8).draw(inputs, KEY)
  two = {"frames": jnp.zeros((1, 2, 32, 32, 3))}
  with pytest.raises(InputError, match="sees 1 frame, but frames have 2"):
    method.embed(small_params(), two)


@pytest.mark.parametrize(
  "overrides, words",
  [
    ({"joint_depth": 2}, "only 1 is defined; the public code"),
    ({"masking": "times"}, "Did you mean 'time'"),
    ({"mae_weight": 0.0, "contrast_weight": 0.0}, "nothing to learn"),
    ({"depth": 1}, "leaves no block for the modalities"),
    ({"patch_video": (2, 16, 16)}, "sees one frame"),
    ({"group_size": 1}, "at least 2 examples"),
    ({"norm_pics": True}, "Did you mean 'norm_pix'"),
  ],
)
def test_what_cannot_work_is_refused(overrides, words):
  with pytest.raises(InputError, match=words):
    small(**overrides)


# --- Starting from another model ---------------------------------------------


def test_time_axis_of_positions():
  # Two bands of three steps; the value says band and step.
  table = np.array([[10.0], [11], [12], [20], [21], [22]])
  change = transfer.time_axis(2)
  cut, words = change(table, (4, 1))
  assert cut.ravel().tolist() == [10, 11, 20, 21]
  assert words == "time 3 -> 2 of 2 bands, cut"
  longer, words = change(table, (12, 1))
  first = [10, 10.25, 10.75, 11.25, 11.75, 12]
  assert longer.ravel().tolist() == first + [10 + x for x in first]
  assert "linear" in words
  assert change(table, (5, 1)) is None and change(table, (4, 2)) is None


def test_picture_positions():
  table = np.array([[0.0], [2], [4], [6]])
  larger, words = transfer.picture(table, (16, 1))
  assert larger[:4].ravel().tolist() == [0, 0.5, 1.5, 2]
  assert larger[::4].ravel().tolist() == [0, 1, 3, 4]
  assert words == "2 x 2 -> 4 x 4, bilinear"
  assert transfer.picture(table, (15, 1)) is None


def test_adapt_to_a_longer_clip():
  method = small()
  method.config.data.fbank.num_mels = 32
  longer = jax.eval_shape(method.init, KEY, made.small_inputs(2, frames=96))
  blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), longer)
  loaded = method.adapt(blank, jax.device_get(small_params()), {})
  assert not loaded.missing and not loaded.unused
  assert set(loaded.reshaped) == {
    "positions_audio",
    "decoder_positions_audio",
  }
  assert loaded.params["positions_audio"].shape == (12, 16)
  from_two = {m: jax.device_get(small_params()) for m in MODALITIES}
  loaded = method.adapt(blank, from_two, {})
  assert not loaded.missing
  assert loaded.loaded["embed_audio/kernel"] == "audio/embed_audio/kernel"
  assert loaded.loaded["mask_token"] == "video/mask_token"
