"""ConvNeXt and UAVM's audio extractor: torchvision's numbers, files, recipe."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config as config_lib
from avjax import convert, initialise, losses, methods, optim, trees
from avjax.data import augment, pipeline
from avjax.errors import InputError
from avjax.methods import convnext as method_lib
from avjax.methods.supervised import classify
from avjax.nn import convnext
from avjax.weights import convnext as names
from avjax.weights import families, formats
from tests import golden

# What the file's README allows; float64 tells eps and GELU apart.
FLOAT32, FLOAT64 = {"rtol": 0, "atol": 2e-5}, {"rtol": 0, "atol": 1e-9}
TINY = {"width": 8, "depths": (1, 1, 2, 1), "classes": {"label": 5}}
CONFIGS = ("uavm_extractor_vgg", "uavm_extractor_audioset")


@functools.cache
def file():
  """The tiny network of torchvision 0.28; image/… and audio/…."""
  values = golden.load("convnext.npz")
  return {k.removeprefix("tiny/"): v for k, v in values.items()}


@functools.cache
def state():
  """torchvision's names, drawn by the file's recipe and checked."""
  rng, drawn = np.random.default_rng(1234), {}
  for key, text in zip(file()["keys"], file()["shapes"], strict=True):
    key, shape = str(key), tuple(map(int, str(text).split(",")))
    z = rng.standard_normal(shape)
    norm = key.endswith(".weight") and len(shape) == 1
    if norm or key.endswith("layer_scale"):
      z = 1 + 0.05 * z
    elif key.endswith(".weight"):
      z = z / np.sqrt(np.prod(shape[1:]))
    else:
      z = 0.05 * z
    drawn[key] = z.astype(np.float32)
  sums = [x.astype(np.float64).sum() for x in drawn.values()]
  np.testing.assert_allclose(sums, file()["weight_sums"], atol=1e-6)
  return drawn


@functools.cache
def inputs():
  """Frames [b h w 3] and log-mel [b t f]."""
  rng = np.random.default_rng(77)
  image = rng.standard_normal((2, 3, 224, 398)).astype(np.float32)
  fbank = rng.standard_normal((2, 990, 128)).astype(np.float32)
  return {"image": image.transpose(0, 2, 3, 1), "audio": fbank}


def method(modality="a", **model):
  config = config_lib.base_config()
  config.method, config.data.modality = "convnext", modality
  config.model = method_lib.default_model("B", **{**TINY, **model})
  return methods.make(config)


@functools.cache
def hearing():
  """The method and its parameters, started from the image model's."""
  made, fbank = method(), jnp.asarray(inputs()["audio"])
  shapes = jax.eval_shape(made.init, jax.random.key(0), {"fbank": fbank})
  blank = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  return made, made.adapt(blank, names.to_house(state())[0], {})


def params_of(kind):
  return names.to_house(state())[0] if kind == "image" else hearing()[1].params


@functools.cache
def maps(kind):
  """In float64: all maps, from weights and inputs of float32."""
  with jax.enable_x64(True):
    x = jnp.asarray(inputs()[kind], jnp.float64)
    x = x if kind == "image" else convnext.spectrogram(x)
    tree = jax.tree.map(
      lambda v: jnp.asarray(v, jnp.float64), params_of("image")
    )
    if kind == "audio":  # The sum over colours is in float64, too.
      kernel = tree["embed"]["kernel"].reshape(16, 3, -1).sum(1)
      tree = {**tree, "embed": {**tree["embed"], "kernel": kernel}}
    module = convnext.ConvNeXt(convnext.size_of(tree))
    found = jax.jit(module.apply)({"params": tree}, x)
    return jax.tree.map(np.asarray, found)


# --- The network -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_maps_equal_torchvision(kind):
  shapes = file()[f"{kind}/shapes_of_8_features"]
  for number, name in enumerate(("stem", *[f"stage_{i}" for i in range(4)])):
    place = max(0, 2 * number - 1)
    found = maps(kind)[name].transpose(0, 3, 1, 2)
    b, c, h, w = found.shape
    assert found.dtype == np.float64 and tuple(shapes[place]) == (b, c, h, w)
    some = found[:, :: max(1, c // 8), :: max(1, h // 5), :: max(1, w // 6)]
    expected = file()[f"{kind}/features{place}_sample"]
    np.testing.assert_allclose(some, expected, **FLOAT64)
    expected = file()[f"{kind}/features{place}_channel_mean"]
    np.testing.assert_allclose(found.mean((2, 3)), expected, **FLOAT64)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_features_and_logits_equal_torchvision(kind):
  made, params, x = hearing()[0], params_of(kind), jnp.asarray(inputs()[kind])
  assert convnext.size_of(params) == made.size

  def run(params, x):
    found = convnext.features(params, x)
    if kind == "audio":
      logits = made.predict(params, {"fbank": x}, mode="a")["label"]
      return found, made.embed(params, {"fbank": x})["audio"], logits
    return found, found, classify(params["classifier"], found, convnext.EPS)

  found, pooled, logits = jax.jit(run)(params, x)
  np.testing.assert_allclose(found, file()[f"{kind}/feature"], **FLOAT32)
  mean = file()[f"{kind}/features7_channel_mean"]
  np.testing.assert_allclose(pooled, mean, **FLOAT32)
  np.testing.assert_allclose(logits, file()[f"{kind}/logits"], **FLOAT32)


def test_shifted_maps_are_the_convolution():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 5, 9, 3)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((7, 7, 1, 3)), jnp.float32)

  def gradients(convolution):
    loss = lambda x, k: jnp.sin(convolution(x, k)).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)

  ours, expected = map(gradients, (convnext.shifted, convnext.convolved))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, ours, expected)


@pytest.mark.parametrize(
  "frames, steps", [(990, 30), (998, 31), (1_000, 31), (1_024, 32)]
)
def test_time_steps(frames, steps):
  fbank = jax.ShapeDtypeStruct((2, frames, 128), jnp.float32)
  found = jax.eval_shape(convnext.features, params_of("audio"), fbank)
  assert found.shape == (2, steps, 64)


def test_small_maps_are_refused():
  fbank = jax.ShapeDtypeStruct((2, 31, 128), jnp.float32)
  with pytest.raises(InputError, match="128 x 31 is too small.*32 x 32"):
    jax.eval_shape(convnext.features, params_of("audio"), fbank)


# --- The method --------------------------------------------------------------


def test_stochastic_depth_is_torchvisions():
  """Rates rise from 0 to the last block's; what is kept is scaled."""
  made = method(drop_path=0.5)
  given = {"fbank": jnp.zeros((4_000, 1, 1))}
  keep = np.asarray(made.draw_keep(given, jax.random.key(3)))
  rates = 0.5 * np.arange(5) / 4
  for row, rate in zip(keep, rates, strict=True):
    assert set(np.unique(row)) <= {0, np.float32(1 / (1 - rate))}
  np.testing.assert_allclose((keep == 0).mean(1), rates, atol=0.03)
  assert method(drop_path=0.0).draw_keep(given, jax.random.key(3)) is None


def test_loss_counts_sounds_and_a_scan_computes_the_same():
  sizes = {"width": 2, "depths": (1, 1, 2, 1), "drop_path": 0.4}
  made = [method(scan=scan, **sizes) for scan in (False, True)]
  rng = np.random.default_rng(1)
  given = {
    "fbank": jnp.asarray(rng.standard_normal((4, 32, 32)), jnp.float32),
    "label": jnp.eye(5)[:4],
    "index": jnp.arange(4, dtype=jnp.uint32),
    "has_audio": jnp.asarray([True, True, False, True]),
    "mix/audio": jnp.asarray([1.0, 1.0, 0.7, 0.7]),
  }
  key = jax.random.key(0)
  params = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32),
    jax.eval_shape(made[0].init, key, given),
  )
  results = [
    jax.jit(lambda p, g, m=m: m.loss(p, g, key, jnp.int32(0)))(params, given)
    for m in made
  ]
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
  loss, aux = results[0]
  labels = losses.assign_labels(given["label"], 0.1, given["mix/audio"])
  values = losses.softmax_cross_entropy(aux["intermediates"]["logits"], labels)
  np.testing.assert_allclose(loss, values[jnp.array([0, 1, 3])].mean(), 1e-5)


def test_layers_and_groups():
  made, loaded = hearing()
  layers = {
    "embed/kernel": 0, "embed_norm/scale": 0, "stage_0/block_00/layer_scale": 1,
    "stage_1/down/kernel": 2, "stage_2/norm/bias": 3,
    "stage_2/block_01/conv/bias": 4, "stage_3/block_00/mlp/fc1/kernel": 5,
    "classifier/norm/scale": 6,
  }  # fmt: skip
  for path in trees.flatten(loaded.params):
    info = made.param_info(path)
    assert info.decay and info.layer == layers.get(path, info.layer)
    head = path.startswith("classifier/")
    assert info.group == ("head" if head else "default")
  assert made.num_layers == 5


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda m: m.predict({}, {}, mode="v"), "mode of predict"),
    (lambda m: m.embed({}, {}), "no 'fbank' for the audio"),
    (lambda m: m.adapt({}, {"embed_audio": {}}, {}), "is no ConvNeXt"),
    (lambda m: m.adapt({}, params_of("image"), {}), r"width=8.*not.*width=4"),
  ],
)
def test_what_does_not_fit_is_refused(call, words):
  with pytest.raises(InputError, match=words):
    call(method(width=4))


# --- Files -------------------------------------------------------------------


def test_stem_hears_the_sum_over_colours():
  loaded = hearing()[1]
  kernel = state()["features.0.0.weight"].sum(1, keepdims=True)
  ours = names.to_reference(loaded.params)["module.model.0.0.0.weight"]
  np.testing.assert_allclose(ours, kernel, rtol=1e-5, atol=1e-7)
  assert loaded.reshaped == {"embed/kernel": "3 -> 1 channels, summed"}
  assert not loaded.missing and not loaded.unused


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_round_trip_is_exact(kind):
  public = state() if kind == "image" else names.to_reference(params_of(kind))
  prefix = "" if kind == "image" else "module.model."
  assert all(name.startswith(prefix) for name in public)
  assert len(public) == 65 and all(map(names.knows, public))
  params, aside = names.to_house({**public, "extra": np.zeros(2)})
  assert set(aside) == {"extra"}
  again = names.to_reference(params, aside)
  assert set(again) == {*public, "extra"}
  for name, x in public.items():
    np.testing.assert_array_equal(again[name], x, strict=True, err_msg=name)


def test_extractors_are_recognised_with_their_config(tmp_path):
  rng, params = np.random.default_rng(0), params_of("audio")
  out = {"kernel": rng.random((64, 309)), "bias": rng.random(309)}
  out = {name: x.astype(np.float32) for name, x in out.items()}
  head = {**params["classifier"], "out": out}
  public = names.to_reference({**params, "classifier": head})
  formats.write(tmp_path / "x.safetensors", public)
  weights = families.load(tmp_path / "x.safetensors")
  assert (weights.family, weights.method) == ("convnext", "convnext")
  config = families.config_of(weights)
  assert config["method"] == "convnext" and config["data"]["modality"] == "a"
  assert config["model"]["depths"] == [1, 1, 2, 1]
  assert config["model"]["classes"] == {"label": 309}
  written = convert.public_arrays(weights, config)
  for name, x in public.items():
    np.testing.assert_array_equal(written[name], x, err_msg=name)


def test_an_image_model_starts_one_but_is_none(tmp_path):
  formats.write(tmp_path / "x.npz", state())
  with pytest.raises(InputError, match="5 classes.*give --config"):
    initialise.read(tmp_path / "x.npz")
  source = initialise.read(tmp_path / "x.npz", complete=False)
  made, expected = hearing()
  blank = jax.tree.map(np.zeros_like, expected.params)
  loaded = initialise.adapt(made, blank, {"": source})
  assert loaded.loaded == expected.loaded
  with pytest.raises(InputError, match="of an image model: give --config"):
    names.public_model(params_of("image"))


@pytest.mark.parametrize(
  "lost",
  ["features.5.1.block.3.bias", "features.4.1.weight", "classifier.2.weight"],
)
def test_a_lost_parameter_is_named(lost):
  left = {name: x for name, x in state().items() if name != lost}
  with pytest.raises(InputError, match=f"have no '{lost}'"):
    names.to_house(left)


def test_features_alone_are_a_file_too():
  left = {n: x for n, x in state().items() if n.startswith("features")}
  params, _ = names.to_house(left)
  assert "classifier" not in params
  loaded = hearing()[0].adapt(params_of("audio"), params, {})
  assert len(loaded.missing) == 4
  assert all(name.startswith("classifier/") for name in loaded.missing)


# --- The configs -------------------------------------------------------------


def load(name, arg=""):
  return importlib.import_module(f"configs.{name}").get_config(arg)


def value(config, path):
  for key in path.split("."):
    config = config[key]
  return config


COMMON = {
  "batch_size": 120,
  "init_from": "convnext_base-6075fbad.pth",
  "model.size": "B",
  "model.drop_path": 0.5,
  "model.label_smoothing": 0.1,
  "model.loss": "auto",
  "optimizer.name": "adam_l2",
  "optimizer.b1": 0.95,
  "optimizer.b2": 0.999,
  "optimizer.weight_decay": 5e-7,
  "schedule.name": "step",
  "schedule.step_factor": 0.5,
  "data.modality": "a",
  "data.sampling": "balanced",
  "data.files.channels": "first",
  "data.fbank.window": "hanning",
  "data.fbank.edges": "snip",
  "data.fbank.num_mels": 128,
  "data.fbank.frames": 1_000,
  "data.fbank.remove_mean": True,
  "data.augment.freq_masks": 1,
  "data.augment.freq_size": 48,
  "data.augment.time_masks": 1,
  "data.augment.time_size": 192,
  "data.augment.mask_value": "raw",
  "data.augment.noise": 0.1,
  "data.augment.roll": 10,
  "data.augment.mixup": 10.0,
  "data.augment.mixup_probability": 0.5,
  "data.augment.mixup_waveform": True,
}
TABLE = {
  "uavm_extractor_vgg": {
    "data.name": "vggsound", "data.split": "train", "data.multilabel": False,
    "data.fbank.mean": -5.081, "data.fbank.std": 4.4849,
    "optimizer.average": "none", "checkpoint.best": "test/top1",
  },
  "uavm_extractor_audioset": {
    "data.name": "audioset", "data.split": "train_2m", "data.multilabel": True,
    "data.fbank.mean": -4.2677, "data.fbank.std": 4.5690,
    "optimizer.average": "epochs", "optimizer.average_from": 16,
    "evals.test.split": "eval",
  },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_is_the_public_one(name):
  config, expected = load(name), {**COMMON, **TABLE[name]}
  assert {key: value(config, key) for key in expected} == expected
  assert load(name, "pretrain=scratch").init_from == ""
  assert load(name, "demo").init_from == ""
  with pytest.raises(InputError, match="Did you mean 'imagenet'"):
    load(name, "pretrain=imagenett")


@pytest.mark.parametrize(
  "name, peak, start, epochs",
  [(CONFIGS[0], 1e-4, 15, 25), (CONFIGS[1], 5e-4, 10, 30)],
)
def test_rate_of_every_epoch(name, peak, start, epochs):
  config, long = load(name), 100
  rate = optim.schedule(
    config.schedule,
    batch_size=config.batch_size,
    steps_per_epoch=long,
    total_steps=epochs * long,
  )
  assert config.total_epochs == epochs and rate(0) == 0
  np.testing.assert_allclose(rate(50), peak * 50 / 83, rtol=1e-6)
  for epoch in range(1, epochs + 1):
    expected = peak * 0.5 ** max(0, epoch - start)
    np.testing.assert_allclose(rate(epoch * long - 1), expected, rtol=1e-6)


@pytest.mark.parametrize(
  "name, total", [(CONFIGS[0], 87_879_093), (CONFIGS[1], 88_102_543)]
)
def test_shapes_and_parameters_at_full_size(name, total):
  config = load(name)
  shapes = pipeline.batch_shapes(config.data, 2)
  batch = {k: jax.ShapeDtypeStruct(*how) for k, how in shapes.items()}
  given = jax.eval_shape(
    lambda b: augment.prepare(b, config.data, jax.random.key(0), True), batch
  )
  assert given["fbank"].shape == (2, 1_000, 128) and "frames" not in given
  made = methods.make(config)
  params = jax.eval_shape(made.init, jax.random.key(0), given)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total
  assert len(jax.tree.leaves(params)) == 344
  assert params["stage_3"]["block_02"]["mlp"]["fc1"]["kernel"].shape == (
    1_024, 4_096,
  )  # fmt: skip
