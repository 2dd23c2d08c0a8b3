"""The recipe of tests/data/cavmae_tiny.npz: weights, inputs and sizes.

The file holds outputs of CAV-MAE's public code (float32, CPU); every weight
comes from the recipe under its public key, so that nothing is stored of it.
"""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from avjax import config as config_lib
from avjax import methods
from avjax.methods import cavmae_config
from avjax.nn.positions import sincos_2d
from avjax.weights import cavmae
from tests import golden, public_weights

SIZE = {"width": 32, "heads": 4, "mlp": 128}
DECODER = {
  "decoder_width": 32,
  "decoder_depth": 2,
  "decoder_heads": 4,
  "decoder_mlp": 128,
}
# What the file's README allows.
VALUES = {"rtol": 0, "atol": 1e-4}
GRAD_NORM = {"rtol": 1e-3, "atol": 0}

# Sizes at which a compilation takes a second, and their inputs.
SMALL = {"width": 16, "depth": 2, "heads": 2, "mlp": 32}
SMALL_DECODER = {
  "decoder_width": 16,
  "decoder_depth": 1,
  "decoder_heads": 2,
  "decoder_mlp": 32,
}


@functools.cache
def file():
  return golden.load("cavmae_tiny.npz")


@functools.cache
def pretraining(dtype="float32", scan=True, **model):
  """The method, by default at the file's sizes and compiled as a scan."""
  config = config_lib.base_config()
  config.method, config.dtype = "cavmae", dtype
  model = {**SIZE, **DECODER, "scan": scan, **model}
  config.model = cavmae_config.default_model("B", **model)
  return methods.make(config)


def finetuning(multilabel=False, **model):
  """The classifier, by default at the file's sizes and as a scan."""
  config = config_lib.base_config()
  config.method, config.data.multilabel = "cavmae_finetune", multilabel
  model = {**SIZE, "classes": {"label": 7}, "scan": True, **model}
  config.model = cavmae_config.finetune_model("B", **model)
  return methods.make(config)


@functools.cache
def inputs():
  """The recipe's inputs in the house's layout, with masking noise, labels."""
  rng = np.random.default_rng(77)
  audio = rng.standard_normal((3, 1024, 128))
  image = rng.standard_normal((3, 3, 224, 224))
  made = {
    "fbank": audio,
    "frames": image.transpose(0, 2, 3, 1)[:, None],
    "noise/audio": rng.uniform(size=(3, 512)),
    "noise/video": rng.uniform(size=(3, 196)),
    "label": rng.uniform(size=(3, 7)),
  }
  return {k: jnp.asarray(v, jnp.float32) for k, v in made.items()}


def small_inputs(b=8, frames=64):
  """A 2 x frames/16 grid of sound and a 2 x 2 grid of pixels per example."""
  rng = np.random.default_rng(5)
  return {
    "fbank": jnp.asarray(rng.standard_normal((b, frames, 32)), jnp.float32),
    "frames": jnp.asarray(
      rng.standard_normal((b, 1, 32, 32, 3)), jnp.float32
    ),
    "index": jnp.arange(100, 100 + b, dtype=jnp.uint32),
    "label": jnp.asarray(np.eye(7)[np.arange(b) % 7], jnp.float32),
  }  # fmt: skip


@functools.cache
def state(name):
  """Public state dict of 'pretraining' or 'finetuning', drawn by the recipe."""
  method = {"pretraining": pretraining, "finetuning": finetuning}[name]()
  shapes = jax.eval_shape(method.init, jax.random.key(0), inputs())
  blank = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  blank = cavmae.to_reference(blank, prefix="")
  tables = {
    key: sincos_2d((8, 64) if key.endswith("a") else (14, 14), x.shape[-1])
    for key, x in blank.items()
    if key.endswith(("pos_embed_a", "pos_embed_v"))
  }
  shapes = {key: x.shape for key, x in blank.items()}
  return public_weights.draw(shapes, tables)


@functools.cache
def weights(name):
  """`state` under the house's names, and what is put aside."""
  params, aside = cavmae.to_house(state(name))
  return jax.tree.map(jnp.asarray, params), aside


def dead_norms(decoder_blocks):
  """Public names of the LayerNorms that no pass uses, by their width at B."""
  stacks = {"blocks_a": 11, "blocks_v": 11, "decoder_blocks": decoder_blocks}
  return {
    f"{stack}.{i}.norm{n}_{m}.{part}": 512 if "decoder" in stack else 768
    for stack, depth in stacks.items()
    for i in range(depth)
    for n in (1, 2)
    for m in "av"
    for part in ("weight", "bias")
  }


def frozen_paths(method, params):
  """Parameters that the optimiser leaves alone."""
  from avjax import optim, trees

  return {
    path
    for path in trees.flatten(params)
    if method.param_info(path).group == optim.FROZEN
  }


@functools.cache
def gradient(method):
  """(params, inputs) -> ((loss, metrics), gradient), compiled once."""

  def loss(params, inputs):
    total, aux = method.loss(params, inputs, jax.random.key(0), jnp.int32(0))
    return total, aux["metrics"]

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def silent_paths(method, params, inputs):
  """Parameters without gradient: nothing that is computed reaches it.

  Told from the traced program, which need not be compiled.
  """
  from avjax import trees

  def loss(params, inputs):
    return method.loss(params, inputs, jax.random.key(0), jnp.int32(0))[0]

  def literal(x):
    return isinstance(x, jax.extend.core.Literal)

  program = jax.make_jaxpr(jax.grad(loss))(params, inputs).jaxpr
  reached = set(program.invars)
  for equation in program.eqns:
    if any(x in reached for x in equation.invars if not literal(x)):
      reached.update(equation.outvars)
  paths = zip(trees.flatten(params), program.outvars, strict=True)
  return {path for path, out in paths if literal(out) or out not in reached}
