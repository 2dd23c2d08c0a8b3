"""Contrastive losses over devices: same values, and what they send."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from avjax import collectives, contrast, losses, losses_pairs, methods
from avjax import config as config_lib
from avjax.errors import InputError
from avjax.methods import avsiam_config, cavmae_config
from tests import cavmae_golden

B, D = 64, 32
MESHES = {"1": ((1,), ("data",)), "8": ((8,), ("data",)),
          "4x2": ((4, 2), ("data", "fsdp"))}  # fmt: skip
SPREAD = ("gather", "ring")


def mesh(name):
  shape, axes = MESHES[name]
  return jax.make_mesh(
    shape,
    axes,
    devices=jax.devices()[: np.prod(shape)],
    axis_types=(AxisType.Auto,) * len(axes),
  )


def placed(name, b=B, d=D):
  """Anchors, candidates (similar, two of them equal) and who is there."""
  rng = np.random.default_rng(2)
  anchors = rng.standard_normal((b, d))
  candidates = anchors + rng.standard_normal((b, d))
  anchors[9], candidates[9] = anchors[50], candidates[50]
  there = rng.uniform(size=b) < 0.8
  there[[9, 50]] = True
  values = anchors.astype("float32"), candidates.astype("float32"), there
  if not name:
    return [jnp.asarray(x) for x in values]
  where = mesh(name)
  # As the last batch of an evaluation may lie.
  split = P() if b % where.size else P(where.axis_names)
  spec = NamedSharding(where, split)
  return [jax.device_put(x, spec) for x in values]


@functools.cache
def gradients(implementation):
  """All losses, and the gradient of a mixture of them, in one program."""
  how = {"implementation": implementation}

  def total(anchors, candidates, temperature, bias, there):
    pair = anchors, candidates
    found = [
      losses.contrastive(*pair, temperature, **how),
      losses.contrastive(
        *pair, temperature, two_way=True, weights=there, **how
      ),
      losses.sigmoid_contrastive(
        *pair, temperature, bias, weights=there, **how
      ),
    ]
    mixed = found[0][0] + 2 * found[1][0] + 3 * found[2][0]
    return mixed, jnp.asarray(found)

  return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))


@functools.cache
def plain():
  anchors, candidates, there = placed("")
  numbers = jnp.float32(0.05), jnp.float32(-3)
  run = gradients("plain")
  (_, found), grads = run(anchors, candidates, *numbers, there)
  return found, grads


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("implementation", SPREAD)
def test_every_implementation_gives_the_same(implementation, name):
  anchors, candidates, there = placed(name)
  numbers = jnp.float32(0.05), jnp.float32(-3)
  run = gradients(implementation)
  (_, found), grads = run(anchors, candidates, *numbers, there)
  wanted, wanted_grads = plain()
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert 0.2 < wanted[0, 1] < 1
  for ours, theirs in zip(grads, wanted_grads, strict=True):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def products(jaxpr):
  """Precisions of all matrix products of a jaxpr and those in it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation.params["precision"]
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from products(inner)


@pytest.mark.parametrize("implementation", ("plain", *SPREAD))
def test_accelerators_multiply_in_full_precision(implementation):
  anchors, candidates, there = placed("8")
  numbers = jnp.float32(0.05), jnp.float32(-3)
  run = gradients(implementation)
  found = [*products(run.trace(anchors, candidates, *numbers, there).jaxpr)]
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert len(found) >= 9  # there and back twice, of three losses
  assert set(found) == {highest}


def compiled_text(implementation, name, b, d, total):
  where = mesh(name)
  spec = NamedSharding(where, P(where.axis_names))
  pair = [jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=spec)] * 2
  there = jax.ShapeDtypeStruct((b,), bool, sharding=spec)

  def loss(anchors, candidates, there):
    more = {"weights": there, "implementation": implementation}
    if total == "sigmoid":
      return losses.sigmoid_contrastive(anchors, candidates, 0.1, -9.0, **more)
    return losses.contrastive(anchors, candidates, 0.05, two_way=True, **more)

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  return run.lower(*pair, there).compile().as_text()


@pytest.mark.parametrize(
  "implementation, name, total",
  [
    ("gather", "8", "softmax"),
    ("gather", "4x2", "sigmoid"),
    ("ring", "8", "sigmoid"),
    ("ring", "4x2", "softmax"),
  ],
)
def test_candidates_go_once_there_and_once_back(implementation, name, total):
  b, d, n = 256, 128, 8
  text = compiled_text(implementation, name, b, d, total)
  sent = collectives.traffic(text)
  once = 4 * b * d * (n - 1) / n
  assert 2 * once <= sum(sent.values()) <= 2.1 * once
  kinds = ("all-gather", "reduce-scatter")
  if implementation == "ring":
    kinds = ("collective-permute",)
    # No device ever holds the cosines of its anchors with all.
    assert f"[{b // n},{b}]" not in text and f"[{b},{b // n}]" not in text
  assert sum(sent[kind] for kind in kinds) >= 2 * once
  assert sum(sent[kind] for kind in sent if kind not in kinds) < once / 20


def moves(name, b=B, **options):
  """Which of the two implementations a traced loss uses."""
  anchors, candidates, _ = placed(name, b)
  traced = jax.make_jaxpr(
    lambda *x: losses.contrastive(*x, 0.05, **options)[0]
  )(anchors, candidates)
  found = {"all_gather": "gather", "ppermute": "ring"}
  return [v for k, v in found.items() if k in str(traced)][-1:]


def test_auto_goes_by_size(monkeypatch):
  assert moves("8") == moves("4x2") == ["gather"]
  assert moves("1") == moves("") == moves("8", group_size=8) == []
  assert moves("8", b=60) == []
  monkeypatch.setattr(losses_pairs, "RING_FROM", 4 * B * B // 8 - 1)
  assert moves("8") == ["ring"]
  assert moves("8", implementation="gather") == ["gather"]
  # What shard_map has split already is the whole batch of its device.
  inside = jax.shard_map(
    lambda *x: losses.contrastive(*x, 0.05)[0][None],
    mesh=mesh("8"),
    in_specs=P("data"),
    out_specs=P("data"),
  )
  assert "all_gather" not in str(jax.make_jaxpr(inside)(*placed("8")[:2]))


@pytest.mark.parametrize(
  "name, options, words",
  [
    ("8", {"implementation": "rings"}, "'rings'.*Did you mean 'ring'.*gather"),
    ("", {"implementation": "ring"}, "a mesh: batch size 64.* 1 devices"),
    ("8", {"implementation": "gather", "group_size": 8}, "group size 8"),
    ("8", {"group_size": 7}, "batch size 64 .* model.group_size 7"),
  ],
)
def test_what_cannot_be_is_refused(name, options, words):
  anchors, candidates, _ = placed(name)
  with pytest.raises(InputError, match=words):
    losses.contrastive(anchors, candidates, 0.05, **options)


@pytest.mark.parametrize("implementation", SPREAD)
def test_of_equals_the_first_and_nobody(implementation):
  where = NamedSharding(mesh("8"), P("data"))
  same = jax.device_put(jnp.ones((16, 4)), where)
  nobody = jax.device_put(jnp.zeros(16, bool), where)

  def loss(x, there):
    return losses.contrastive(
      x, same, 0.05, two_way=True, weights=there, implementation=implementation
    )

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, right), _ = run(same, ~nobody)
  np.testing.assert_allclose([value, right], [np.log(16), 1 / 16], rtol=1e-5)
  (value, right), grads = run(same, nobody)
  assert value == 0 and right == 0 and np.isfinite(grads).all()


# --- Sigmoid -----------------------------------------------------------------


def formula(anchors, candidates, temperature, bias, there):
  """SigLIP's algorithm 1, in float64."""
  x, y = (np.asarray(v, np.float64)[there] for v in (anchors, candidates))
  x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
  logits = x @ y.T / temperature + bias
  signs = 2 * np.eye(len(x)) - 1
  return np.log1p(np.exp(-signs * logits)).sum() / len(x)


@pytest.mark.parametrize("name", ["", "8"])
def test_sigmoid_equals_its_formula(name):
  anchors, candidates, there = placed(name)
  for numbers, weights in (((0.1, -10.0), None), ((0.05, -3.0), there)):
    value, right = jax.jit(losses.sigmoid_contrastive)(
      anchors, candidates, *numbers, weights=weights
    )
    shown = np.ones(B, bool) if weights is None else np.asarray(weights)
    wanted = formula(anchors, candidates, *numbers, shown)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert 0.5 < right <= 1


def test_sigmoid_by_hand_and_in_groups():
  x, y = jnp.array([[2.0, 0.0], [0.0, 3.0]]), jnp.array([[1.0, 0.0]] * 2)
  value, right = losses.sigmoid_contrastive(x, y, 0.5, -1.0)
  # Cosines 1 1 / 0 0, so logits 1 1 / -1 -1.
  wanted = np.log1p(np.exp([-1.0, 1.0, -1.0, 1.0])).sum() / 2
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  assert right == 0.5
  rng = np.random.default_rng(0)
  pair = [jnp.asarray(rng.standard_normal((6, 4)), jnp.float32) for _ in "xy"]
  run = functools.partial(
    losses.sigmoid_contrastive, temperature=0.1, bias=-1.0
  )
  parts = [run(*(v[i : i + 3] for v in pair)) for i in (0, 3)]
  np.testing.assert_allclose(
    run(*pair, group_size=3), np.mean(parts, 0), rtol=1e-5
  )


# --- By config ---------------------------------------------------------------

CONFIGS = {"cavmae": cavmae_config, "avsiam": avsiam_config}
KEY = jax.random.key(0)


def method_of(name, **model):
  config = config_lib.base_config()
  config.method = name
  values = {**cavmae_golden.SMALL, "mae_weight": 0.0, "temperature": 0.1}
  if name == "avsiam":
    values["ratios"] = (0.0, 0.5)
  values |= {"contrast_weight": 1.0, "contrast_loss": "sigmoid", **model}
  config.model = CONFIGS[name].default_model("B", **values)
  return methods.make(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_sigmoid_by_config_learns_its_numbers(name):
  method, inputs = method_of(name), cavmae_golden.small_inputs(4)
  shapes = jax.eval_shape(method.init, KEY, inputs)
  assert set(shapes[contrast.STACK]) == {"log_scale", "bias"}
  info = method.param_info("contrast/bias")
  assert not info.decay and info.group == "contrast"
  assert method.param_info("embed_audio/kernel").decay
  # The loss of the method reaches them.
  silent = cavmae_golden.silent_paths(method, shapes, inputs)
  assert silent == cavmae_golden.frozen_paths(method, shapes)
  anchors, candidates, there = placed("8")

  def loss(learned, pooled, given):
    return method.contrast(pooled, given, {contrast.STACK: learned})[0]

  learned = {"log_scale": jnp.float32(0.2), "bias": jnp.float32(3)}
  pooled = {"audio": anchors, "video": candidates}
  run = jax.jit(jax.value_and_grad(loss))
  value, grads = run(learned, pooled, {"has_audio": there})
  pair = anchors, candidates
  there = np.asarray(there)
  wanted = formula(*pair, 0.1 * np.exp(-0.2), -7.0, there)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  for key, change in (("log_scale", (0.001, 0)), ("bias", (0, 0.001))):
    up, down = (
      formula(*pair, 0.1 * np.exp(-0.2 - s * change[0]),
              s * change[1] - 7.0, there)
      for s in (1, -1)
    )  # fmt: skip
    np.testing.assert_allclose(grads[key], (up - down) / 0.002, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_learnt_numbers_nothing_is_added(name):
  inputs = cavmae_golden.small_inputs(2)
  for model in ({"sigmoid_learned": False}, {"contrast_loss": "softmax"}):
    method = method_of(name, **model)
    shapes = jax.eval_shape(method.init, KEY, inputs)
    assert contrast.STACK not in shapes
  numbers = {"contrast_loss": "sigmoid", "sigmoid_bias": -2.0}
  method = method_of(name, sigmoid_learned=False, **numbers)
  anchors, candidates, _ = placed("")
  pooled, more = {"audio": anchors, "video": candidates}, {"index": anchors}
  found, _ = method.contrast(pooled, more)
  everybody = np.ones(B, bool)
  wanted = formula(anchors, candidates, 0.1, -2.0, everybody)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
  "model, words",
  [
    ({"contrast_loss": "sigmod"}, "contrast_loss 'sigmod'.*mean 'sigmoid'"),
    ({"temperature": 0.0}, "model.temperature=0.0: .* above 0"),
  ],
)
def test_numbers_that_cannot_be_are_refused(name, model, words):
  with pytest.raises(InputError, match=words):
    method_of(name, **model)
