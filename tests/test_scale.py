"""What devices send each other, hold and compute in whole training steps.

Read from compiled programs on simulated devices, and from their results.
"""

import functools
import math
import re

import jax
import numpy as np
import pytest

from avjax import collectives, experiment, flops, hlo, step_cost, trees
from tests import runs

# A config of each method, and arguments of its model where matrices weigh.
WIDE = {"width": 64, "heads": 4, "mlp": 256}
DECODER = {"decoder_width": 64, "decoder_heads": 4, "decoder_mlp": 256}
METHODS = {
  "avmae": ("avmae_vgg", {**WIDE, **DECODER}),
  "mbt": ("avmae_vgg_finetune", WIDE),
  "cavmae": ("cavmae_vgg", {**WIDE, **DECODER}),
  "avsiam": ("avsiam_audioset", {**WIDE, **DECODER}),
  "coavt": (
    "coavt_audioset",
    {**WIDE, "text_width": 64, "text_heads": 4, "text_mlp": 256},
  ),
  "uavm": ("uavm_vgg", {**WIDE, "shared_width": 64}),
}
# data x fsdp x tensor
ONE, DATA, BOTH, ALL = (1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2)
MESHES = {
  "avmae": (ONE, DATA, BOTH, ALL),
  "mbt": (ONE, BOTH, ALL),
  "cavmae": (ONE, DATA, BOTH, ALL),
  "avsiam": (ONE, BOTH, ALL),
  "coavt": (ONE, BOTH, ALL),
  "uavm": (ONE, BOTH, ALL),
}
OTHERS = [(name, axes) for name, some in MESHES.items() for axes in some[1:]]
# A mesh that splits the batch alone, where there is one.
BATCH = {name: some[1] for name, some in MESHES.items()}
# Kinds of collectives but for the sums of gradients.
OTHERWISE = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Products that `tensor` splits.
SPLIT = r"/(attention|cross|mlp(_query)?)/"


@pytest.fixture(scope="module")
def step(demo_data):
  """(method, mesh, batch size) -> set-up, and its step's program."""

  @functools.cache
  def build(name, axes, batch_size=0):
    config, model = METHODS[name]
    model = {f"model__{key}": value for key, value in model.items()}
    # Adam hides how large a gradient is; this keeps it as it is.
    config = runs.stage(
      config, data__dir=demo_data, evals={}, optimizer__name="sgd",
      optimizer__momentum=0.0, optimizer__weight_decay=0.0,
      optimizer__average="none", **runs.CONSTANT, **model,
    )  # fmt: skip
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = axes
    batch_size = batch_size or (32 if name == "avsiam" else 16)
    setup = experiment.build(
      runs.plain(config), batch_size=batch_size, steps_per_epoch=10
    )
    return setup, setup.compile_step()

  return build


def size(shapes):
  """Bytes of a tree of arrays or shapes."""
  leaves = jax.tree.leaves(shapes)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def shard_size(shapes):
  """Bytes of it on one device."""
  leaves = jax.tree.leaves(shapes)
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in leaves
  )


def moved(program, *kinds):
  """Bytes that devices have after some kinds of collectives."""
  return sum(
    one.times * one.result_bytes
    for one in collectives.find(program)
    if one.kind in kinds
  )


# --- Values ------------------------------------------------------------------


def first_state(setup):
  """Random numbers, the same for every mesh, without compiling anything."""
  rng, leaves = np.random.default_rng(4), {}
  for path, leaf in trees.flatten(setup.state_shapes["params"]).items():
    value = 0.1 * rng.standard_normal(leaf.shape) + path.endswith("scale")
    value = np.full(leaf.shape, 0.1) if path.endswith("temperature") else value
    leaves[path] = jax.device_put(np.float32(value), leaf.sharding)
  rest = {k: v for k, v in setup.state_shapes.items() if k != "params"}
  rest = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), rest
  )
  return {"params": trees.unflatten(leaves), **rest}


def batch_of(setup):
  """Noise; some examples lack a modality, the last is padding."""
  batch, rng = experiment.synthetic_batch(setup), np.random.default_rng(5)
  there = np.ones(len(batch["index"]), bool)
  for i, key in enumerate(("has_audio", "has_video", "valid"), start=1):
    if key in batch:
      batch[key] = jax.device_put(there, batch[key].sharding)
      batch[key] = batch[key].at[-i].set(False)
  for key in batch:
    if key.startswith("features/"):
      value = np.float32(rng.standard_normal(batch[key].shape))
      batch[key] = jax.device_put(value, batch[key].sharding)
  return batch


@pytest.fixture(scope="module")
def values(step):
  """(method, mesh) -> metrics and gradients of a step."""

  @functools.cache
  def run(name, axes):
    setup, program = step(name, axes)
    state, metrics = program(first_state(setup), batch_of(setup))
    grads = trees.flatten(jax.device_get(state["opt_state"]["trace"]))
    return jax.device_get(metrics), grads

  return run


@pytest.mark.parametrize("name, axes", OTHERS)
def test_every_mesh_learns_the_same(values, name, axes):
  (wanted, wanted_grads), (found, grads) = values(name, ONE), values(name, axes)
  assert wanted.keys() == found.keys() and wanted_grads.keys() == grads.keys()
  for key, value in wanted.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)
  largest = max(np.abs(x).max() for x in wanted_grads.values())
  for path, gradient in wanted_grads.items():
    scale = max(np.abs(gradient).max(), 1e-6 * largest)
    error = np.abs(grads[path] - gradient).max() / scale
    assert error <= 1e-4, (path, error)


# --- Traffic -----------------------------------------------------------------


def gradient_parts(setup):
  """Parameter -> (its bytes, how many passes add to its gradient)."""

  def loss(params, batch, step):
    key = jax.random.key(0)
    inputs = setup.prepare(batch, key, True)
    return setup.method.loss(params, inputs, key, step)[0]

  shapes = setup.state_shapes
  arguments = shapes["params"], setup.batch_shapes, shapes["step"]
  jaxpr = jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr
  made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
  flat = trees.flatten(shapes["params"]).items()
  return {
    path: (size(leaf), parts(made, var))
    for (path, leaf), var in zip(flat, jaxpr.outvars, strict=True)
  }


def parts(made, var):
  """Number of terms of a sum."""
  eqn = made[var]
  if eqn.primitive.name == "add_any":
    return sum(parts(made, x) for x in eqn.invars)
  zero = eqn.primitive.name == "broadcast_in_dim"
  return 0 if zero and not eqn.invars[0].aval.shape else 1


def sent(program, devices, *kinds):
  """Bytes that leave a device, in groups of so many devices."""
  return sum(
    one.sent_bytes
    for one in collectives.find(program)
    if one.kind in kinds and one.devices == devices
  )


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_sent_once(step, name):
  setup, program = step(name, BATCH[name])
  found = gradient_parts(setup)
  # Neither fixed tables nor what no loss reaches.
  trained = size(setup.state_shapes["opt_state"]["trace"])
  assert trained == sum(nbytes for nbytes, parts in found.values() if parts)
  # Where several passes share parameters, XLA for CPUs sends every part of a
  # sum, where that for GPUs sends the sum (AllReduceReassociate). What comes
  # on top are tokens added to whole tables of places, in the tables' shape.
  wanted = sum(nbytes * parts for nbytes, parts in found.values())
  # The program holds both branches of UAVM's draw, one of which runs.
  most = 2 if name == "uavm" else 1.07
  assert wanted <= moved(program, "all-reduce") <= most * wanted


@pytest.mark.parametrize("name", ["avmae", "cavmae"])
def test_gradients_do_not_depend_on_the_batch(step, name):
  """A contrast alone does, and as little as test_contrast.py allows it."""
  (_, small), (_, large) = step(name, DATA), step(name, DATA, 32)
  gradients = [moved(x, "all-reduce") for x in (small, large)]
  assert gradients[0] == gradients[1]
  for program, batch_size in ((small, 16), (large, 32)):
    rest = sent(program, 8, *OTHERWISE)
    if name == "cavmae":
      once = 4 * batch_size * WIDE["width"] * 7 / 8
      assert 2 * once <= rest <= 2.1 * once
    else:
      assert rest == 0


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_gathered_once(step, name):
  """Over fsdp, and nothing else is sent there."""
  setup, program = step(name, BOTH)
  leaves = jax.tree.leaves(setup.state_shapes["params"])
  split = [x for x in leaves if not x.sharding.is_fully_replicated]
  assert size(split) > 0.95 * size(leaves)
  parameters = size(leaves)
  assert 0.9 * size(split) <= gathered(program, 2) <= size(split)
  others = sent(program, 8, *OTHERWISE)
  if name in ("avmae", "mbt", "uavm"):
    assert others == 0
  elif name in ("cavmae", "avsiam"):
    assert others <= 2.1 * 4 * len_of(setup) * WIDE["width"] * 7 / 8
  else:
    # The clips of hard negatives, tokens and all, and the turned matrix of
    # similarities: both ways of the contrast.
    tokens = 4 * len_of(setup) * WIDE["width"] * (2 * 50 + 2)
    assert gathered(program, 8) <= 1.2 * tokens
    assert sent(program, 8, "all-to-all") < 0.01 * parameters
  kinds = {one.kind for one in collectives.find(program)}
  allowed = {"all-gather", "all-reduce", "reduce-scatter"}
  assert kinds <= allowed | ({"all-to-all"} if name == "coavt" else set())


def gathered(program, devices):
  """Bytes of whole arrays, gathered in groups of so many devices."""
  return sum(
    one.times * one.result_bytes
    for one in collectives.find(program)
    if one.kind == "all-gather" and one.devices == devices
  )


def len_of(setup):
  """Examples of a batch."""
  return len(setup.batch_shapes["index"])


@pytest.mark.parametrize("name", METHODS)
def test_devices_hold_their_share(step, name):
  for axes in MESHES[name][1:]:
    setup, program = step(name, axes)
    held = program.memory_analysis().argument_size_in_bytes
    shares = shard_size((setup.state_shapes, setup.batch_shapes))
    assert shares - 64 <= held <= shares + 64
    whole, share = (f(setup.state_shapes) for f in (size, shard_size))
    assert share <= 1.06 * whole / axes[1]


# --- Computation -------------------------------------------------------------


def products(program, inside=""):
  """FLOPs of a device's matrix products; `inside`: a part of their names."""
  return sum(
    step_cost.product(line, lines).flops
    for lines in hlo.read(program).computations.values()
    for line in lines.values()
    if line.op == "dot" and re.search(inside, line.rest)
  )


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_computed_twice(step, name):
  setup, one = step(name, ONE)
  function = functools.partial(experiment.train_step, setup)
  whole = flops.count(function, setup.state_shapes, setup.batch_shapes)
  # The program holds both branches of UAVM's draw, one of which runs.
  branches = 2 if name == "uavm" else 1
  np.testing.assert_allclose(products(one), branches * whole, rtol=1e-3)
  for axes in MESHES[name][1:]:
    _, program = step(name, axes)
    n = math.prod(axes)
    blocks = n * products(program, SPLIT)
    np.testing.assert_allclose(blocks, products(one, SPLIT), rtol=1e-3)
    # What is before and after the blocks need not be split over `tensor`.
    rest, wanted = (products(x) - products(x, SPLIT) for x in (program, one))
    assert 0.999 * wanted <= n * rest <= 1.001 * axes[2] * wanted
