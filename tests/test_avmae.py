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

from avjax import config as config_lib
from avjax import losses
from avjax.errors import InputError
from avjax.methods import avmae
from avjax.nn import transformer
from avjax.weights import scenic
from tests import golden

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
    target, _, _ = avmae.standardise(raw, m, "patch")
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
    target, mean, deviation = avmae.standardise(patches, m, "patch")
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


@pytest.mark.parametrize(
  "tag", ["mae/mid_dshared", "mae/inpaint_early_dshared"]
)
def test_gradients_equal_the_public_code(tag):
  joint = tag == "mae/mid_dshared"
  options = {} if joint else {"encoder": "early", "objective": "inpaint_both"}
  value, grads = gradient(make(**options))(weights(tag), given())
  np.testing.assert_allclose(value, file()[f"{tag}/grad_loss"], **golden.LOSS)
  golden.assert_grad_norms(public(grads), file(), tag)


def test_five_adam_steps_equal_the_public_code():
  tag, params = "mae/mid_dshared", weights("mae/mid_dshared")
  step = gradient(make())
  adam = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)
  state, seen = adam.init(params), []

  def move(path, w, direction, rate):
    decay = 0.05 if "kernel" in jax.tree_util.keystr(path) else 0.0
    return (w - rate * direction) * (1 - rate * decay)

  for rate in file()[f"{tag}/adam_lrs"]:
    value, grads = step(params, given())
    seen.append(value)
    directions, state = adam.update(grads, state)
    params = jax.tree_util.tree_map_with_path(
      functools.partial(move, rate=rate), params, directions
    )
  seen.append(step(params, given())[0])
  np.testing.assert_allclose(seen, file()[f"{tag}/adam_losses"], **golden.LOSS)
  golden.assert_param_norms(public(params), file(), tag, "adam_param_norms")
