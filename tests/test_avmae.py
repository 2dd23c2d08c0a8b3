"""AV-MAE against the public implementation, and its own promises.

The golden forward passes run op by op: all variants share the same small
operations, so that only the first one pays for compiling.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from avjax import collectives, losses
from avjax import config as config_lib
from avjax.errors import InputError
from avjax.methods import avmae
from avjax.nn import tokenizers, transformer
from avjax.weights import scenic
from tests import golden, runs

NAMES = {"video": "rgb", "audio": "spectrogram"}
COUNTS = {"video": 8, "audio": 10}
STRIDE = {"video": 7, "audio": 3}
PAIRS = [
  (encoder, decoder)
  for encoder in ("early", "separate", "shared", "mid")
  for decoder in ("shared", "early", "separate")
  if (encoder, decoder) != ("separate", "separate")
]
TINY = {
  "width": 32,
  "depth": 4,
  "heads": 4,
  "mlp": 64,
  "decoder_width": 24,
  "decoder_depth": 2,
  "decoder_heads": 3,
  "decoder_mlp": 48,
  "mask_video": 0.7,
}


def make(dtype="float32", **overrides):
  """The method, by default at the golden files' sizes."""
  config = config_lib.base_config()
  config.dtype = dtype
  config.model = avmae.default_model("B", **{**TINY, **overrides})
  return avmae.AVMAE(config)


@functools.cache
def file():
  return golden.load("avmae_tiny.npz")


@functools.cache
def given(tag="masks", modalities=("video", "audio")):
  """The golden inputs with the masks that the public code drew."""
  made = golden.inputs(file())
  inputs = {"video": made["rgb"], "audio": made["spectrogram"]}
  inputs = {avmae.INPUTS[m]: inputs[m] for m in modalities}
  for m in modalities:
    kept = file()[f"{tag}/kept_{NAMES[m]}"]
    inputs[f"noise/{m}"] = golden.noise(kept, COUNTS[m])
  return {k: jnp.asarray(v) for k, v in inputs.items()}


@functools.cache
def weights(tag):
  reference = golden.reference_params(file(), tag)
  return jax.tree.map(jnp.asarray, scenic.to_house(reference))


def public(params):
  """A tree under the public names, flat."""
  return scenic.to_reference(params, "avmae", heads=4, decoder_heads=3)


def run(method, params, inputs, seed=0):
  """Total loss, metrics and intermediates."""
  value, aux = method.loss(params, inputs, jax.random.key(seed), jnp.int32(0))
  return value, aux["metrics"], aux["intermediates"]


def same(ours, name, every=1):
  theirs = file()[name]
  np.testing.assert_allclose(ours[..., ::every], theirs, **golden.FORWARD)


def same_losses(total, metrics, name):
  ours = [metrics["loss_video"], metrics["loss_audio"], total]
  np.testing.assert_allclose(ours, file()[name], **golden.LOSS)


def check_forward(tag, seen, modalities=("video", "audio"), stride=STRIDE):
  for m in modalities:
    same(seen[f"encoded/{m}"], f"{tag}/enc_{NAMES[m]}")
    same(seen[f"decoded/{m}"], f"{tag}/dec_{NAMES[m]}")
    same(seen[f"prediction/{m}"], f"{tag}/pred_{NAMES[m]}", stride[m])
    norm = np.linalg.norm(np.asarray(seen[f"prediction/{m}"], np.float64))
    expected = file()[f"{tag}/pred_norm_{NAMES[m]}"]
    np.testing.assert_allclose(norm, expected, **golden.LOSS)


def check_standardised_loss(tag, seen):
  """Predictions do not depend on the targets, so no pass is needed."""
  metrics = {}
  for m in NAMES:
    raw = seen[f"target/{m}"]
    target, _, _ = tokenizers.standardise(raw, m, "patch")
    metrics[f"loss_{m}"] = losses.masked_mse(
      seen[f"prediction/{m}"], target, seen[f"removed/{m}"]
    )
  same_losses(sum(metrics.values()) / 2, metrics, f"{tag}/loss_std")


# --- The public code ---------------------------------------------------------


@pytest.mark.parametrize("encoder, decoder", PAIRS)
def test_pair_equals_the_public_code(encoder, decoder):
  tag = f"mae/{encoder}_d{decoder}"
  method = make(encoder=encoder, decoder=decoder)
  total, metrics, seen = run(method, weights(tag), given())
  complete = tag == "mae/mid_dshared"
  check_forward(
    tag, seen, stride=dict.fromkeys(NAMES, 1) if complete else STRIDE
  )
  same_losses(total, metrics, f"{tag}/loss_raw")
  check_standardised_loss(tag, seen)
  if decoder == "shared":
    tokens = method.encode(weights(tag), given())
    for m in NAMES:
      same(tokens[m], f"{tag}/eval_enc_{NAMES[m]}")


def test_every_stage_of_mid_fusion_equals_the_public_code():
  tag, params = "mae/mid_dshared", weights("mae/mid_dshared")
  method = make()
  _, _, seen = run(method, params, given())
  for m, patches in method.patches(given()).items():
    layer = params[f"embed_{m}"]
    embedded = patches @ layer["kernel"] + layer["bias"]
    same(embedded, f"{tag}/embed_{NAMES[m]}")
    same(seen[f"junction/{m}"], f"{tag}/junction_{NAMES[m]}")
    same(seen[f"decoder_input/{m}"], f"{tag}/dec_in_{NAMES[m]}")
    # Targets are the inputs themselves: equal to the last bit.
    stored = file()[f"{tag}/target_raw_{NAMES[m]}"]
    assert np.array_equal(seen[f"target/{m}"][..., :: STRIDE[m]], stored)
    removed = file()[f"masks/binary_{NAMES[m]}"]
    assert np.array_equal(seen[f"removed/{m}"], removed)
    target, mean, deviation = tokenizers.standardise(patches, m, "patch")
    same(target, f"{tag}/target_std_{NAMES[m]}", STRIDE[m])
    np.testing.assert_allclose(target * deviation + mean, patches, atol=1e-5)


def test_losses_of_mid_fusion_equal_the_public_code():
  tag, params = "mae/mid_dshared", weights("mae/mid_dshared")
  total, metrics, seen = run(make(standardise="patch"), params, given())
  same_losses(total, metrics, f"{tag}/loss_std")
  total, metrics, seen = run(make(standardise="channel"), params, given())
  same_losses(total, metrics, f"{tag}/loss_std_per_channel")
  same(seen["target/video"], f"{tag}/target_std_per_channel_rgb", 7)
  total, metrics, _ = run(make(loss_unmasked=True), params, given())
  same_losses(total, metrics, f"{tag}/loss_unmasked_too")
  valid = {**given(), "valid": jnp.array([True, False])}
  total, metrics, _ = run(make(), params, valid)
  same_losses(total, metrics, f"{tag}/loss_batch_mask_last0")
  # Undivided by the size of a patch, and as sum and number of tokens.
  total, metrics, seen = run(make(), params, given())
  sizes = {"video": 2 * 16 * 16 * 3, "audio": 16 * 16}
  whole = {f"loss_{m}": metrics[f"loss_{m}"] * sizes[m] for m in NAMES}
  same_losses(sum(whole.values()) / 2, whole, f"{tag}/loss_not_by_dim")
  for m in NAMES:
    count = seen[f"removed/{m}"].sum()
    ours = [whole[f"loss_{m}"] * count, count]
    expected = file()[f"{tag}/metric_mean_squared_error_{NAMES[m]}"]
    np.testing.assert_allclose(ours, expected, **golden.LOSS)


@pytest.mark.parametrize(
  "encoder, decoder",
  [("early", "shared"), ("mid", "shared"), ("separate", "shared"),
   ("early", "early")],
)  # fmt: skip
def test_inpainting_equals_the_public_code(encoder, decoder):
  tag = f"mae/inpaint_{encoder}_d{decoder}"
  method = make(
    encoder=encoder, decoder=decoder, objective="inpaint_both", allow_any=True
  )
  total, metrics, seen = run(method, weights(tag), given())
  check_forward(tag, seen)
  same_losses(total, metrics, f"{tag}/loss_raw")
  check_standardised_loss(tag, seen)
  inputs = [seen[f"decoder_input/{m}"] for m in NAMES]
  for m, x in zip(NAMES, inputs, strict=True):
    mask = file()[f"{tag}/token_mask_{NAMES[m]}"]
    assert np.array_equal(seen[f"removed/{m}"], mask)
    if decoder == "shared":
      same(x, f"{tag}/dec_in_{NAMES[m]}")
  if decoder == "early":
    same(jnp.concatenate(inputs, 1), f"{tag}/dec_in_concat")


@pytest.mark.parametrize("m", ["video", "audio"])
def test_one_modality_equals_the_public_code(m):
  tag = f"mae/only_{NAMES[m]}"
  inputs = given(tag, (m,))
  method = make(modality=m[0])
  total, metrics, seen = run(method, weights(tag), inputs)
  check_forward(tag, seen, (m,))
  np.testing.assert_allclose(total, file()[f"{tag}/loss_raw"], **golden.LOSS)
  tokens = method.encode(weights(tag), inputs)
  same(tokens[m], f"{tag}/eval_enc_{NAMES[m]}")


@pytest.mark.parametrize(
  "name, options",
  [
    ("tokens", {"modality_tokens": True}),
    ("nonorm", {"normalise_output": False}),
  ],
)
def test_option_equals_the_public_code(name, options):
  tag = f"mae/{name}_mid_dshared"
  method, params = make(**options), weights(tag)
  total, metrics, seen = run(method, params, given())
  check_forward(tag, seen)
  same_losses(total, metrics, f"{tag}/loss_raw")
  check_standardised_loss(tag, seen)
  if name == "tokens":
    for m, x in method.encode(params, given()).items():
      same(x, f"{tag}/eval_enc_{NAMES[m]}")


def test_stochastic_depth_equals_the_public_code():
  method, params = make(drop_path=0.5), weights("mae/mid_dshared")
  patches = method.patches(given())
  ids, drawn = method.draw(given(), patches, jax.random.key(0))
  # Stored are the layers that draw; the first of every stack never does.
  dropped = file()["mae/droplayer_mid_dshared/dropped"].reshape(3, 1, 2, 2)
  keep = {
    name: jnp.concatenate([jnp.ones((1, 2, 2)), 1.0 - rows])
    for name, rows in zip(drawn, dropped, strict=True)
  }
  assert list(keep) == ["encoder_video", "encoder_audio", "encoder_joint"]
  assert {name: x.shape for name, x in drawn.items()} == {
    name: x.shape for name, x in keep.items()
  }
  out = method.apply(method.autoencoder(), params, patches, ids, keep)
  for m in NAMES:
    same(out["encoded"][m], f"mae/droplayer_mid_dshared/enc_{NAMES[m]}")


def gradient(method):
  """(params, inputs) -> (loss, gradient), compiled."""

  def loss(params, inputs):
    return method.loss(params, inputs, jax.random.key(0), jnp.int32(0))[0]

  return jax.jit(jax.value_and_grad(loss))


def test_inpainting_gradients_equal_the_public_code():
  tag = "mae/inpaint_early_dshared"
  method = make(encoder="early", objective="inpaint_both")
  value, grads = gradient(method)(weights(tag), given())
  np.testing.assert_allclose(value, file()[f"{tag}/grad_loss"], **golden.LOSS)
  golden.assert_grad_norms(public(grads), file(), tag)


def test_gradients_and_five_adam_steps_equal_the_public_code():
  tag, params = "mae/mid_dshared", weights("mae/mid_dshared")
  step = gradient(make())
  value, grads = step(params, given())
  np.testing.assert_allclose(value, file()[f"{tag}/grad_loss"], **golden.LOSS)
  golden.assert_grad_norms(public(grads), file(), tag)

  adam = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)
  state, seen = adam.init(params), []

  def move(path, w, direction, rate):
    decay = 0.05 if "kernel" in jax.tree_util.keystr(path) else 0.0
    return (w - rate * direction) * (1 - rate * decay)

  @jax.jit
  def update(params, state, grads, rate):
    directions, state = adam.update(grads, state)
    moved = functools.partial(move, rate=rate)
    return jax.tree_util.tree_map_with_path(moved, params, directions), state

  for rate in file()[f"{tag}/adam_lrs"]:
    value, grads = step(params, given())
    seen.append(value)
    params, state = update(params, state, grads, jnp.float32(rate))
  seen.append(step(params, given())[0])
  np.testing.assert_allclose(seen, file()[f"{tag}/adam_losses"], **golden.LOSS)
  golden.assert_param_norms(public(params), file(), tag, "adam_param_norms")


# --- Our own promises --------------------------------------------------------


def full_size(size, **overrides):
  config = config_lib.base_config()
  config.model = avmae.default_model(size, **overrides)
  return avmae.AVMAE(config)


@pytest.mark.parametrize(
  "size, encoder, millions",
  [
    ("B", "early", 94.8), ("B", "shared", 94.8), ("B", "mid", 165.7),
    ("B", "separate", 179.9), ("L", "early", 318.7), ("L", "mid", 595.8),
    ("L", "separate", 621.0),
  ],
)  # fmt: skip
def test_number_of_parameters(size, encoder, millions):
  method = full_size(size, encoder=encoder)
  inputs = {
    "frames": jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32),
    "fbank": jax.ShapeDtypeStruct((1, 800, 128), jnp.float32),
  }
  params = jax.eval_shape(method.init, jax.random.key(0), inputs)
  leaves = jax.tree.leaves(params)
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)
  assert round(sum(leaf.size for leaf in leaves) / 1e6, 1) == millions


@pytest.mark.parametrize(
  "overrides, words",
  [
    ({"encoder": "separate", "decoder": "separate"}, "two uncoupled"),
    ({"encoder": "shared", "objective": "inpaint_both"}, "joins the"),
    ({"modality": "a", "objective": "inpaint_both"}, "needs both modalities"),
    ({"encoder": "middle"}, "Did you mean 'mid'"),
    ({"fusion_layers": 4}, "fusion_layers=4 is not between 1 and 3"),
    ({"heads": 5}, "width 32 is not divisible by model.heads 5"),
    ({"size": "XL"}, "unknown model size 'XL'"),
    ({"mask_vidio": 0.5}, "Did you mean 'mask_video'"),
  ],
)
def test_what_cannot_work_is_refused(overrides, words):
  overrides = {"heads": 4, **overrides}
  with pytest.raises(InputError, match=words):
    config = config_lib.base_config()
    size = overrides.pop("size", "B")
    config.model = avmae.default_model(size, **{**TINY, **overrides})
    avmae.AVMAE(config)


def test_inputs_that_do_not_fit_are_refused():
  params = weights("mae/mid_dshared")
  with pytest.raises(InputError, match="needs 'fbank'"):
    run(make(), params, {"frames": given()["frames"]})
  method = make(objective="inpaint_both", encoder="mid", mask_audio=0.0)
  with pytest.raises(InputError, match="10 kept tokens of audio leave none"):
    run(method, params, given())


def test_layers_and_decay_of_parameters():
  method = make()
  layers = {
    "embed_video/kernel": 0,
    "encoder_audio/block_00/attention/qkv/kernel": 1,
    "encoder_video/block_01/mlp/fc1/bias": 2,
    "encoder_joint/block_00/norm1/scale": 3,
    "encoder_joint/block_01/mlp/fc2/kernel": 4,
    "encoder_joint/norm/scale": 5,
    "decoder/block_00/mlp/fc1/kernel": 5,
    "head_audio/kernel": 5,
    "mask_token_video": 5,
  }
  assert method.num_layers == 4
  for path, layer in layers.items():
    info = method.param_info(path)
    assert (info.layer, info.decay) == (layer, path.endswith("kernel"))


def test_first_values():
  params = jax.jit(make(modality_tokens=True).init)(jax.random.key(0), given())
  zero = {"mask_token_video", "head_audio/kernel", "modality_token_video",
          "decoder_modality_token_audio"}  # fmt: skip
  values = traverse_util.flatten_dict(params, sep="/")
  for path in zero:
    assert not np.any(values[path])
  bound = np.sqrt(6 / (32 + 32))  # Xavier for query, key and value apart
  kernel = values["encoder_joint/block_00/attention/qkv/kernel"]
  assert kernel.shape == (32, 96)
  assert 0.95 * bound < np.abs(kernel).max() <= bound
  bias = values["decoder/block_00/mlp/fc1/bias"]
  assert 0 < np.abs(bias).max() < 1e-5
  assert set(public(params)) == set(
    map(str, file()["mae/tokens_mid_dshared/param_paths"])
  )


def drawn():
  """Inputs whose masks are drawn."""
  inputs = {k: v for k, v in given().items() if not k.startswith("noise")}
  inputs = {k: jnp.tile(v, (4, *[1] * (v.ndim - 1))) for k, v in inputs.items()}
  return {**inputs, "index": jnp.arange(100, 108, dtype=jnp.uint32)}


def test_missing_modality_does_not_count():
  method, params = make(), weights("mae/mid_dshared")
  inputs = {**given(), "has_audio": jnp.array([True, False])}
  _, metrics, seen = run(method, params, inputs)
  for m, rows in (("audio", slice(0, 1)), ("video", slice(0, 2))):
    alone = losses.masked_mse(
      seen[f"prediction/{m}"][rows],
      seen[f"target/{m}"][rows],
      seen[f"removed/{m}"][rows],
    )
    np.testing.assert_allclose(metrics[f"loss_{m}"], alone, rtol=1e-6)


def test_draws_follow_the_example_and_not_the_devices():
  method, params = make(drop_path=0.5), weights("mae/mid_dshared")

  def losses_and_masks(params, inputs, rng):
    total, aux = method.loss(params, inputs, rng, jnp.int32(0))
    masks = {m: aux["intermediates"][f"removed/{m}"] for m in NAMES}
    return total, masks

  rng, inputs = jax.random.key(3), drawn()
  one, masks = jax.jit(losses_and_masks)(params, inputs, rng)
  assert {m: int(x.sum()) for m, x in masks.items()} == {
    "video": 8 * 5,
    "audio": 8 * 5,
  }
  assert len({tuple(row.tolist()) for row in np.asarray(masks["audio"])}) > 4
  spread = runs.over_devices(inputs)
  compiled = jax.jit(losses_and_masks).lower(params, spread, rng).compile()
  eight, spread_masks = compiled(params, spread, rng)
  np.testing.assert_allclose(one, eight, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, masks, spread_masks)
  # Only sums of the loss cross devices: neither tokens nor masks do.
  kinds = {"all-reduce", "reduce-scatter"}
  assert {one.kind for one in collectives.find(compiled)} <= kinds
  # Alone, an example keeps its mask.
  last = {k: v[7:] for k, v in inputs.items()}
  ids, _ = method.draw(last, method.patches(last), rng)
  removed = method.removed("video", ids, 8)
  assert np.array_equal(removed[0], masks["video"][7])


def test_scan_equals_unrolled():
  tag, params = "mae/mid_dshared", weights("mae/mid_dshared")
  method = make(scan=True, remat="full")
  stacked = transformer.stack_layers(params)
  value, grads = gradient(method)(stacked, given())
  np.testing.assert_allclose(value, file()[f"{tag}/grad_loss"], **golden.LOSS)
  grads = transformer.unstack_layers(grads)
  golden.assert_grad_norms(public(grads), file(), tag)
  shapes = jax.eval_shape(method.init, jax.random.key(0), given())
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_half_precision_runs():
  params = weights("mae/mid_dshared")
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  loss = jax.jit(make("bfloat16").loss)
  total, aux = loss(half, given(), jax.random.key(0), jnp.int32(0))
  assert total.dtype == jnp.float32
  assert aux["intermediates"]["prediction/video"].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    total, file()["mae/mid_dshared/loss_raw"][2], rtol=2e-2
  )


def test_learned_positions_and_one_direction():
  method = make(
    encoder="early", objective="inpaint_video_from_audio",
    positions="learned_1d",
  )  # fmt: skip
  params = jax.eval_shape(method.init, jax.random.key(0), given())
  assert params["positions_video"].shape == (8, 32)
  assert params["decoder_positions_video"].shape == (8, 24)
  # Nothing is made that the objective does not use.
  assert not {"head_audio", "mask_token_audio", "decoder_project_video"} & set(
    params
  )
  _, aux = jax.eval_shape(
    method.loss, params, given(), jax.random.key(0), jnp.int32(0)
  )
  assert list(aux["metrics"]) == ["loss_video"]


def test_embedding_leaves_missing_modalities_out():
  method, params = make(), weights("mae/mid_dshared")
  inputs = {**given(), "has_video": jnp.array([True, False])}
  features = method.embed(params, inputs)
  tokens = method.encode(params, inputs)
  np.testing.assert_allclose(
    features["audio"], tokens["audio"].mean(1), atol=1e-6
  )
  both = (features["video"] + features["audio"]) / 2
  np.testing.assert_allclose(features["av"][0], both[0], atol=1e-6)
  np.testing.assert_allclose(features["av"][1], features["audio"][1], atol=1e-6)
  alone = method.embed(params, {"fbank": inputs["fbank"]})
  assert list(alone) == ["audio"]


@pytest.mark.parametrize("decoder", ["early", "shared"])
def test_reconstructions(decoder):
  tag = f"mae/mid_d{decoder}"
  method, params = make(decoder=decoder, standardise="patch"), weights(tag)
  # Four frames of sound that fill no patch are left out.
  inputs = dict(given())
  inputs["fbank"] = jnp.pad(inputs["fbank"], ((0, 0), (0, 4), (0, 0)))
  seen = method.reconstruct(params, inputs, jax.random.key(0))
  views = ["joint", "inpaint"] if decoder == "early" else ["joint"]
  names = {f"{m}/input" for m in NAMES}
  for view in views:
    names |= {
      f"{view}/{m}/{what}" for m in NAMES for what in ("output", "mask")
    }
  assert set(seen) == names
  for m, rate in {"video": 5 / 8, "audio": 50 / 105}.items():
    shape = seen[f"{m}/input"].shape
    for view in views:
      mask = seen[f"{view}/{m}/mask"]
      assert seen[f"{view}/{m}/output"].shape == mask.shape == shape
      assert mask.dtype == bool
      if view == "joint":
        np.testing.assert_allclose(mask.mean(), rate, rtol=1e-6)
  left_out = seen["joint/audio/mask"][:, 80:]
  assert not left_out.any()
  if decoder == "early":
    assert seen["inpaint/video/mask"].all()
    # What is shown of the video depends on the sound.
    inputs["fbank"] = inputs["fbank"] + 1
    other = method.reconstruct(params, inputs, jax.random.key(0))
    change = other["inpaint/video/output"] - seen["inpaint/video/output"]
    assert np.abs(change).max() > 1e-3


def test_a_perfect_prediction_is_the_input():
  """Patches, targets and pictures use one layout."""
  method = make(standardise="channel")
  inputs = given()
  patches = method.patches(inputs)
  ids, _ = method.draw(inputs, patches, jax.random.key(0))
  targets = {
    m: tokenizers.standardise(x, m, "channel")[0] for m, x in patches.items()
  }
  for m in NAMES:
    image, mask = method.picture(m, inputs, patches, ids, targets)
    given_image = inputs[avmae.INPUTS[m]]
    np.testing.assert_allclose(image, given_image, atol=1e-5)
