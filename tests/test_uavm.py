"""UAVM against the public code, and its own promises."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config as config_lib
from avjax import flops, losses, methods, optim, trees
from avjax.errors import InputError
from avjax.methods import supervised, uavm_config
from avjax.methods.uavm import MODES, default_model
from avjax.weights import class_lists, families, formats, uavm
from tests import uavm_golden as made

KEY, STEP = jax.random.key(0), jnp.int32(0)
CASES = (
  *("u21_e64_s32", "u02_e64_s32", "u20_e64"),
  *("full21_e64_s64", "ind21_e64_s32"),
)
# Not of all: compiling is what takes time.
GRADIENTS = MAPS = ("u21_e64_s32", "full21_e64_s64")
ADAM = "u02_e64_s32"


def small(**model):
  """A model whose compilation takes a second."""
  config = config_lib.base_config()
  config.method, sizes = "uavm", {"specific_layers": 0, "shared_layers": 1}
  sizes |= {"width": 16, "shared_width": 8, "tokens": 4, "loss": "ce"}
  sizes |= {"classes": {"label": 7}}
  config.model = default_model(**{**sizes, **model})
  return methods.make(config)


@functools.cache
def small_inputs(b=8):
  rng = np.random.default_rng(0)
  found = {
    f"features/{m}": rng.standard_normal((b, 4, 16)) for m in ("audio", "video")
  }
  found["label"] = np.eye(7)[rng.integers(0, 7, b)]
  return {k: jnp.asarray(x, jnp.float32) for k, x in found.items()}


@functools.cache
def small_params():
  return jax.jit(small().init)(jax.random.key(1), small_inputs())


def fixed(**model):
  """The same with given logits, so that nothing is to be compiled."""
  method = small(**model)
  drawn = np.random.default_rng(1).standard_normal((2, 8, 7)).astype("float32")
  logits = dict(zip(("audio", "video"), map(jnp.asarray, drawn), strict=True))
  method.run = lambda params, inputs, names: ({m: logits[m] for m in names}, {})
  return method


def key_of(method, audio):
  """A step's key that draws the audio, or the video."""
  keys = map(jax.random.key, range(20))
  return next(k for k in keys if bool(method.draw(k)) == audio)


# --- The public code ---------------------------------------------------------


@functools.cache
def outputs(name):
  """Everything that is compared, in float64 and as numpy."""
  with jax.enable_x64(True):
    method = made.method(name, attention="plain")
    method.config.dtype = "float64"
    params, _ = uavm.to_house(made.state(name))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)

    @jax.jit
    def run(params, inputs):
      found = {
        "both": method.predict(params, inputs)["label"],
        "layers": method.representations(params, inputs),
      }
      if name in MAPS:
        maps = functools.partial(method.attention_maps, params, inputs)
        found["with_norm1"] = maps()
        found["published"] = maps(published=True)
      modes = method.modes if method.together else ("a", "v")
      for mode in modes if name in GRADIENTS else ():
        objective = functools.partial(method.objective, mode)
        grad = jax.grad(objective, has_aux=True)
        found[f"grad_{mode}"] = grad(params, inputs)[0]
      return found

    found = jax.device_get(run(params, made.inputs(jnp.float64)))
  return method, found


@pytest.mark.parametrize("name", CASES)
def test_values_equal_the_public_code(name):
  method, found = outputs(name)

  def close(ours, key, tolerance=made.VALUES):
    np.testing.assert_allclose(ours, made.file()[f"{name}/{key}"], **tolerance)

  label = made.inputs()["label"]
  logits = {"av": found["both"]}
  if not method.together:
    logits |= {m[0]: x[-1] for m, x in found["layers"].items()}
  for mode, x in logits.items():
    end = "" if method.together else f"_{mode}"
    close(x, f"logits{end}")
    for kind, key in (("ce", "ce_soft"), ("bce", "bce")):
      values = supervised.cross_entropy(kind, jnp.float32(x), label)
      close(values.mean(), f"{key}{end}", made.LOSS)
  for m, layers in found["layers"].items():
    told = [k for k in made.file() if k.startswith(f"{name}/feat_{m[0]}_")]
    for key in told:
      number = int(key.split("_mean")[0].rsplit("_", 1)[1])
      close(layers[number], key.removeprefix(f"{name}/"))
    depth = method.num_layers + 1 + (not method.together)
    assert len(layers) == depth
    assert len(told) == depth or name.startswith(("full", "ind"))


@pytest.mark.parametrize("name", MAPS)
def test_attention_equals_the_public_code(name):
  method, found = outputs(name)
  stored = {k.split("/")[1]: x for k, x in made.file().items() if name in k}
  for kind in ("published", "with_norm1"):
    maps = found[kind]
    if f"attdiff_{kind}" in stored:
      pairs = zip(maps["audio"], maps["video"], strict=True)
      apart = [np.abs(a - v).mean() for a, v in pairs]
      np.testing.assert_allclose(apart, stored[f"attdiff_{kind}"], **made.MAPS)
    for m, x in maps.items():
      wanted = stored.get(
        f"attmap_{m[:2] if m == 'av' else m[0]}_{kind}_sample"
      )
      rows, columns = (11, 7) if m == "av" else (7, 6)
      if wanted is not None:
        ours = [a[0, :, ::rows, ::columns] for a in x]
        np.testing.assert_allclose(ours, wanted, **made.MAPS)
  if "heat_a" in stored:
    last = found["published"]["audio"][-1][0]
    heat = (last / last.max(-1, keepdims=True)).sum(1)
    np.testing.assert_allclose(heat, stored["heat_a"], **made.HEAT)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_the_public_code(name):
  """And what has none there is dead, or of a group that the step leaves."""
  method, found = outputs(name)
  params, _ = uavm.to_house(made.state(name))
  names = {path: i + 1 for i, path in enumerate(trees.flatten(params))}
  marked = {
    p: np.full_like(x, names[p]) for p, x in trees.flatten(params).items()
  }
  back = uavm.to_reference(trees.unflatten(marked), prefix="")
  paths = {number: path for path, number in names.items()}
  places = {key: paths.get(int(x.flat[0])) for key, x in back.items()}
  for mode in method.modes if method.together else ("a", "v"):
    end = "" if method.together else f"_{mode}"
    norms = made.file()[f"{name}/gradnorm{end}"]
    flat = trees.flatten(found[f"grad_{mode}"])
    rests = {"a": "video", "v": "audio"}.get(mode)
    for key, norm in zip(made.file()[f"{name}/keys"], norms, strict=True):
      path = places[str(key)]
      if np.isnan(norm):
        assert path is None or method.param_info(path).group == rests, key
        continue
      assert method.param_info(path).group != rests, key
      ours = np.linalg.norm(flat[path])
      np.testing.assert_allclose(ours, norm, **made.GRAD_NORM, err_msg=key)


@functools.cache
def trainer():
  """The file's optimiser step, compiled once for both of its rules."""
  method = made.method(ADAM)
  section = config_lib.base_config().optimizer
  section.update(name="adam_l2", b1=0.95, b2=0.999, weight_decay=0.1)
  params, _ = uavm.to_house(made.state(ADAM))
  optimizer = optim.make(
    section, lambda step: 1e-3, params, method.param_info, method.num_layers
  )

  @jax.jit
  def step(params, state, inputs, rng, always):
    loss = functools.partial(method.loss, inputs=inputs, rng=rng, step=STEP)
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = grad(params)
    flags = {k: flag | always for k, flag in aux["trainable"].items()}
    params, state, _ = optimizer.update(grads, state, params, flags)
    return params, state, value, aux["metrics"]["trained_a"]

  return step, params, optimizer.init(params)


@pytest.mark.parametrize("name", ["none", "dp"])
def test_training_equals_the_public_code(name):
  """Three steps, audio, video, audio; `dp` has `zero_gradients`."""
  case = ADAM
  file, keys = made.file(), [str(k) for k in made.file()[f"{case}/keys"]]
  live = np.array([k not in uavm.to_house(made.state(case))[1] for k in keys])
  step, params, state = trainer()
  method, counts = made.method(case), {"audio": 0, "video": 0, "default": 0}
  for i, audio in enumerate((True, False, True)):
    old = uavm.to_reference(jax.device_get(params), prefix="")
    rng = key_of(method, audio)
    always = jnp.bool_(name == "dp")
    params, state, loss, drawn = step(params, state, made.inputs(), rng, always)
    assert bool(drawn) == audio
    wanted = file[f"{case}/adam_{name}/losses"][i]
    tolerance = made.LATER_LOSS if i else made.LOSS
    np.testing.assert_allclose(loss, wanted, **tolerance)
    new = uavm.to_reference(jax.device_get(params), prefix="")
    moved = np.array([not np.array_equal(old[k], new[k]) for k in keys])
    change = file[f"{case}/adam_{name}/max_change"][i]
    assert np.array_equal(moved[live], change[live] > 0)
    norms = np.array([np.linalg.norm(np.float64(new[k])) for k in keys])
    wanted = file[f"{case}/adam_{name}/norms"][i]
    np.testing.assert_allclose(norms[live], wanted[live], **made.PARAM_NORM)
    for group in counts:
      unused = {"audio": not audio, "video": audio}.get(group, False)
      counts[group] += name == "dp" or not unused
  assert {k: int(x) for k, x in state["count"].items()} == counts


def test_zero_gradients_let_everything_move():
  """No group rests, so the optimiser's count, momentum and decay go on."""
  for unused, rests in (
    ("untouched", {"audio", "video"}),
    ("zero_gradients", ()),
  ):
    method = small(unused_params=unused)
    args = (small_params(), small_inputs(), KEY, STEP)
    aux = jax.eval_shape(method.loss, *args)[1]
    assert set(aux["trainable"]) == set(rests)


# --- Training ----------------------------------------------------------------


def test_eight_devices_train_as_one():
  method, params, found = small(), small_params(), []
  inputs = dict(small_inputs())
  inputs["has_audio"] = jnp.arange(8) != 3
  rng = key_of(method, True)

  @jax.jit
  def grad(params, inputs):
    loss = functools.partial(method.loss, inputs=inputs, rng=rng, step=STEP)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, grads, aux["trainable"]

  for devices in (1, 8):
    mesh = jax.make_mesh(
      (devices,), ("data",), (jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:devices],
    )  # fmt: skip
    spec = jax.sharding.PartitionSpec("data")
    place = jax.sharding.NamedSharding(mesh, spec)
    found.append(jax.device_get(grad(params, jax.device_put(inputs, place))))
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
  assert found[0][2] == {"audio": True, "video": False}
  assert not found[0][1]["embed_video"]["out"]["kernel"].any()
  assert found[0][1]["embed_audio"]["out"]["kernel"].any()


def test_a_step_computes_one_modality():
  """Told by the products in the two branches of the gradient's program."""
  method = small()

  def loss(params, inputs):
    return method.loss(params, inputs, KEY, STEP)[0]

  program = jax.make_jaxpr(jax.grad(loss))(small_params(), small_inputs())
  (found,) = [e for e in program.jaxpr.eqns if e.primitive.name == "cond"]
  for mode, branch in zip("av", found.params["branches"], strict=True):
    alone = functools.partial(method.objective, mode)
    names = (f"features/{m}" for m in MODES[mode])
    inputs = {k: small_inputs()[k] for k in (*names, "label")}
    grad = jax.value_and_grad(alone, has_aux=True)
    wanted = flops.count(grad, small_params(), inputs)
    run = jax.extend.core.jaxpr_as_fun(branch)
    assert flops.count(run, *branch.in_avals) == wanted > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_lambda_is_the_share_of_audio(share):
  keys = jax.random.split(KEY, 2_000)
  drawn = jax.vmap(small(lambda_audio=share).draw)(keys).mean()
  np.testing.assert_allclose(drawn, share, atol=0.03 * (0 < share < 1))


def test_labels_are_smoothed_and_mixed():
  """§II-B by the public numbers: 0.1/C, true classes 0.9, mixed added."""
  label = jnp.asarray(
    [[0, 1.0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
  )
  mixed = losses.assign_labels(label, 0.1, jnp.asarray([1.0, 0.5, 0.4, 1.0]))
  wanted = [
    [0.025, 0.9, 0.025, 0.025],
    [0.475, 0.475, 0.025, 0.475],
    [0.025, 0.385, 0.565, 0.025],
    [0.025, 0.025, 0.9, 0.025],
  ]
  np.testing.assert_allclose(mixed, wanted, rtol=1e-6)
  method, inputs = fixed(label_smoothing=0.1), dict(small_inputs())
  inputs |= {"mix/audio": jnp.full(8, 0.4), "mix/video": jnp.full(8, 0.8)}
  inputs["has_audio"] = jnp.arange(8) < 6
  for mode, weight, counted in (("a", 0.4, 6), ("v", 0.8, 8)):
    loss, (_, logits) = method.objective(mode, {}, inputs)
    labels = losses.assign_labels(inputs["label"], 0.1, jnp.full(8, weight))
    wanted = losses.softmax_cross_entropy(logits, labels)[:counted].mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


# --- Use ---------------------------------------------------------------------


def test_a_lacking_modality_is_answered_from_the_other():
  method, inputs = fixed(), dict(small_inputs())
  found = {m: method.predict({}, inputs, mode=m)["label"] for m in MODES}
  mean = (found["a"] + found["v"]) / 2
  np.testing.assert_allclose(found["av"], mean, atol=1e-6)
  inputs["has_audio"] = jnp.arange(8) != 0
  inputs["has_video"] = jnp.arange(8) != 2
  ours = method.predict({}, inputs)["label"]
  for row, mode in enumerate(("v", "av", "a", "av")):
    np.testing.assert_array_equal(ours[row], found[mode][row])
  inputs.pop("features/video")
  alone = method.predict({}, inputs)["label"]
  np.testing.assert_array_equal(alone, found["a"])


def test_features_and_half_precision():
  method, inputs = small(), small_inputs()
  method.config.dtype = "bfloat16"
  out = jax.eval_shape(method.predict, small_params(), inputs)["label"]
  assert out.dtype == jnp.float32 and out.shape == (8, 7)
  features = jax.eval_shape(method.embed, small_params(), inputs)
  shapes = {m: (x.shape, str(x.dtype)) for m, x in features.items()}
  assert shapes == dict.fromkeys(("audio", "video"), ((8, 8), "float32"))
  audio = {"features/audio": inputs["features/audio"]}
  assert [*jax.eval_shape(method.embed, small_params(), audio)] == ["audio"]


def test_first_values_are_those_of_pytorch():
  for path, x in trees.flatten(small_params()).items():
    name, bound = path.rsplit("/", 1)[1], x.shape[0] ** -0.5
    if name == "kernel":
      np.testing.assert_allclose(x.std(), bound / 3**0.5, rtol=0.2)
      assert np.abs(x).max() <= bound
      assert np.abs(x).max() > 0.8 * bound
    elif name == "positions":
      np.testing.assert_allclose(x.std(), 0.02, rtol=0.4)
  biases = small_params()["encoder_shared"]["block_00"]["mlp"]["fc1"]["bias"]
  assert 0 < np.abs(biases).max() <= 8**-0.5


# --- Public weights ----------------------------------------------------------

# Model -> parameters in the public code for 309 classes, and in the paper.
PUBLIC = (
  ({}, 117_541_791),
  ({"specific_layers": 6, "shared_layers": 0}, 154_557_652),
  ({"variant": "cross_modal"}, 117_572_511),
  ({"specific_layers": 0, "shared_layers": 6}, 79_063_349),
)


@pytest.mark.parametrize("sizes, count", PUBLIC)
def test_number_of_parameters(sizes, count):
  """Ours and what is dead are the public code's."""
  config = config_lib.base_config()
  config.method = "uavm"
  config.model = default_model(classes={"label": 309}, **sizes)
  features = jax.ShapeDtypeStruct((1, 30, 1024), jnp.float32)
  inputs = {f"features/{m}": features for m in ("audio", "video")}
  params = jax.eval_shape(methods.make(config).init, KEY, inputs)
  # Views of one number: nothing is held, and zeros are not touched.
  blank = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape), params
  )
  ours = sum(x.size for x in jax.tree.leaves(params))
  places = uavm.dead_shapes(params)
  assert ours + sum(map(np.prod, places.values())) == count
  told = uavm.public_model(blank)
  model = {k: config.model[k] for k in told}
  if not config.model.shared_layers:
    model["variant"] = "independent"  # the same model
  assert told == model


@pytest.mark.parametrize("name", (*CASES, "full02_e64_s64"))
@pytest.mark.parametrize("prefix", ["", "module."])
def test_public_weights_there_and_back(name, prefix):
  state = {prefix + k: x for k, x in made.state(name).items()}
  params, aside = uavm.to_house(state)
  back = uavm.to_reference(params, aside, prefix=prefix)
  assert set(back) == set(state) and all(map(uavm.knows, state))
  assert all(np.array_equal(back[k], x) for k, x in state.items())
  # What is dead is dead: without it, zeros and not a name less.
  fresh = uavm.to_reference(params, prefix=prefix)
  assert {k: x.shape for k, x in fresh.items()} == {
    k: x.shape for k, x in state.items()
  }
  assert {k.removeprefix(prefix) for k, x in fresh.items() if not x.any()} == {
    *aside
  }


def test_a_file_is_recognised_and_its_classes_ordered(tmp_path):
  state = dict(made.state("u20_e64"))
  for m in "av":
    state[f"{m}_mlp.1.weight"] = np.arange(309 * 64.0).reshape(309, 64)
    state[f"{m}_mlp.1.bias"] = np.arange(309.0)
  path = tmp_path / "uavm.safetensors"
  formats.write(path, {f"module.{k}": x for k, x in state.items()})
  found = families.load(path)
  assert (found.family, found.method) == ("uavm", "uavm")
  out = found.params["classifier_video"]["out"]
  assert np.array_equal(out["kernel"][0], 64 * out["bias"])
  assert not np.array_equal(out["bias"], state["v_mlp.1.bias"])
  back = class_lists.class_order(found.params, to_house=False)
  back = uavm.to_reference(back, found.aside, prefix="")
  assert all(np.array_equal(back[k], x) for k, x in state.items())


def test_one_model_starts_another():
  source, inputs = small_params(), small_inputs()
  method = small(variant="independent", classes={"label": 5})
  params = jax.tree.map(
    lambda x: np.zeros(x.shape, np.float32),
    jax.eval_shape(method.init, KEY, inputs),
  )
  loaded = method.adapt(params, source, {})
  for m in ("audio", "video"):
    jax.tree.map(
      np.testing.assert_array_equal,
      loaded.params[f"encoder_late_{m}"],
      source["encoder_shared"],
    )
  assert {p.rsplit("/", 1)[0] for p in loaded.missing} == {
    f"classifier_{m}/out" for m in ("audio", "video")
  }
  blocks = {f"block_{i:02d}": {"x": np.zeros(1)} for i in range(2)}
  deep = {**params, "encoder_shared": blocks}
  words = "1 blocks in encoder_shared, the model 2"
  with pytest.raises(InputError, match=words):
    method.adapt(deep, source, {})


# --- Refusals ----------------------------------------------------------------


@pytest.mark.parametrize(
  "model, words",
  [
    ({"variant": "unifed"}, "Did you mean 'unified'"),
    ({"unused_params": "zero"}, "zero_gradients"),
    ({"specific_layers": 0, "shared_layers": 0}, "nor both 0"),
    ({"variant": "cross_modal", "shared_layers": 0}, "would never meet"),
    ({"shared_width": 18}, "18 is not divisible by model.heads=4"),
    ({"lambda_audio": 1.5}, "lambda_audio=1.5"),
  ],
)
def test_sizes_that_cannot_be(model, words):
  with pytest.raises(InputError, match=words):
    uavm_config.check(default_model(**model))


def test_refusals():
  method, inputs = small(variant="cross_modal"), dict(small_inputs())
  with pytest.raises(InputError, match="unknown mode of predict 'a'"):
    method.predict({}, inputs, mode="a")
  audio = inputs.pop("features/audio")
  with pytest.raises(InputError, match="have no 'features/audio'"):
    method.predict({}, inputs)
  inputs["features/audio"] = audio[:, :3]
  with pytest.raises(InputError, match="has 3 tokens, model.tokens=4"):
    method.init(KEY, inputs)
  with pytest.raises(InputError, match="no place for 'encoder/norm/scale'"):
    uavm.to_reference({"encoder": {"norm": {"scale": np.ones(4)}}})
  state = dict(made.state("u20_e64"))
  state["a_trans.blocks.0.norm3.weight"] = np.ones(64)
  with pytest.raises(InputError, match="nearest: .*norm"):
    uavm.to_house(state)
  state = dict(
    made.state("u20_e64"), **{"a_trans.blocks.1.norm1.bias": np.ones(3)}
  )
  with pytest.raises(InputError, match=r"has shape \(3,\); expected \(64,\)"):
    uavm.to_house(state)
