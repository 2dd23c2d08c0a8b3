"""Optimisers against the written rules, optax and published multipliers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avjax import averaging, collectives, config, optim, trees
from avjax.errors import InputError
from avjax.methods.base import ParamInfo
from avjax.nn import transformer
from tests import golden

LAYERS = 2
STEPS = 5


# --- Learning rate -----------------------------------------------------------


def schedule(name="cosine", *, total=1000, batch=512, epoch=10, **keys):
  section = config.base_config().schedule
  section.update({"name": name, "base_lr": 3e-4, **keys})
  return optim.schedule(
    section, batch_size=batch, steps_per_epoch=epoch, total_steps=total
  )


def test_cosine_is_the_published_one_and_ends_at_zero():
  file = golden.load("avmae_tiny.npz")
  steps = file["schedule/steps"]
  expected = file["schedule/lr_base3e-4_total1000_warmup40"].copy()
  assert (steps[-1], expected[-1]) == (1000, np.float32(3e-4))
  expected[-1] = 0.0  # The public code restarts here; training never got there.
  rates = jax.vmap(schedule(warmup_steps=40))(steps)
  np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-11)
  assert schedule(warmup_steps=40)(2000) == 0


def test_rate_is_scaled_by_the_batch():
  rate = schedule("constant", batch=512, lr_batch=256)
  np.testing.assert_allclose(rate(0), 6e-4, rtol=1e-6)


def test_steps_fall_at_the_ends_of_epochs():
  rate = schedule("step", step_epochs=(2, 3), epoch=10, warmup_epochs=0.5)
  rates = [float(rate(step)) for step in (0, 1, 5, 19, 20, 29, 30, 99)]
  expected = np.array([0, 0.2, 1, 1, 0.5, 0.5, 0.25, 0.25]) * 3e-4
  np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "keys, words",
  [
    ({"name": "cosin"}, "Did you mean 'cosine'"),
    ({"warmup_steps": 1001}, "takes 1001 steps, the run 1000"),
    ({"warmup_steps": 1, "warmup_epochs": 1.0}, "both set"),
  ],
)
def test_bad_schedule_is_refused(keys, words):
  with pytest.raises(InputError, match=words):
    schedule(**keys)


# --- Optimiser ---------------------------------------------------------------

SHAPES = {
  "embed/kernel": (3, 4),
  "encoder/block_00/mlp/kernel": (4, 5),
  "encoder/block_00/mlp/bias": (5,),
  "encoder/block_01/mlp/kernel": (4, 5),
  "encoder/block_01/mlp/bias": (5,),
  "head/kernel": (4, 2),
}
GROUPS = {"embed": "audio", "encoder": "default", "head": "head"}


def param_info(path):
  block = re.search(r"block_(\d+)", path)
  layer = int(block[1]) + 1 if block else 0 if "embed" in path else LAYERS + 1
  return ParamInfo(layer, GROUPS[path.split("/")[0]], path.endswith("kernel"))


def draw(seed):
  rng = np.random.default_rng(seed)
  return trees.unflatten(
    {p: rng.standard_normal(s).astype(np.float32) for p, s in SHAPES.items()}
  )


def section(name="adam", **keys):
  values = config.base_config().optimizer
  values.update({"name": name, **keys})
  return values


def make(values, rate=lambda step: 0.01 * (step + 1), **keys):
  return optim.make(values, rate, draw(0), param_info, LAYERS, **keys)


def run(optimizer, flags=lambda step: None, steps=STEPS, stack=lambda x: x):
  params = jax.tree.map(jnp.asarray, stack(draw(0)))
  state = jax.jit(optimizer.init)(params)
  update = jax.jit(optimizer.update)
  history = []
  for step in range(steps):
    params, state, metrics = update(
      stack(draw(step + 1)), state, params, flags(step)
    )
    history.append((params, state, metrics))
  return history


FULL = {
  "b2": 0.95,
  "weight_decay": 0.05,
  "clip_norm": 1.0,
  "layer_decay": 0.75,
  "multipliers": {"head": 10.0},
}


def by_the_rules(values, flags=lambda step: {}):
  """The written rules in float64, parameter by parameter."""
  w = {p: v.astype(float) for p, v in trees.flatten(draw(0)).items()}
  m, v = {p: 0 * x for p, x in w.items()}, {p: 0 * x for p, x in w.items()}
  count = dict.fromkeys(GROUPS.values(), 0)
  for step in range(STEPS):
    g = trees.flatten(draw(step + 1))
    on = {p: flags(step).get(param_info(p).group, True) for p in w}
    norm = np.sqrt(sum(np.sum(g[p].astype(float) ** 2) for p in w if on[p]))
    clip = min(1.0, values.clip_norm / norm) if values.clip_norm else 1.0
    for group in count:
      count[group] += bool(flags(step).get(group, True))
    for p in filter(on.get, w):
      info = param_info(p)
      scale = values.layer_decay ** (LAYERS + 1 - info.layer)
      lr = 0.01 * (step + 1) * scale * values.multipliers.get(info.group, 1)
      decay = values.weight_decay * info.decay
      grad = g[p] * clip + (0 if values.name == "adam" else decay * w[p])
      if values.name == "sgd":
        m[p] = grad + values.momentum * m[p]
        w[p] = w[p] - lr * m[p]
        continue
      t = count[info.group]
      m[p] = values.b1 * m[p] + (1 - values.b1) * grad
      v[p] = values.b2 * v[p] + (1 - values.b2) * grad**2
      root = np.sqrt(v[p] / (1 - values.b2**t)) + values.eps
      w[p] = w[p] - lr * m[p] / (1 - values.b1**t) / root
      if values.name == "adam":
        w[p] = (1 - lr * decay) * w[p]
  return w


@pytest.mark.parametrize("name", ["adam", "adam_l2", "sgd"])
def test_five_steps_follow_the_rules(name):
  values = section(name, **FULL)
  flags = lambda step: {"audio": step % 2 == 0}  # noqa: E731
  params, state, _ = run(make(values), flags)[-1]
  expected = by_the_rules(values, flags)
  for path, value in trees.flatten(params).items():
    np.testing.assert_allclose(value, expected[path], rtol=2e-5, atol=1e-6)
  assert state["step"] == STEPS
  if name != "sgd":
    assert {k: int(c) for k, c in state["count"].items()} == {
      "audio": 3,
      "default": 5,
      "head": 5,
    }


@pytest.mark.parametrize(
  "name, chain",
  [
    ("adam", (optax.scale_by_adam(b2=0.95),)),
    (
      "adam_l2",
      (optax.add_decayed_weights(0.1), optax.scale_by_adam(b2=0.95)),
    ),
    ("sgd", (optax.add_decayed_weights(0.1), optax.trace(0.9))),
  ],
)
def test_without_options_it_is_optax(name, chain):
  decay = 0.0 if name == "adam" else 0.1
  values = section(name, b2=0.95, weight_decay=decay)
  ours = optim.make(
    values, lambda step: 1e-3, draw(0), lambda path: ParamInfo(0), LAYERS
  )
  theirs = optax.chain(*chain, optax.scale(-1e-3))
  params = draw(0)
  state = theirs.init(params)
  for step, (live, _, _) in enumerate(run(ours)):
    updates, state = theirs.update(draw(step + 1), state, params)
    params = optax.apply_updates(params, updates)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6), live, params
    )


def test_gradient_norm_is_reported_before_clipping_and_of_what_trains():
  _, _, metrics = run(
    make(section(clip_norm=1.0)), lambda step: {"audio": False}, steps=1
  )[0]
  rest = {p: g for p, g in trees.flatten(draw(1)).items() if "embed" not in p}
  np.testing.assert_allclose(
    metrics["grad_norm"], optax.tree.norm(rest), rtol=1e-6
  )


@pytest.mark.parametrize("name", ["adam", "adam_l2", "sgd"])
def test_untrained_group_is_untouched_and_compiles_once(name):
  optimizer = make(section(name, weight_decay=0.1))
  update = jax.jit(optimizer.update)
  params = jax.tree.map(jnp.asarray, draw(0))
  state = optimizer.init(params)
  grads = draw(1)
  params, state, _ = update(grads, state, params, {"audio": jnp.array(True)})
  # Not even looked at.
  grads = {**grads, "embed": {"kernel": np.full((3, 4), np.nan, np.float32)}}
  after, later, _ = update(grads, state, params, {"audio": jnp.array(False)})
  assert update._cache_size() == 1
  old, new = trees.flatten((params, state)), trees.flatten((after, later))
  for path, value in old.items():
    same = np.array_equal(value, new[path])
    assert same == ("embed" in path or "audio" in path), path


def test_frozen_parameters_never_move_and_own_no_moments():
  values = section("adam_l2", weight_decay=0.1, multipliers={"audio": 0.0})
  params, state, _ = run(make(values))[-1]
  np.testing.assert_array_equal(
    params["embed"]["kernel"], draw(0)["embed"]["kernel"]
  )
  assert "embed" not in state["mu"]
  info = lambda path: ParamInfo(0, optim.FROZEN)  # noqa: E731
  frozen = optim.make(section(), lambda step: 1.0, draw(0), info, LAYERS)
  jax.tree.map(np.testing.assert_array_equal, run(frozen)[-1][0], draw(0))


@pytest.mark.parametrize("name", ["adam", "adam_l2", "sgd"])
def test_stacked_layers_train_alike(name):
  values = section(name, **FULL)
  stack = transformer.stack_layers
  params, state, _ = run(make(values, stack=stack), stack=stack)[-1]
  assert params["encoder"]["blocks"]["mlp"]["kernel"].shape == (LAYERS, 4, 5)
  plain_params, plain_state, _ = run(make(values))[-1]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
    transformer.unstack_layers((params, state)),
    (plain_params, plain_state),
  )


def test_stacked_layers_of_two_groups_are_refused():
  info = lambda path: ParamInfo(0, "a" if "block_00" in path else "b")  # noqa: E731
  with pytest.raises(InputError, match=r"encoder/blocks/mlp.*a, b"):
    optim.make(
      section(),
      lambda step: 1.0,
      draw(0),
      info,
      LAYERS,
      stack=transformer.stack_layers,
    )


@pytest.mark.parametrize(
  "keys, words",
  [
    ({"name": "adm"}, "Did you mean 'adam'"),
    ({"multipliers": {"haed": 2.0}}, "Did you mean 'head'"),
  ],
)
def test_unknown_names_are_refused(keys, words):
  with pytest.raises(InputError, match=words):
    make(section(**keys))


def test_layer_outside_the_count_is_refused():
  with pytest.raises(InputError, match="layer 3 .*outside 0..2"):
    optim.make(
      section(layer_decay=0.5), lambda step: 1.0, draw(0), param_info, 1
    )


def test_unknown_trainable_group_and_strange_parameters_are_refused():
  optimizer = make(section())
  state = optimizer.init(draw(0))
  with pytest.raises(InputError, match="Did you mean 'audio'"):
    optimizer.update(draw(1), state, draw(0), {"adio": True})
  with pytest.raises(InputError, match="'extra' is in the parameters alone"):
    optimizer.init({**draw(0), "extra": np.zeros(2)})


@pytest.mark.parametrize(
  "tree, layers", [("tiny_mbt", 4), ("tiny_original_mbt_token", 4), ("L24", 24)]
)
def test_layer_decay_is_the_published_one(tree, layers):
  file = golden.load("avmae_tiny_mbt.npz")
  paths = [str(path) for path in file[f"layer_decay/{tree}/paths"]]

  def info(path):
    first, *rest = path.split("/")
    block = re.search(r"encoderblock_(\d+)", path)
    if block:
      return ParamInfo(int(block[1]) + 1)
    embeds = first.startswith(("embedding", "Encoder_modality_token"))
    if embeds or first == "cls" or "posembed" in path:
      return ParamInfo(0)
    return ParamInfo(layers + 1)

  params = trees.unflatten({path: np.ones(2, np.float32) for path in paths})
  values = section("sgd", layer_decay=0.75)
  optimizer = optim.make(values, lambda step: 1.0, params, info, layers)
  after, _, _ = optimizer.update(params, optimizer.init(params), params)
  moved = trees.flatten(jax.tree.map(lambda w: 1 - w, after))
  np.testing.assert_allclose(
    [moved[path][0] for path in paths],
    file[f"layer_decay/{tree}/scale"],
    rtol=1e-4,  # Of 1 - w: float32 keeps three digits of 7.5e-4 at 1.
  )
  scales = [optimizer.plan[path].scale for path in paths]
  np.testing.assert_allclose(
    scales, file[f"layer_decay/{tree}/scale"], rtol=1e-6
  )


# --- Gradient accumulation ---------------------------------------------------


def loss_fn(params, batch):
  valid = batch.get("valid", jnp.ones(len(batch["x"]), bool))
  each = jnp.tanh(batch["x"] @ params["w"]).sum(-1)
  loss = jnp.sum(each * valid) / jnp.sum(valid)
  metrics = {"count": jnp.sum(valid), "loss2": 2 * loss}
  return loss, {
    "metrics": metrics,
    "trainable": {"a": batch["x"].max() > 100, "b": True},
    "intermediates": {"each": each},
  }


grad_fn = jax.value_and_grad(loss_fn, has_aux=True)


def accumulation_inputs():
  rng = np.random.default_rng(3)
  params = {"w": rng.standard_normal((3, 2)).astype(np.float32)}
  x = rng.standard_normal((16, 3)).astype(np.float32)
  # Every fourth part of four holds padding alone.
  valid = np.arange(16) % 4 != 3
  valid[1] = False
  return params, {"x": x, "valid": valid}


@pytest.mark.parametrize("keys", [("x",), ("x", "valid")])
def test_accumulation_is_the_whole_batch(keys):
  params, batch = accumulation_inputs()
  batch = {key: batch[key] for key in keys}
  (loss, aux), grads = grad_fn(params, batch)
  (loss4, aux4), grads4 = jax.jit(
    lambda p, b: optim.accumulate(grad_fn, p, b, 4)
  )(params, batch)
  np.testing.assert_allclose(loss4, loss, rtol=1e-6)
  np.testing.assert_allclose(grads4["w"], grads["w"], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(aux4["metrics"]["loss2"], 2 * loss, rtol=1e-6)
  assert not aux4["trainable"]["a"] and aux4["trainable"]["b"]
  assert set(aux4) == {"metrics", "trainable"}


def test_one_part_passes_through_and_uneven_parts_are_refused():
  params, batch = accumulation_inputs()
  (_, aux), _ = optim.accumulate(grad_fn, params, batch, 1)
  assert "intermediates" in aux
  with pytest.raises(InputError, match="16 is not divisible by 3 micro"):
    optim.accumulate(grad_fn, params, batch, 3)


def test_parts_of_a_sharded_batch_stay_on_their_devices():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  params, batch = accumulation_inputs()
  step = jax.jit(
    lambda p, b: optim.accumulate(grad_fn, p, b, 2),
    in_shardings=(whole, spread),
  )
  moved = collectives.find(step.lower(params, batch).compile())
  assert {one.kind for one in moved} == {"all-reduce"}
  (loss, _), _ = step(params, batch)
  np.testing.assert_allclose(loss, loss_fn(params, batch)[0], rtol=1e-6)


# --- Weight averaging --------------------------------------------------------


def averages(name, steps=6, epoch=2, **keys):
  values = section(average=name, **keys)
  state = averaging.init(values, {"w": jnp.zeros(3)})
  update = jax.jit(
    lambda state, params, step: averaging.update(
      values, state, params, step, epoch
    )
  )
  means = []
  for step in range(1, steps + 1):
    live = {"w": jnp.full(3, float(step))}
    state = update(state, live, step)
    means.append(float(averaging.averaged(values, state, live)["w"][0]))
  return means


def test_no_average_is_the_live_parameters():
  assert averages("none") == [1, 2, 3, 4, 5, 6]


def test_moving_average_starts_at_the_first_weights():
  np.testing.assert_allclose(
    averages("ema", steps=3, ema_decay=0.5), [0.5, 1.25, 2.125], rtol=1e-6
  )


def test_epoch_mean_counts_from_its_first_epoch():
  # Epochs end at steps 2, 4, 6; before the first that counts: live weights.
  assert averages("epochs") == [1, 2, 2, 3, 3, 4]
  assert averages("epochs", average_from=2) == [1, 2, 3, 4, 4, 5]


def test_average_survives_the_donation_of_the_parameters():
  params = {"w": jnp.ones(3)}
  state = averaging.init(section(average="ema"), params)
  jax.jit(lambda p: jax.tree.map(jnp.negative, p), donate_argnums=0)(params)
  np.testing.assert_array_equal(state["mean"]["w"], np.ones(3))


def test_unknown_average_is_refused():
  with pytest.raises(InputError, match="Did you mean 'ema'"):
    averaging.init(section(average="emaa"), {})
