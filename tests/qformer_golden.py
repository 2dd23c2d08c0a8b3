"""The recipe of tests/data/qformer.npz: weights, inputs and sizes.

The file holds outputs of BLIP-2's query encoder in the library `transformers`,
run in float64 on weights that are rounded to float32, in two layouts: 'coavt',
with cross-attention in every block and one MLP for text and queries, and
'blip2', as published. Weights are not stored.
"""

import ast
import functools

import jax.numpy as jnp
import numpy as np

from avjax.nn import bert, sizes
from avjax.weights import bert as weights
from tests import golden, public_weights

VALUES = {"rtol": 0, "atol": 1e-9}  # of float64
COSINES = {"rtol": 0, "atol": 1e-10}
LOSS = {"rtol": 0, "atol": 1e-9}
GRAD_NORM = {"rtol": 1e-8, "atol": 1e-12}
FLOAT32 = {"rtol": 0, "atol": 2e-5}

LAYOUTS = ("coavt", "blip2")


@functools.cache
def file():
  return golden.load("qformer.npz")


@functools.cache
def config():
  return ast.literal_eval(str(file()["config"]))


def module(layout, dtype=jnp.float64, **options):
  """The golden file's model."""
  own = {"cross_every": 2, "query_ffn": True} if layout == "blip2" else {}
  c = config()
  return bert.QueryEncoder(
    sizes.Size(c["H"], c["L"], c["heads"], c["FFN"]),
    vocabulary=c["V"],
    positions=c["maxpos"],
    queries=c["Nq"],
    projection=c["P"],
    dtype=dtype,
    **{**own, **options},
  )


@functools.cache
def state(layout):
  """Public state dict, drawn by the recipe and checked."""
  keys = [str(key) for key in file()[f"{layout}/keys"]]
  shapes = {
    key: tuple(int(n) for n in str(text).split(","))
    for key, text in zip(keys, file()[f"{layout}/shapes"], strict=True)
  }
  drawn = public_weights.draw(shapes)
  sums = [drawn[key].sum(dtype=np.float64) for key in keys]
  np.testing.assert_allclose(
    sums, file()[f"{layout}/weight_sums"], rtol=0, atol=1e-6
  )
  return drawn


def params(layout):
  """The same under the house's names; the temperature is not in the file."""
  tree, aside = weights.to_house(state(layout))
  assert not aside
  return {**tree, "temperature": np.float64(bert.TEMPERATURE)}


def inputs(dtype=jnp.float64):
  """Encoder tokens, ids and mask."""
  f = file()
  ids = jnp.asarray(f["ids"], jnp.int32)
  return jnp.asarray(f["enc"], dtype), ids, jnp.asarray(f["mask"], bool)


def by_public_name(tree, layout):
  """Parameters or gradients under the names of the file."""
  ours = {
    weights.bare(key): value
    for key, value in weights.to_reference(tree).items()
    if ".decoder." not in key
  }
  return {key: ours[weights.bare(key)] for key in state(layout)}
