"""AVSiam's pretraining: its own promises, at sizes that compile in seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import collectives, experiment, losses, methods, parallel, trees
from avjax import config as config_lib
from avjax.errors import InputError
from avjax.methods import avsiam as method_lib
from avjax.methods import avsiam_config
from avjax.nn import cav_encoder, masking, siam_encoder, transformer
from tests import cavmae_golden as made
from tests import runs

MODALITIES = ("audio", "video")
KEY, STEP = jax.random.key(0), jnp.int32(0)
# Of 8 and 4 patches: 8, 5, 4 and 4, 2, 2 stay.
RATIOS = (0.0, 0.3, 0.5)


@functools.cache
def small(**model):
  config = config_lib.base_config()
  config.method = "avsiam"
  sizes = {**made.SMALL, **made.SMALL_DECODER}
  if not model.get("public_base"):
    sizes["ratios"] = RATIOS
  config.model = avsiam_config.default_model("B", **{**sizes, **model})
  return methods.make(config)


@functools.cache
def params_of(**model):
  init = jax.jit(small(**model).init)
  return init(jax.random.key(1), made.small_inputs(1))


def partial_inputs(b):
  """Inputs of which one lacks the sound, one the picture and one is padding."""
  inputs = made.small_inputs(b)
  inputs["has_audio"] = jnp.arange(b) != 2
  inputs["has_video"] = jnp.arange(b) != 5
  inputs["valid"] = jnp.arange(b) != b - 1
  return inputs


def close(ours, theirs, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs
  )


# --- Masks of many ratios ----------------------------------------------------


def test_blocks_hold_every_ratio_once():
  inputs, method = made.small_inputs(60), small()
  draw = jax.jit(lambda x: jax.tree.map(
    lambda s: (s.counts(), s.removed()), method.draw(x, KEY, RATIOS),
    is_leaf=lambda s: isinstance(s, siam_encoder.Slots),
  ))  # fmt: skip
  found = draw(inputs)
  for m, expected in (("audio", [4, 5, 8]), ("video", [2, 2, 4])):
    counts, removed = map(np.asarray, found[m])
    assert np.array_equal(
      np.sort(counts.reshape(20, 3)), np.tile(expected, (20, 1))
    )
    assert np.array_equal((~removed).sum(1), counts)
    assert len({row.tobytes() for row in counts.reshape(20, 3)}) > 2
  whole = [np.asarray(found[m][0]) == max(found[m][0]) for m in MODALITIES]
  both = (whole[0] & whole[1]).mean()
  assert 0 < both < 1 / 3  # independently: 1/9
  # Neither the batch's size nor the other blocks matter.
  half = draw({k: v[30:] for k, v in inputs.items()})
  close(half, jax.tree.map(lambda x: x[30:], found), rtol=0)


def test_one_ratio_and_none_are_the_same_code():
  inputs = made.small_inputs(4)
  for ratio, kept in ((0.75, 2), (0.0, 8)):
    slots = small(ratios=(ratio,)).draw(inputs, KEY, (ratio,))["audio"]
    assert slots.kept == (kept,) and slots.ids().shape == (4, kept)
    assert (~slots.removed()).sum() == 4 * kept


@pytest.mark.parametrize("rows, columns", [(0, 3), (1, 1), (2, 0)])
def test_lines_by_example_equal_those_of_all(rows, columns):
  noise = jax.random.uniform(KEY, (5, 8))
  keys = masking.example_keys(KEY, jnp.arange(5, dtype=jnp.uint32))
  ours = siam_encoder.whole_lines(
    noise, keys, (2, 4), jnp.full(5, rows), jnp.full(5, columns)
  )
  theirs = masking.whole_lines(noise, keys, (2, 4), rows=rows, columns=columns)
  assert np.array_equal(ours, theirs)


def test_structured_masks_of_a_whole_clip():
  """As many lines as the public code marks; as many tokens as without."""
  method = small(public_base=True, decoder_depth=1)
  ratios = tuple(method.model.ratios)
  inputs = {
    "fbank": jnp.zeros((5, 1024, 128)),
    "frames": jnp.zeros((5, 1, 224, 224, 3)),
    "noise_ratio/audio": jnp.arange(5.0),
  }
  kept = method.draw(inputs, KEY, ratios)
  assert kept["audio"].kept == (512, 409, 307, 204, 102)
  assert kept["video"].kept == (196, 156, 117, 78, 39)
  removed = np.asarray(kept["audio"].removed())
  assert removed.sum(1).tolist() == [0, 103, 205, 308, 410]
  # 35 columns and 4 rows hold 396 tokens: at .8 all of them are removed.
  grid = removed[4].reshape(8, 64)
  assert grid.all(0).sum() >= 35 and grid.all(1).sum() >= 4


# --- The plain encoder -------------------------------------------------------


def plain_loss(method, params, inputs, removed):
  """The same objective, one example after the other."""
  model, size = method.model, method.size
  patches = cav_encoder.patches(inputs, model)

  def run(name, x, depth, norm):
    stack = transformer.Transformer(
      depth, size.heads, size.mlp, eps=model.eps, gelu="erf", norm=norm
    )
    return stack.apply({"params": params[name]}, x[None])[0]

  def dense(name, x):
    return x @ params[name]["kernel"] + params[name]["bias"]

  pooled, whole = {m: [] for m in MODALITIES}, []
  for i in range(len(inputs["fbank"])):
    places = {m: np.flatnonzero(~removed[m][i]) for m in MODALITIES}
    tokens = []
    for m in MODALITIES:
      x = dense(f"embed_{m}", patches[m][i][places[m]])
      name = f"encoder_{m}" if model.encoder == "separate" else "encoder"
      x = x + params[f"positions_{m}"][places[m]]
      x = run(name, x, size.depth, True)
      pooled[m].append(x.mean(0))
      tokens.append(jax.lax.stop_gradient(x) if model.stop_gradient else x)
    x = run(
      "multimodal", jnp.concatenate(tokens), model.multimodal_depth, False
    )
    x, start = dense("decoder_project", x), 0
    for m in MODALITIES:
      n = len(places[m])
      blank = jnp.tile(params["mask_token"], (patches[m].shape[1], 1))
      full = blank.at[places[m]].set(x[start : start + n])
      full = full + params[f"decoder_positions_{m}"]
      whole.append(full + params[f"decoder_modality_token_{m}"])
      start += n
  whole = jnp.concatenate(whole).reshape(-1, 12, size.width)
  x = jax.vmap(lambda x: run("decoder", x, model.decoder_depth, True))(whole)
  pooled = {m: jnp.stack(x) for m, x in pooled.items()}
  total = method.contrast(pooled, inputs)[0]
  for m, part in zip(MODALITIES, jnp.split(x, [8], axis=1), strict=True):
    error = ((dense(f"head_{m}", part) - patches[m]) ** 2).mean(2) * removed[m]
    here = np.ones(len(removed[m]))
    for key in (f"has_{m}", "valid"):
      here = here * np.asarray(inputs.get(key, here))
    count = (removed[m] * here[:, None]).sum()
    total = total + (error * here[:, None]).sum() / count
  return total


def plain(b, model):
  """Method, parameters, inputs and the plain objective."""
  method, inputs = small(**model), partial_inputs(b)
  kept = method.draw(inputs, KEY, RATIOS)
  removed = {m: np.asarray(kept[m].removed()) for m in MODALITIES}

  def loss(params):
    return plain_loss(method, params, inputs, removed)

  return method, params_of(**model), inputs, loss


def test_loss_and_gradients_equal_one_example_at_a_time():
  model = {"depth": 1, "multimodal_depth": 1, "stop_gradient": False}
  method, params, inputs, loss = plain(6, model)
  (ours, _), found = made.gradient(method)(params, inputs)
  theirs, expected = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  close(found, expected, atol=2e-6, rtol=1e-4)


def test_loss_of_two_encoders_equals_one_example_at_a_time():
  model = {"depth": 1, "multimodal_depth": 1, "encoder": "separate"}
  method, params, inputs, loss = plain(3, model)
  run = jax.jit(lambda p, x: method.loss(p, x, KEY, STEP)[0])
  np.testing.assert_allclose(
    run(params, inputs), jax.jit(loss)(params), rtol=1e-6
  )


def test_padding_of_keys_changes_nothing():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((2, 7, 2, 4)), jnp.float32)
             for _ in range(3))  # fmt: skip
  count = jnp.array([7, 4])
  for name in ("plain", "saved", "blocked"):
    out = siam_encoder.attend(q, k, v, count, name)
    for i, n in enumerate(count):
      alone = siam_encoder.attend(q[i:, :n][:1], k[i:, :n][:1], v[i:, :n][:1],
                                  None, "plain")  # fmt: skip
      np.testing.assert_allclose(out[i, :n], alone[0], atol=1e-6)


# --- Devices, compilations, numbers ------------------------------------------


def test_loss_does_not_depend_on_the_devices():
  params, inputs = params_of(), partial_inputs(24)
  function = made.gradient(small())
  (one, metrics), grads = function(params, inputs)
  spread = runs.over_devices(inputs)
  compiled = function.lower(params, spread).compile()
  (eight, spread_metrics), spread_grads = compiled(params, spread)
  np.testing.assert_allclose(one, eight, rtol=1e-5)
  close(metrics, spread_metrics, rtol=1e-5)
  close(grads, spread_grads, rtol=1e-3, atol=1e-5)
  # The contrastive loss gathers one vector an example, and who counts.
  moved = collectives.find(compiled)
  sizes = [x.result_bytes for x in moved if x.kind == "all-gather"]
  assert max(sizes) == 4 * 24 * 16 and sum(sizes) <= 4 * (24 * 16 + 24)
  kinds = {"all-gather", "all-reduce", "reduce-scatter"}
  assert {one.kind for one in moved} <= kinds


def test_one_program_for_all_draws():
  method = small()
  run = jax.jit(lambda p, x, key: method.loss(p, x, key, STEP)[0])
  inputs, seen = made.small_inputs(6), set()
  for i in range(3):
    inputs["index"] = inputs["index"] + 6
    seen.add(float(run(params_of(), inputs, jax.random.key(i))))
  assert run._cache_size() == 1 and len(seen) == 3


def test_scan_and_remat_equal_unrolled():
  plain, method = small(), small(scan=True, remat="full")
  inputs, params = partial_inputs(6), params_of()
  stacked = transformer.stack_layers(params)
  (value, _), grads = made.gradient(plain)(params, inputs)
  (other, _), found = made.gradient(method)(stacked, inputs)
  np.testing.assert_allclose(value, other, rtol=1e-6)
  close(grads, transformer.unstack_layers(found), atol=1e-5)


def test_missing_modality_does_not_count():
  inputs = partial_inputs(6)
  run, params = made.gradient(small()), params_of()
  (_, metrics), grads = run(params, inputs)
  inputs["fbank"] = inputs["fbank"].at[jnp.array([2, 5])].add(3.0)
  inputs["frames"] = inputs["frames"].at[5].add(3.0)
  (_, changed), _ = run(params, inputs)
  assert changed["loss_contrast"] == metrics["loss_contrast"]
  assert changed["loss_audio"] == metrics["loss_audio"]
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


class Reconstruction:
  """The method whose loss is the reconstruction alone."""

  def __init__(self, method):
    self.method = method

  def loss(self, *args):
    _, aux = self.method.loss(*args)
    metrics = aux["metrics"]
    return metrics["loss_audio"] + metrics["loss_video"], aux


def test_reconstruction_gives_the_encoder_no_gradient():
  params, inputs = params_of(), made.small_inputs(6)
  silent = made.silent_paths(Reconstruction(small()), params, inputs)
  assert silent == {
    path
    for path in trees.flatten(params)
    if path.startswith(("embed_", "positions_", "encoder/"))
  }
  flowing = Reconstruction(small(stop_gradient=False))
  assert not made.silent_paths(flowing, params, inputs)


@pytest.mark.parametrize(
  "model",
  [
    {"mae_weight": 0.0},
    {"contrast_weight": 0.0, "stop_gradient": False},
    {"public_base": True},
    {"public_base": True, "mae_weight": 0.0},
    {"public_base": True, "contrast_weight": 0.0},
  ],
)
def test_what_no_loss_reaches_is_frozen(model):
  method, inputs = small(**model), made.small_inputs(30)
  inputs["frames"] = jnp.zeros((30, 1, 32, 48, 3))
  params = jax.eval_shape(method.init, KEY, inputs)
  silent = made.silent_paths(method, params, inputs)
  assert silent == made.frozen_paths(method, params)


def test_half_precision_runs():
  method = small()
  method = methods.make(method.config.copy_and_resolve_references())
  method.config.dtype = "bfloat16"
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of())
  total, aux = jax.eval_shape(
    method.loss, half, made.small_inputs(6), KEY, STEP
  )
  assert total.dtype == jnp.float32
  assert aux["intermediates"]["prediction/video"].dtype == jnp.bfloat16
  assert aux["intermediates"]["multimodal/video"].dtype == jnp.bfloat16


def test_features_and_pictures():
  method, inputs = small(), made.small_inputs(2, frames=70)
  embed = jax.jit(method.embed)
  features = embed(params_of(), inputs)
  assert list(features) == ["audio", "video"]
  np.testing.assert_allclose(jnp.square(features["audio"]).sum(1), 1, rtol=1e-5)
  alone = embed(params_of(), {"frames": inputs["frames"]})
  assert list(alone) == ["video"]
  np.testing.assert_allclose(alone["video"], features["video"], atol=1e-6)

  @jax.jit
  def run(params, inputs):
    kept = method.draw(inputs, KEY, (0.0,))
    module = method.autoencoder(inputs)
    return method.apply(module, params, inputs, kept, False)

  out = run(params_of(), inputs)
  np.testing.assert_allclose(
    losses.unit(out["pooled"]["audio"]), features["audio"], atol=1e-6
  )
  seen = jax.jit(method.reconstruct)(params_of(), inputs, KEY)
  for m in MODALITIES:
    mask = np.asarray(seen[f"joint/{m}/mask"])
    assert mask.shape == seen[f"joint/{m}/output"].shape
    assert mask.shape == seen[f"{m}/input"].shape
  assert mask.mean() == 0.5


def test_layers_and_groups_of_parameters():
  expected = {
    "embed_audio/kernel": (0, "default"),
    "positions_video": (0, "default"),
    "encoder/block_00/norm1/scale": (1, "default"),
    "encoder_video/block_01/mlp/fc1/bias": (2, "default"),
    "encoder/norm/scale": (3, "default"),
    "multimodal/block_00/norm1/scale": (3, "multimodal"),
    "decoder/block_00/norm1/scale": (3, "default"),
  }
  assert small().num_layers == 2
  for path, found in expected.items():
    info = small().param_info(path)
    assert (info.layer, info.group, info.decay) == (*found, True)


# --- Refusals ----------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused():
  method, params = small(), params_of()
  with pytest.raises(InputError, match="batch size 8 is not .* by the 3 of"):
    method.loss(params, made.small_inputs(8), KEY, STEP)
  assert method.batch_multiple == 3
  mesh = parallel.make_mesh(config_lib.base_config().mesh)
  experiment.check_batch(method.config, 48, mesh, 3)
  with pytest.raises(InputError, match="2 examples a device .* by the 3 .* 24"):
    experiment.check_batch(method.config, 16, mesh, 3)
  with pytest.raises(InputError, match="AVSiam needs 'fbank'"):
    method.loss(params, {"frames": jnp.zeros((3, 1, 32, 32, 3))}, KEY, STEP)
  with pytest.raises(InputError, match="8 rows, .* 2 x 6 = 12 patches"):
    method.embed(params, made.small_inputs(2, frames=96))
  with pytest.raises(InputError, match="0.8 keeps 0 of the 4 patches of video"):
    small(ratios=(0.8,)).loss(params, made.small_inputs(2), KEY, STEP)


@pytest.mark.parametrize(
  "overrides, words",
  [
    ({"encoder": "shred"}, "Did you mean 'shared'"),
    ({"norms": "modality", "encoder": "separate"}, "LayerNorms of their own"),
    ({"audio_masking": "time"}, "model.audio_masking"),
    ({"ratios": (0.5, 1.0)}, "less than 1"),
    ({"ratios": ()}, "at least one share"),
    ({"mae_weight": 0.0, "contrast_weight": 0.0}, "nothing to learn"),
    ({"contrast_weight": 0.0}, "trains no encoder while model.stop_gradient"),
    ({"patch_video": (2, 16, 16)}, "sees one frame"),
    ({"public_base": True, "eps": 1e-6}, "stands for model.eps=1e-05"),
    ({"norm_pics": True}, "Did you mean 'norm_pix'"),
  ],
)
def test_what_cannot_work_is_refused(overrides, words):
  with pytest.raises(InputError, match=words):
    small(**overrides)


# --- Sizes and starting from another model -----------------------------------


@pytest.mark.parametrize(
  "size, model, millions, paper",
  [
    ("B", {}, 100.6, 100),
    ("L", {}, 329.3, 332),
    ("H", {"patch_audio": (14, 14), "patch_video": (1, 14, 14)}, 671.2, 672),
    ("L", {"encoder": "separate"}, 631.6, 640),
  ],
)
def test_number_of_parameters(size, model, millions, paper):
  """Encoder and multimodal layers: the paper counts no decoder."""
  config = config_lib.base_config()
  config.model = avsiam_config.default_model(size, scan=True, **model)
  method = method_lib.AVSiam(config)
  inputs = {
    "fbank": jax.ShapeDtypeStruct((1, 1024, 128), jnp.float32),
    "frames": jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.float32),
  }
  params = trees.flatten(jax.eval_shape(method.init, KEY, inputs))
  counted = sum(
    leaf.size
    for path, leaf in params.items()
    if not path.startswith(("decoder", "mask_token", "head_"))
  )
  assert abs(counted / 1e6 - millions) < 0.06
  assert abs(counted / 1e6 - paper) < 0.014 * paper


def test_adapt_to_a_longer_clip_and_to_two_encoders():
  source = jax.device_get(params_of())
  for encoder in ("shared", "separate"):
    method = small(encoder=encoder)
    method.config.data.fbank.num_mels = 32
    longer = jax.eval_shape(method.init, KEY, made.small_inputs(1, frames=96))
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), longer)
    loaded = method.adapt(blank, source, {})
    assert not loaded.missing and not loaded.unused
    assert set(loaded.reshaped) == {
      "positions_audio", "decoder_positions_audio",
    }  # fmt: skip
    assert loaded.params["positions_audio"].shape == (12, 16)
  path = "block_01/attention/qkv/kernel"
  assert loaded.loaded[f"encoder_audio/{path}"] == f"encoder/{path}"
