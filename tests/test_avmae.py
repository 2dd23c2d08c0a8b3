"""AV-MAE against the public implementation, and its own promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from avjax import config as config_lib
from avjax.errors import InputError
from avjax.methods import avmae
from avjax.nn import transformer
from avjax.weights import scenic
from tests import golden

NAMES = {"video": "rgb", "audio": "spectrogram"}
STRIDE = {"video": 7, "audio": 3}
PAIRS = [
  (encoder, decoder)
  for encoder in ("early", "separate", "shared", "mid")
  for decoder in ("shared", "early", "separate")
  if (encoder, decoder) != ("separate", "separate")
]


def make(dtype="float32", **overrides):
  """The method at the golden files' sizes."""
  config = config_lib.base_config()
  config.dtype = dtype
  config.model = avmae.default_model(
    "B", width=32, depth=4, heads=4, mlp=64,
    decoder_width=24, decoder_depth=2, decoder_heads=3, decoder_mlp=48,
    mask_video=0.7, **overrides,
  )  # fmt: skip
  return avmae.AVMAE(config)


@functools.cache
def file():
  return golden.load("avmae_tiny.npz")


def given(tag="masks", modalities=("video", "audio")):
  """The golden inputs with the masks that the public code drew."""
  made = golden.inputs(file())
  inputs = {"frames": made["rgb"], "fbank": made["spectrogram"]}
  counts = {"video": 8, "audio": 10}
  for m in modalities:
    kept = file()[f"{tag}/kept_{NAMES[m]}"]
    inputs[f"noise/{m}"] = golden.noise(kept, counts[m])
  return {k: jnp.asarray(v) for k, v in inputs.items()}


def weights(tag):
  return scenic.to_house(golden.reference_params(file(), tag))


def flat(params):
  return scenic.to_reference(params, "avmae", heads=4, decoder_heads=3)


def run(method, params, inputs):
  """loss, losses by modality, intermediates."""
  loss = jax.jit(method.loss)
  value, aux = loss(params, inputs, jax.random.key(0), jnp.int32(0))
  assert set(aux["metrics"]) <= {"loss_video", "loss_audio"}
  return value, aux["metrics"], aux["intermediates"]


def same(ours, tag, what, m, every=1):
  theirs = file()[f"{tag}/{what}_{NAMES[m]}"]
  np.testing.assert_allclose(ours[..., ::every], theirs, **golden.FORWARD)


def same_losses(total, losses, expected):
  ours = [losses["loss_video"], losses["loss_audio"], total]
  np.testing.assert_allclose(ours, expected, **golden.LOSS)


def check_forward(tag, seen, every=STRIDE):
  for m in NAMES:
    same(seen[f"encoded/{m}"], tag, "enc", m)
    same(seen[f"decoded/{m}"], tag, "dec", m)
    prediction = seen[f"prediction/{m}"]
    same(prediction, tag, "pred", m, every[m])
    norm = np.linalg.norm(np.asarray(prediction, np.float64))
    np.testing.assert_allclose(
      norm, file()[f"{tag}/pred_norm_{NAMES[m]}"], **golden.LOSS
    )


@pytest.mark.parametrize("encoder, decoder", PAIRS)
def test_pair_equals_the_public_code(encoder, decoder):
  tag = f"mae/{encoder}_d{decoder}"
  params, inputs = weights(tag), given()
  method = make(encoder=encoder, decoder=decoder)
  total, losses, seen = run(method, params, inputs)
  check_forward(
    tag, seen, {m: 1 for m in NAMES} if tag == "mae/mid_dshared" else STRIDE
  )
  same_losses(total, losses, file()[f"{tag}/loss_raw"])
  if decoder == "shared":
    tokens = jax.jit(method.encode)(params, inputs)
    for m in NAMES:
      same(tokens[m], tag, "eval_enc", m)
