"""The recipe of tests/data/avsiam_base.npz: weights, inputs and sizes.

The file holds outputs of AVSiam's public Base classes (float32, CPU, ViT-B);
weights and inputs come from the recipe, so that nothing is stored of them.
"""

import functools

import jax.numpy as jnp
import numpy as np

from avjax import config as config_lib
from avjax import methods
from avjax.methods import avsiam_config
from avjax.weights import avsiam
from tests import golden, public_weights

# What the file's README allows.
VALUES = {"rtol": 0, "atol": 1e-4}
LOSS = {"rtol": 2e-5, "atol": 0}
GRAD_NORM = {"rtol": 1e-3, "atol": 1e-6}


@functools.cache
def file():
  return golden.load("avsiam_base.npz")


def pretraining(**model):
  """The public Base model, compiled as a scan."""
  config = config_lib.base_config()
  config.method = "avsiam"
  model = {"public_base": True, "scan": True, **model}
  config.model = avsiam_config.default_model("B", **model)
  return methods.make(config)


def state(name):
  """Public state dict of 'pre' or 'ft', drawn by the recipe and checked."""
  found = file()
  shapes = {
    str(key): tuple(int(n) for n in str(text).split(","))
    for key, text in zip(
      found[f"{name}_keys"], found[f"{name}_shapes"], strict=True
    )
  }
  drawn = public_weights.draw(shapes)
  sums = [drawn[key].sum(dtype=np.float64) for key in shapes]
  np.testing.assert_allclose(sums, found[f"{name}_weight_sums"], atol=1e-6)
  return drawn


@functools.cache
def weights(name):
  """`state` under the house's names, and what is put aside."""
  params, aside = avsiam.to_house(state(name))
  return params, aside


@functools.cache
def inputs():
  """The recipe's inputs in the house's layout, by what they are for.

  'contrast': 5 clips with the public masks; 'mae': clips 0 and 1 with noise;
  'label' and 'frames' [2 10 h w 3] of fine-tuning.
  """
  rng, found = np.random.default_rng(77), file()

  def draw(name, values):
    values = np.asarray(values, np.float32)
    first = values.reshape(-1)[:3]
    np.testing.assert_array_equal(first, found[f"input_first3_{name}"])
    return values

  audio = draw("audio", rng.standard_normal((5, 1024, 128)))
  image = draw("image", rng.standard_normal((5, 3, 224, 224)))
  for m in "av":
    assert np.array_equal(rng.permutation(5), found[f"perm_{m}"])
  for m, n in (("a", 512), ("v", 196)):
    draw(f"noise_{m}", rng.uniform(size=(5, n)))
  noise = {
    f"noise_mae/{name}": draw(f"mae_noise_{m}", rng.uniform(size=(2, n)))
    for m, name, n in (("a", "audio", 512), ("v", "video", 196))
  }
  label = draw("labels", rng.uniform(size=(2, 527)))
  frames = draw("frames", rng.standard_normal((2, 10, 3, 224, 224)))
  clips = {"fbank": audio, "frames": image.transpose(0, 2, 3, 1)[:, None]}
  masks = {}
  for m, name in (("a", "audio"), ("v", "video")):
    masks[f"noise/{name}"] = 1.0 - found[f"con_kept_{m}"]
    masks[f"noise_ratio/{name}"] = found[f"con_ratio_{m}"]
  made = {
    "contrast": {**clips, **masks},
    "mae": {**{k: v[:2] for k, v in clips.items()}, **noise},
    "label": label,
    "frames": frames.transpose(0, 1, 3, 4, 2),
  }
  return {
    k: {n: jnp.asarray(x, jnp.float32) for n, x in v.items()}
    if isinstance(v, dict)
    else jnp.asarray(v)
    for k, v in made.items()
  }
