"""The recipe of tests/data/uavm.npz: weights, inputs and sizes.

The file holds outputs of UAVM's public classes, run in float64 on weights and
inputs that are rounded to float32; neither is stored. Not stored either: the
widest models, and single tokens of the representations.
"""

import ast
import functools

import jax.numpy as jnp
import numpy as np

from avjax import config as config_lib
from avjax import methods
from avjax.methods import uavm_config
from tests import golden, public_weights

# What the file's README allows, of float64 and of float32.
VALUES = {"rtol": 0, "atol": 1e-9}
MAPS = {"rtol": 0, "atol": 1e-10}
HEAT = {"rtol": 0, "atol": 1e-8}
LOSS = {"rtol": 2e-5, "atol": 0}
GRAD_NORM = {"rtol": 1e-3, "atol": 1e-6}
LATER_LOSS = {"rtol": 2e-3, "atol": 0}
PARAM_NORM = {"rtol": 1e-4, "atol": 0}

VARIANTS = {
  "unified": "unified",
  "ind": "independent",
  "full_att": "cross_modal",
}


@functools.cache
def file():
  return golden.load("uavm.npz")


def method(name, **model):
  """The model of one of the file's configurations, in the data's soft CE."""
  sizes = ast.literal_eval(str(file()[f"{name}/config"]))
  config = config_lib.base_config()
  config.method = "uavm"
  config.model = uavm_config.default_model(
    variant=VARIANTS[sizes["kind"]],
    specific_layers=sizes["N"],
    shared_layers=sizes["Ns"],
    width=sizes["E"],
    shared_width=sizes["S"],
    classes={"label": sizes["classes"]},
    label_smoothing=0.0,
    loss="ce",
    **model,
  )
  return methods.make(config)


@functools.cache
def state(name):
  """Public state dict, drawn by the recipe and checked."""
  keys = [str(key) for key in file()[f"{name}/keys"]]
  shapes = {
    key: tuple(int(n) for n in str(text).split(","))
    for key, text in zip(keys, file()[f"{name}/shapes"], strict=True)
  }
  drawn = public_weights.draw(shapes)
  sums = [drawn[key].sum(dtype=np.float64) for key in keys]
  np.testing.assert_allclose(sums, file()[f"{name}/weight_sums"], atol=1e-6)
  return drawn


def inputs(dtype=np.float32):
  """Three clips, two of them with zeros at the end."""
  rng = np.random.default_rng(77)
  audio, video = (rng.standard_normal((3, 30, 64)) for _ in range(2))
  label = rng.uniform(size=(3, 7))
  audio[2, 25:], video[1, 28:] = 0, 0
  made = {"features/audio": audio, "features/video": video, "label": label}
  return {k: jnp.asarray(np.float32(x), dtype) for k, x in made.items()}
