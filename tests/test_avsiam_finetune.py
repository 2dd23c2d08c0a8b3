"""AVSiam's classifier against the public code, and its own promises."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config as config_lib
from avjax import flops, losses, methods, optim, trees
from avjax.errors import InputError
from avjax.methods import avsiam, avsiam_finetune, supervised
from avjax.nn.cav_encoder import MODALITIES
from tests import avsiam_golden as public
from tests import cavmae_golden as made

KEY, STEP = jax.random.key(0), jnp.int32(0)
MODES = ("a", "v", "av")


def small(multilabel=False, **model):
  """A model whose compilation takes a second."""
  config = config_lib.base_config()
  config.method, config.data.multilabel = "avsiam_finetune", multilabel
  model = {**made.SMALL, "multimodal_depth": 1, "classes": {"label": 7}} | model
  config.model = avsiam_finetune.default_model(**model)
  return methods.make(config)


@functools.cache
def small_params(**model):
  return jax.jit(small(**model).init)(jax.random.key(1), made.small_inputs())


def key_of(method, mode):
  """A step's key that draws this mode."""
  draw = jax.jit(method.draw)
  keys = map(jax.random.key, range(100))
  return next(k for k in keys if method.modes[int(draw(k))] == mode)


# --- The public code ---------------------------------------------------------

PUBLIC = {
  "a": "ft_audioonly",
  "v": "ft_videoonly",
  "av": "ft_av",
}


def public_model():
  config = config_lib.base_config()
  config.method = "avsiam_finetune"
  config.model = avsiam_finetune.default_model(
    public_base=True, scan=True, classes={"label": 527}
  )
  return methods.make(config)


@functools.cache
def outputs():
  """Logits by mode of clip 1 with its image and of clip 0 with its frame 5.

  And features of the second.
  """
  method, inputs = public_model(), public.inputs()
  params, _ = public.weights("ft")
  clips = {k: inputs["contrast"][k][:2] for k in ("fbank", "frames")}
  frame = {"fbank": clips["fbank"][:1], "frames": inputs["frames"][:1, 5:6]}
  both = {k: jnp.concatenate([x[1:], frame[k]]) for k, x in clips.items()}

  def run(params):
    found = {m: method.predict(params, both, mode=m)["label"] for m in MODES}
    return found, method.embed(params, frame)

  return jax.jit(run)(params)


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_public_code(mode):
  ours, found = outputs()[0][mode], public.file()
  np.testing.assert_allclose(ours[0], found[PUBLIC[mode]][1], **public.VALUES)
  # The classifier of one modality does not see the other.
  heads = {"a": "ft_av_audio_head", "v": "ft_av_video_head"}
  if mode in heads:
    np.testing.assert_array_equal(found[heads[mode]], found[PUBLIC[mode]])
  if mode != "a":
    frame = found[f"{PUBLIC[mode]}_10frames"][0, 5]
    np.testing.assert_allclose(ours[1, ::8], frame, **public.VALUES)


def test_features_equal_the_public_code():
  names = {
    "audio": "ft_retrieval_a_mean",
    "video": "ft_retrieval_v_mean_frame5",
  }
  for m, name in names.items():
    expected = losses.unit(jnp.asarray(public.file()[name][:1]))
    np.testing.assert_allclose(outputs()[1][m], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
  "multilabel, name", [(True, "ft_bce_av_a_v"), (False, "ft_ce_soft_av_a_v")]
)
def test_losses_equal_the_public_code(multilabel, name):
  kind = small(multilabel).criterion
  labels = public.inputs()["label"]
  for mode, wanted in zip(("av", "a", "v"), public.file()[name], strict=True):
    logits = jnp.asarray(public.file()[PUBLIC[mode]])
    ours = supervised.cross_entropy(kind, logits, labels).mean()
    np.testing.assert_allclose(ours, wanted, **public.LOSS)


def test_number_of_parameters():
  """The public 120,271,247 less what no mode uses."""
  method, clips = public_model(), public.inputs()["contrast"]
  params = jax.eval_shape(method.init, KEY, clips)
  used, aside = public.weights("ft")
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, used)
  assert sum(x.size for x in jax.tree.leaves(params)) == 102_228_525
  assert {"mlp_head_mm_v2.1.weight"} < set(aside)


# --- What a step computes and trains -----------------------------------------


def test_a_quarter_hears_a_quarter_sees_half_does_both():
  keys = jax.random.split(KEY, 4_000)
  drawn = np.bincount(jax.vmap(small().draw)(keys), minlength=3) / 4_000
  np.testing.assert_allclose(drawn, [0.25, 0.25, 0.5], atol=0.02)
  drawn = jax.vmap(small(shares=(0.0, 0.9, 0.1)).draw)(keys)
  np.testing.assert_allclose(drawn.mean(), 0.1, atol=0.02)


def switch(method):
  """The one choice in the gradient's program, not compiled."""

  def loss(params, inputs):
    return method.loss(params, inputs, KEY, STEP)[0]

  program = jax.make_jaxpr(jax.grad(loss))(small_params(), made.small_inputs())
  (found,) = [e for e in program.jaxpr.eqns if e.primitive.name == "cond"]
  return found


def test_a_step_costs_what_its_mode_costs():
  """Forwards and backwards, in products and in what branches hand on."""
  method = small()
  branches = switch(method).params["branches"]
  for mode, branch in zip(MODES, branches, strict=True):
    alone = functools.partial(method.objective, mode)
    wanted = flops.count(
      jax.value_and_grad(alone, has_aux=True),
      small_params(),
      made.small_inputs(),
    )
    assert (
      flops.count(jax.extend.core.jaxpr_as_fun(branch), *branch.in_avals)
      == wanted
    )
  handed = sum(x.aval.size for x in switch(method).outvars)
  parameters = sum(x.size for x in jax.tree.leaves(small_params()))
  assert handed == parameters + 8 * 7 + 2  # logits and losses


@pytest.mark.parametrize("options", [(), ("norms",), ("encoder",)])
@pytest.mark.parametrize("mode", MODES)
def test_groups_are_what_a_mode_leaves_alone(mode, options):
  values = {"norms": "modality", "encoder": "separate"}
  method = small(**{key: values[key] for key in options})
  params = jax.eval_shape(method.init, KEY, made.small_inputs())

  class Alone:
    @staticmethod
    def loss(params, inputs, rng, step):
      return method.objective(mode, params, inputs)

  silent = made.silent_paths(Alone, params, made.small_inputs())
  flags = method.trainable({m: jnp.bool_(m == mode) for m in MODES})
  groups = {
    path: method.param_info(path).group for path in trees.flatten(params)
  }
  assert silent == {p for p, group in groups.items() if not flags.get(group, 1)}
  assert set(groups.values()) - {"default"} == set(flags)


@functools.cache
def training(devices):
  """One optimiser step, its batch on so many devices."""
  method, inputs = small(), made.small_inputs()
  params = small_params()
  section = config_lib.base_config().optimizer
  section.update(name="adam_l2", weight_decay=0.1)
  section.multipliers = {"head_av": 10.0}
  optimizer = optim.make(
    section, lambda step: 1e-3, params, method.param_info, method.num_layers
  )
  mesh = jax.make_mesh(
    (devices,), ("data",), (jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )  # fmt: skip
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  inputs = jax.device_put(inputs, place)

  @jax.jit
  def step(params, state, inputs, rng):
    def loss(params):
      return method.loss(params, inputs, rng, STEP)

    grad = jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = grad(params)
    params, state, _ = optimizer.update(grads, state, params, aux["trainable"])
    return params, state, value, aux["metrics"], grads

  return step, params, optimizer.init(params), inputs


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_trained_stays(mode):
  method = small()
  step, params, state, inputs = training(1)
  after, found, loss, metrics, grads = step(
    params, state, inputs, key_of(method, mode)
  )
  assert {m: float(metrics[f"trained_{m}"]) for m in MODES} == {
    m: float(m == mode) for m in MODES
  }
  # The same as the mode's own loss.
  alone = functools.partial(method.objective, mode)
  wanted = jax.jit(jax.value_and_grad(alone, has_aux=True))(params, inputs)
  (value, _), gradient = wanted
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    grads,
    gradient,
  )
  used = {m: m in MODALITIES[mode] for m in ("audio", "video")}
  used |= {"multimodal": mode == "av", "default": True}
  used |= {group: m == mode for m, group in avsiam_finetune.HEADS.items()}
  assert {k: bool(x) for k, x in found["count"].items()} == used
  old, moments = trees.flatten(params), trees.flatten(found["mu"])
  for path, new in trees.flatten(after).items():
    moved = used[method.param_info(path).group]
    assert np.array_equal(new, old[path]) != moved, path
    assert bool(moments[path].any()) == moved, path


@pytest.mark.parametrize("mode", ["a", "av"])
def test_eight_devices_train_as_one(mode):
  rng = key_of(small(), mode)
  one, eight = (step(*rest, rng) for step, *rest in (training(1), training(8)))
  np.testing.assert_allclose(one[2], eight[2], rtol=1e-5)
  for a, b in zip(*(jax.tree.leaves(x[4]) for x in (one, eight)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_mixed_labels_take_the_weight_of_what_is_trained():
  method, params = small(label_smoothing=0.0), small_params()
  inputs = made.small_inputs()
  mixed = {
    **inputs,
    "mix/audio": jnp.full(8, 0.4),
    "mix/video": jnp.full(8, 0.8),
  }
  for mode, weight in (("a", 0.4), ("v", 0.8), ("av", 0.6)):
    objective = jax.jit(functools.partial(method.objective, mode))
    loss, (_, logits) = objective(params, mixed)
    labels = losses.mix_labels(inputs["label"], jnp.full(8, weight))
    wanted = losses.softmax_cross_entropy(logits, labels).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


# --- Modes -------------------------------------------------------------------


def test_an_example_that_lacks_a_modality_is_answered_by_the_other():
  method, params = small(), small_params()
  inputs = made.small_inputs(4)
  given = dict(inputs)
  inputs["has_video"] = jnp.array([True, True, False, True])
  inputs["has_audio"] = jnp.array([False, True, True, True])

  @jax.jit
  def run(params, inputs):
    found = {m: method.predict(params, given, mode=m)["label"] for m in MODES}
    return found, method.predict(params, inputs)["label"]

  found, ours = run(params, inputs)
  for row, mode in enumerate(("v", "av", "a", "av")):
    np.testing.assert_allclose(ours[row], found[mode][row], atol=1e-6)


@pytest.mark.parametrize("mode, gone", [("a", "frames"), ("v", "fbank")])
def test_one_modality_needs_no_inputs_of_the_other(mode, gone):
  """In use, and in training where its share is one."""
  inputs = {k: v for k, v in made.small_inputs(2).items() if k != gone}
  out = jax.eval_shape(
    functools.partial(small().predict, mode=mode), small_params(), inputs
  )
  assert out["label"].shape == (2, 7)
  with pytest.raises(InputError, match=f"the inputs have no '{gone}'"):
    small().predict(small_params(), inputs, mode="av")
  method = small(shares=tuple(float(m == mode) for m in MODES))
  params = jax.eval_shape(method.init, KEY, made.small_inputs(2))
  missing = {"fbank": "audio", "frames": "video"}[gone]
  strange = (missing, "multimodal", "classifier_av")
  assert not [p for p in trees.flatten(params) if any(x in p for x in strange)]
  assert method.modes == (mode,)
  loss, aux = jax.eval_shape(method.loss, params, inputs, KEY, STEP)
  assert loss.shape == () and f"trained_{mode}" in aux["metrics"]


def test_features_are_those_of_pretraining():
  features = jax.jit(small().embed)(small_params(), made.small_inputs())
  for m in ("audio", "video"):
    lengths = jnp.linalg.norm(features[m], axis=1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)


def test_several_heads_and_refusals():
  method = small()
  method.config.data.heads = ("verb", "noun")
  sizes = {"verb": 3, "noun": 4}
  method.config.model.classes = sizes
  method = type(method)(method.config)
  inputs = made.small_inputs(2)
  for head, k in sizes.items():
    inputs[f"label/{head}"] = jnp.eye(k)[jnp.array([0, 1])]
  params = jax.eval_shape(method.init, KEY, inputs)
  _, aux = jax.eval_shape(method.loss, params, inputs, KEY, STEP)
  assert {"loss_verb", "loss_noun"} < set(aux["metrics"])
  with pytest.raises(InputError, match="mode of predict"):
    method.predict(params, inputs, mode="missing_a")
  with pytest.raises(InputError, match="unknown model.loss 'sigmoid'"):
    small(loss="sigmoid")
  with pytest.raises(InputError, match="three numbers"):
    small(shares=(0.5, 0.5, 0.5))
  method.config.data.heads = ("segment",)
  method.config.model.classes = {"segment": 3}
  with pytest.raises(InputError, match="no segment head"):
    type(method)(method.config)


# --- Starting from another model ---------------------------------------------


def pretrained(**model):
  """Shapes of a pre-trained model's parameters as zeros."""
  config = config_lib.base_config()
  config.method = "avsiam"
  model = {**made.SMALL, **made.SMALL_DECODER, "multimodal_depth": 1} | model
  config.model = avsiam.default_model(**model)
  return zeros(methods.make(config))


def zeros(method):
  shapes = jax.eval_shape(method.init, KEY, made.small_inputs())
  return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)


def test_starts_from_pretraining():
  method = small()
  source = pretrained()
  source["encoder"]["block_01"]["mlp"]["fc1"]["bias"] += 3
  source["multimodal"]["block_00"]["mlp"]["fc1"]["bias"] += 4
  loaded = method.adapt(zeros(method), source, {"method": "avsiam"})
  assert not loaded.reshaped
  missing = {path.split("/")[0] for path in loaded.missing}
  assert missing == set(avsiam_finetune.CLASSIFIERS.values())
  unused = ("decoder", "head_", "mask_token")
  assert all(path.startswith(unused) for path in loaded.unused)
  assert (loaded.params["encoder"]["block_01"]["mlp"]["fc1"]["bias"] == 3).all()
  layer = loaded.params["multimodal"]["block_00"]
  assert (layer["mlp"]["fc1"]["bias"] == 4).all()


def test_other_classes_keep_their_first_values():
  method = small(classes={"label": 5})
  loaded = method.adapt(zeros(method), zeros(small()), {})
  ends = {f"{c}/out/{x}" for c in avsiam_finetune.CLASSIFIERS.values()
          for x in ("bias", "kernel")}  # fmt: skip
  assert set(loaded.missing) == ends


def test_models_of_two_encoders_are_refused():
  method = small()
  cavmae = made.finetuning(**made.SMALL)
  with pytest.raises(InputError, match="one for both"):
    method.adapt(zeros(method), zeros(cavmae), {"method": "cavmae_finetune"})
  with pytest.raises(InputError, match="public Base files go with"):
    method.adapt(zeros(method), pretrained(norms="modality"), {})
  own = small(norms="modality")
  assert own.adapt(zeros(own), pretrained(norms="modality"), {}).loaded
  two = {"audio": zeros(method), "video": zeros(method)}
  with pytest.raises(InputError, match="one for both"):
    method.adapt(zeros(method), two, {})
