"""MBT against the public implementation, and what it promises beyond it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avjax import trees
from avjax.config import base_config
from avjax.errors import InputError
from avjax.methods import mbt
from avjax.nn import heads
from avjax.weights import scenic
from tests import golden

FILE, MAE = golden.load("avmae_tiny_mbt.npz"), golden.load("avmae_tiny.npz")
GIVEN = golden.inputs(FILE)
MODALITY = {"rgb": "video", "spectrogram": "audio"}
TINY = {"width": 32, "depth": 4, "heads": 4, "mlp": 64, "fusion_layer": 2}
VARIANTS = {
  "bottleneck": {},
  "bottleneck_test_without": {"test_with_bottlenecks": False},
  "bottleneck_fusion0": {"fusion_layer": 0},
  "bottleneck_fusion_last": {"fusion_layer": 4},
  "bottleneck_shared_encoder": {"share_encoder": True},
  "cross_no_bottleneck": {"use_bottleneck": False},
  "cross_no_bottleneck_shared": {
    "use_bottleneck": False,
    "share_encoder": True,
  },
  "only_rgb": {"modality": "v"},
  "only_spectrogram": {"modality": "a"},
  "bottleneck_token": {"classifier": "token"},
  "bottleneck_modality_tokens": {"modality_tokens": True},
  "original_token": {"classifier": "token", "positions": "learned_1d"},
}


def make(names=("label",), multilabel=False, **model):
  """A method of the golden file's size, without regularisation."""
  config = base_config()
  config.method = "mbt"
  config.data.heads, config.data.multilabel = names, multilabel
  plain = {"classes": {"label": 7}, "label_smoothing": 0.0, "drop_path": 0.0}
  config.model = mbt.default_model(**{**TINY, **plain, **model})
  return mbt.MBT(config)


def inputs(**more):
  """The golden clips and one-hot labels."""
  made = {"frames": GIVEN["rgb"], "fbank": GIVEN["spectrogram"]}
  made["label"] = np.eye(7, dtype=np.float32)[GIVEN["cls"]]
  made["index"] = np.arange(2, dtype=np.uint32)
  return {k: jnp.asarray(v) for k, v in {**made, **more}.items()}


def mixed(**more):
  """Labels 0.8 y + 0.2 y' for video, 0.35 y + 0.65 y' for audio."""
  weights = {"mix/video": 0.8, "mix/audio": 0.35}
  full = {k: np.full(2, v, np.float32) for k, v in weights.items()}
  return inputs(**full, **more)


def house(tag, **recipe):
  return scenic.to_house(golden.reference_params(FILE, tag, **recipe))


# Compiling takes longer than running here.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def loss_of(method, params, batch, keep=None):
  """Loss and aux of one training step."""
  rng, count = jax.random.key(0), jnp.zeros((), jnp.int32)
  return method.loss(params, batch, rng, count, keep)


def step(method, params, batch, keep=None):
  """`loss_of`, compiled."""
  args = (params, batch, keep)
  return quick_jit(lambda *args: loss_of(method, *args))(*args)


def predict(method, params, batch, mode="av"):
  """`method.predict`, compiled."""
  return quick_jit(lambda *args: method.predict(*args, mode=mode))(
    params, batch
  )


def logits(aux, m):
  return aux["intermediates"][f"logits/{m}"]


# --- Forward -----------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_the_public_code(name):
  method, params = make(**VARIANTS[name]), house(f"mbt/{name}")

  @quick_jit
  def everything(params, batch):
    encoded = method.encode(params, batch)
    _, aux = loss_of(method, params, batch)
    return encoded, aux, method.predict(params, batch)["label"]

  encoded, aux, predicted = everything(params, inputs())
  for theirs, ours in MODALITY.items():
    stored = FILE.get(f"mbt/{name}/train_logits_{theirs}")
    assert (stored is None) == (ours not in method.modalities)
    if stored is not None:
      np.testing.assert_allclose(logits(aux, ours), stored, **golden.FORWARD)
  parts = [encoded["tokens"][m] for m in method.modalities]
  tokens = np.concatenate(parts, axis=1)
  compare = {"eval_logits": predicted, "tokens": tokens}
  if name == "bottleneck":
    compare["final_bottleneck"] = encoded["bottleneck"]
  for key, value in compare.items():
    np.testing.assert_allclose(
      value, FILE[f"mbt/{name}/{key}"], **golden.FORWARD
    )


@pytest.mark.parametrize("name", ["bottleneck", "cross_no_bottleneck_shared"])
def test_scanned_layers_give_the_same(name):
  params = house(f"mbt/{name}")
  method = make(scan=True, remat="dots", **VARIANTS[name])
  predicted = predict(method, params, inputs())["label"]
  np.testing.assert_allclose(
    predicted, FILE[f"mbt/{name}/eval_logits"], **golden.FORWARD
  )


def test_stochastic_depth_with_known_patterns():
  dropped = FILE["mbt/bottleneck/droplayer_dropped"].reshape(3, 2, 2, 2)
  keep = {
    m: jnp.concatenate([np.ones((1, 2, 2)), 1.0 - dropped[:, i]]).astype("f4")
    for i, m in enumerate(("video", "audio"))
  }
  _, aux = step(make(), house("mbt/bottleneck"), inputs(), keep=keep)
  for theirs, ours in MODALITY.items():
    np.testing.assert_allclose(
      logits(aux, ours),
      FILE[f"mbt/bottleneck/droplayer_logits_{theirs}"],
      **golden.FORWARD,
    )


def test_stochastic_depth_is_drawn_by_the_ramp():
  method, ramp = make(drop_path=0.5), [0.0, 1 / 6, 2 / 6, 3 / 6]
  keys = jax.random.split(jax.random.key(0), 4000)
  keep = method.encoder().draw_keep(keys, ("video", "audio"), 0.5)
  for values in keep.values():
    assert set(np.unique(values)) == {0.0, 1.0}
    np.testing.assert_allclose(1 - values.mean(axis=(1, 2)), ramp, atol=0.02)
  assert not np.array_equal(keep["video"], keep["audio"])


# --- Losses and gradients ----------------------------------------------------


def test_losses():
  kinds = itertools.product(("softmax", "sigmoid"), ("", "_mixed"), (0, 0.3))

  @quick_jit
  def compute(params):
    found = {}
    for kind, mix, smoothing in kinds:
      multilabel = kind == "sigmoid"
      method = make(multilabel=multilabel, label_smoothing=float(smoothing))
      more = {"label": GIVEN["multi"]} if multilabel else {}
      batch = (mixed if mix else inputs)(**more)
      loss, _ = loss_of(method, params, batch)
      found[f"loss_{kind}{mix}_s{smoothing}"] = loss
    return found

  found = compute(house("mbt/bottleneck"))
  assert len(found) == 8
  for name, loss in found.items():
    stored = FILE[f"mbt/bottleneck/{name}"]
    np.testing.assert_allclose(loss, stored, **golden.LOSS)


def test_losses_by_modality_and_with_padding():
  method, params = make(), house("mbt/bottleneck")
  _, aux = step(method, params, inputs())
  stored = functools.partial("mbt/bottleneck/loss_softmax_s0_{}".format)
  for theirs, ours in MODALITY.items():
    np.testing.assert_allclose(
      aux["metrics"][f"loss_{ours}"],
      FILE[stored(f"only_{theirs}")],
      **golden.LOSS,
    )
  valid = jnp.array([True, False])
  loss, _ = step(method, params, inputs(valid=valid))
  np.testing.assert_allclose(
    loss, FILE[stored("batch_mask_last0")], **golden.LOSS
  )
  predicted = predict(method, params, inputs())["label"]
  loss = optax.softmax_cross_entropy(predicted, inputs()["label"]).mean()
  np.testing.assert_allclose(loss, FILE[stored("eval")], **golden.LOSS)


@pytest.mark.parametrize("name", ["bottleneck", "only_rgb"])
def test_gradients(name):
  method = make(label_smoothing=0.3, **VARIANTS[name])
  grad = quick_jit(jax.value_and_grad(lambda p: loss_of(method, p, mixed())[0]))
  loss, grads = grad(house(f"mbt/{name}"))
  np.testing.assert_allclose(loss, FILE[f"mbt/{name}/grad_loss"], **golden.LOSS)
  theirs = scenic.to_reference(grads, "mbt", heads=4)
  golden.assert_grad_norms(theirs, FILE, f"mbt/{name}")


def test_five_steps_of_sgd_with_layer_decay():
  method = make(label_smoothing=0.3)
  params = house("mbt/bottleneck")
  scale = trees.unflatten(
    {
      path: 0.5 * 0.75 ** (5 - method.param_info(path).layer)
      for path in trees.flatten(params)
    }
  )
  trace = optax.trace(0.9)
  clip = optax.clip_by_global_norm(1.0)
  grad = quick_jit(jax.value_and_grad(lambda p: loss_of(method, p, mixed())[0]))
  state, found, norms = trace.init(params), [], []
  for _ in range(5):
    loss, grads = grad(params)
    found.append(loss)
    norms.append(optax.tree.norm(grads))
    grads, _ = clip.update(grads, clip.init(params))
    grads, state = trace.update(grads, state)
    params = jax.tree.map(lambda p, s, g: p - s * g, params, scale, grads)
  found.append(grad(params)[0])
  tag = "mbt/bottleneck"
  np.testing.assert_allclose(found, FILE[f"{tag}/sgd_losses"], **golden.LOSS)
  np.testing.assert_allclose(
    norms, FILE[f"{tag}/sgd_grad_norms_before_clip"], **golden.GRAD_NORM
  )
  theirs = scenic.to_reference(params, "mbt", heads=4)
  golden.assert_param_norms(theirs, FILE, tag, "sgd_param_norms")


@pytest.mark.parametrize(
  "tree, tag, model",
  [
    ("tiny_mbt", "mbt/bottleneck", {}),
    (
      "tiny_original_mbt_token",
      "mbt/original_token",
      VARIANTS["original_token"],
    ),
  ],
)
def test_layer_decay(tree, tag, model):
  method, params = make(**model), house(tag)
  scale = {
    path: np.full(leaf.shape, 0.75 ** (5 - method.param_info(path).layer))
    for path, leaf in trees.flatten(params).items()
  }
  layout = "mbt_original" if "original" in tree else "mbt"
  theirs = scenic.to_reference(trees.unflatten(scale), layout, heads=4)
  for path, stored in zip(
    FILE[f"layer_decay/{tree}/paths"],
    FILE[f"layer_decay/{tree}/scale"],
    strict=True,
  ):
    np.testing.assert_allclose(theirs[str(path)], stored, rtol=1e-12)


def test_layer_decay_of_24_layers():
  method = make(depth=24, modality_tokens=True, classifier="token")
  table = {
    "Encoder_modality_token_rgb": "modality_token_video",
    "ProjectionHeadAndClassifier_0/output_projection/kernel": "head/kernel",
    "Transformer/encoder_norm/scale": "norm/scale",
    "bottleneck": "bottleneck",
    "cls": "cls_video",
    "clsspectrogram": "cls_audio",
    "embedding/kernel": "embed_video/kernel",
    "embedding_spectrogram/bias": "embed_audio/bias",
  }
  for path, stored in zip(
    FILE["layer_decay/L24/paths"], FILE["layer_decay/L24/scale"], strict=True
  ):
    ours = table.get(str(path))
    if ours is None:
      block = str(path).split("/")[1].removeprefix("encoderblock_")
      stream = "audio" if block.endswith("_spec") else "video"
      number = int(block.removesuffix("_spec"))
      ours = f"{stream}/block_{number:02d}/mlp/fc1/kernel"
    layer = method.param_info(ours).layer
    np.testing.assert_allclose(0.75 ** (25 - layer), stored, rtol=1e-7)


# --- Heads -------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0, 0.2])
def test_two_heads_of_epic_kitchens(smoothing):
  model = {"classes": {"noun": 7, "verb": 5}}
  method = make(("verb", "noun"), label_smoothing=float(smoothing), **model)
  params = house("mbt/multihead")
  batch = inputs(
    **{
      "label/noun": np.eye(7, dtype=np.float32)[GIVEN["head_a"]],
      "label/verb": np.eye(5, dtype=np.float32)[GIVEN["head_b"]],
    }
  )
  loss, aux = step(method, params, batch)
  tag = f"mbt/multihead/loss_s{smoothing}"
  np.testing.assert_allclose(loss, FILE[tag], **golden.LOSS)
  for theirs, ours in MODALITY.items():
    np.testing.assert_allclose(
      aux["metrics"][f"loss_{ours}"],
      FILE[f"{tag}_only_{theirs}"],
      **golden.LOSS,
    )
  scores = predict(method, params, batch)
  together = np.concatenate([scores["noun"], scores["verb"]], axis=1)
  np.testing.assert_allclose(
    together, FILE["mbt/multihead/eval_logits"], **golden.FORWARD
  )
  joint = jnp.einsum(
    "bn,bv->bnv", *(jax.nn.softmax(scores[h]) for h in ("noun", "verb"))
  )
  np.testing.assert_allclose(
    joint.reshape(2, -1), FILE["mbt/multihead/joint_scores"], **golden.FORWARD
  )


def test_segments_pool_time_steps_by_overlap():
  # 8 frames in steps of 3 (the last two frames lie in no step), 4 segments.
  weights = heads.segment_weights(2, 3, span=3, length=8)
  third = 8 / 3
  expected = [[1, 0], [3 - third, 2 * third - 3], [0, 1]]
  expected = [np.array(row) / np.sum(row) for row in expected]
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  with pytest.raises(InputError, match="one of 4 segments of 8 frames"):
    heads.segment_weights(2, 4, span=3, length=8)


def test_segment_head_has_logits_per_second():
  method = make(("segment",), classes={"segment": 7}, segments=2)
  params = house("mbt/bottleneck")
  label = np.eye(7, dtype=np.float32)[[[0, 1], [2, 3]]]
  batch = mixed(**{"label/segment": label})
  found = predict(method, params, batch)["segment"]
  assert found.shape == (2, 2, 7)
  tokens = quick_jit(method.encode)(params, batch)["tokens"]
  # Video has two steps of 4 tokens; audio five of 2, the third in both.
  video = np.reshape(tokens["video"], (2, 2, 4, 32)).mean(2)
  audio = np.reshape(tokens["audio"], (2, 5, 2, 32)).mean(2)
  audio = np.stack(
    [
      (audio[:, 0] + audio[:, 1] + audio[:, 2] / 2) / 2.5,
      (audio[:, 2] / 2 + audio[:, 3] + audio[:, 4]) / 2.5,
    ],
    axis=1,
  )
  head = params["head"]
  expected = (video + audio) / 2 @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(found, expected, atol=1e-5)
  loss, _ = step(method, params, batch)
  assert np.isfinite(loss)


# --- Missing modalities ------------------------------------------------------

SHALLOW = {"depth": 2, "fusion_layer": 1, "fusion_layers": 1}
MISSING = {
  "mbt": {},
  "shared blocks": {"share_encoder": True},
  "cross": {"use_bottleneck": False},
  "cross, shared blocks": {"use_bottleneck": False, "share_encoder": True},
  "early": {"fusion": "early"},
  "mid": {"fusion": "mid"},
  "separate": {"fusion": "separate"},
}


@pytest.mark.parametrize("name", MISSING)
def test_example_without_a_modality_is_as_if_there_were_one(name):
  method = make(**SHALLOW, **MISSING[name])
  params = random_params(method)
  run = quick_jit(method.predict, static_argnames="mode")
  batch = inputs(has_audio=np.array([False, True]))
  plain = {m: run(params, inputs(), mode=m)["label"] for m in ("av", "v")}
  both = run(params, batch)["label"]
  np.testing.assert_allclose(both[0], plain["v"][0], atol=1e-6)
  np.testing.assert_allclose(both[1], plain["av"][1], atol=1e-6)
  # Whatever stands in its place.
  spoiled = batch["fbank"].at[0].set(123.0)
  again = run(params, {**batch, "fbank": spoiled})["label"]
  np.testing.assert_array_equal(both, again)
  loss, aux = step(method, params, batch)
  seen = optax.softmax_cross_entropy(
    np.stack([logits(aux, m) for m in ("video", "audio")]),
    batch["label"][None],
  )
  expected = (seen[0, 0] + seen[:, 1].mean()) / 2
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(aux["metrics"]["loss_audio"], seen[1, 1])


def test_mode_of_one_modality_needs_that_input_alone():
  method, params = make(), house("mbt/bottleneck")
  batch = inputs()
  alone = {k: v for k, v in batch.items() if k != "frames"}
  np.testing.assert_array_equal(
    predict(method, params, alone, "a")["label"],
    predict(method, params, batch, "a")["label"],
  )
  with pytest.raises(InputError, match="no 'frames' for the video stream"):
    method.predict(params, alone)
  with pytest.raises(InputError, match="mode of predict 'x'"):
    method.predict(params, alone, mode="x")


def test_embedding_is_the_mean_of_the_tokens():
  method, params = make(), house("mbt/bottleneck")
  batch = inputs(has_video=np.array([True, False]))
  found = quick_jit(method.embed)(params, batch)
  tokens = FILE["mbt/bottleneck/tokens"]
  video, audio = tokens[0, :8].mean(0), tokens[0, 8:].mean(0)
  np.testing.assert_allclose(found["video"][0], video, atol=1e-5)
  np.testing.assert_allclose(found["av"][0], (video + audio) / 2, atol=1e-5)
  np.testing.assert_array_equal(found["av"][1], found["audio"][1])


# --- The pretraining encoder as a classifier ---------------------------------


def random_params(method, seed=0):
  """Parameters like `init`'s, with no zeros that would hide a mistake."""
  shapes = jax.eval_shape(method.init, jax.random.key(0), inputs())
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    z = rng.standard_normal(leaf.shape)
    name = jax.tree_util.keystr(path)
    scale = leaf.shape[0] ** -0.5 if "kernel" in name else 0.05
    return jnp.asarray(("scale" in name) + scale * z, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("kind", ["early", "shared", "separate", "mid"])
def test_pretraining_encoder_reused(kind):
  tag = f"mae/{kind}_dshared"
  source = scenic.to_house(golden.reference_params(MAE, tag))
  method = make(fusion=kind)
  loaded = method.adapt(random_params(method), source, {})
  assert loaded.missing == ["head/bias", "head/kernel"]
  assert all(
    path.startswith(("decoder", "head_", "mask_token"))
    for path in loaded.unused
  )
  tokens = quick_jit(method.encode)(loaded.params, inputs())["tokens"]
  for theirs, ours in MODALITY.items():
    np.testing.assert_allclose(
      tokens[ours], MAE[f"{tag}/eval_enc_{theirs}"], **golden.FORWARD
    )


# --- Weight transfer ---------------------------------------------------------

STRATEGIES = {
  "concat_and_encode": "early",
  "same_encoder": "shared",
  "separate_encoders": "separate",
  "separate_encoders_and_concat": "mid",
}
TARGETS = {
  "av": "bottleneck",
  "rgb": "only_rgb",
  "spectrogram": "only_spectrogram",
}


def reference_names(params, layout, **heads):
  """House path -> reference paths, by sending numbered arrays through."""
  flat = trees.flatten(params)
  marked = {
    path: np.full(leaf.shape, i, np.float32)
    for i, (path, leaf) in enumerate(flat.items())
  }
  theirs = scenic.to_reference(trees.unflatten(marked), layout, **heads)
  names = list(flat)
  return {path: names[int(value.flat[0])] for path, value in theirs.items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("target", TARGETS)
def test_transfer_equals_the_intended_mapping(strategy, target):
  tag = f"transfer/{strategy}/{target}"
  name = TARGETS[target]
  theirs = golden.reference_params(MAE, f"mae/{STRATEGIES[strategy]}_dshared")
  source = scenic.to_house(theirs)
  initial = house(f"mbt/{name}", seed=int(FILE["transfer/target_seed"]))
  method = make(**VARIANTS[name])
  loaded = method.adapt(initial, source, {"method": "avmae"})
  ours = reference_names(initial, "mbt", heads=4)
  origin = reference_names(source, "avmae", heads=4, decoder_heads=3)
  for path, stored in zip(
    FILE[f"{tag}/target_paths"], FILE[f"{tag}/source_paths"], strict=True
  ):
    found = loaded.loaded.get(ours[str(path)])
    assert found == (None if stored == "-" else origin[str(stored)]), path
  complete(loaded, initial, source)
  assert not loaded.reshaped
  after = scenic.to_reference(loaded.params, "mbt", heads=4)
  paths = FILE[f"{tag}/target_paths"]
  np.testing.assert_allclose(
    golden.norms(after, paths), FILE[f"{tag}/param_norms"], **golden.PARAM_NORM
  )
  predicted = predict(method, loaded.params, inputs())["label"]
  np.testing.assert_allclose(
    predicted, FILE[f"{tag}/eval_logits"], **golden.FORWARD
  )


def complete(loaded, params, source):
  """Every name on both sides is accounted for, once."""
  targets, origins = set(trees.flatten(params)), set(trees.flatten(source))
  assert set(loaded.loaded) | set(loaded.missing) == targets
  assert not set(loaded.loaded) & set(loaded.missing)
  used = set(loaded.loaded.values())
  assert used | set(loaded.unused) == origins
  assert not used & set(loaded.unused)


def test_transfer_to_three_channels_repeats_the_kernel():
  theirs = golden.reference_params(MAE, "mae/mid_dshared")
  source = scenic.to_house(theirs)
  initial = house("mbt/bottleneck", seed=4321)
  initial["embed_audio"]["kernel"] = np.zeros((768, 32), np.float32)
  method = make(audio_channels=3)
  loaded = method.adapt(initial, source, {})
  assert loaded.reshaped == {"embed_audio/kernel": "1 -> 3 channels, repeated"}
  kernel = loaded.params["embed_audio"]["kernel"]
  np.testing.assert_allclose(
    np.linalg.norm(kernel), FILE["transfer/spec3ch/kernel_norm"], rtol=1e-5
  )
  predicted = predict(method, loaded.params, inputs())["label"]
  np.testing.assert_allclose(
    predicted, FILE["transfer/spec3ch/eval_logits"], **golden.FORWARD
  )
  back = make().adapt(house("mbt/bottleneck"), loaded.params, {})
  again = predict(make(), back.params, inputs())["label"]
  np.testing.assert_allclose(again, predicted, atol=1e-5)
  assert back.reshaped == {"embed_audio/kernel": "3 -> 1 channels, summed"}


@pytest.mark.parametrize(
  "theirs, other", [("rgb", "audio"), ("spectrogram", "video")]
)
def test_one_modality_starts_both_streams(theirs, other):
  source = scenic.to_house(golden.reference_params(MAE, f"mae/only_{theirs}"))
  initial = house("mbt/bottleneck", seed=4321)
  loaded = make().adapt(initial, source, {})
  assert loaded.missing == sorted(
    ["bottleneck", "head/bias", "head/kernel"]
    + [f"embed_{other}/{leaf}" for leaf in ("bias", "kernel")]
  )
  complete(loaded, initial, source)
  for stream in ("audio", "video"):
    jax.tree.map(
      np.testing.assert_array_equal,
      loaded.params[stream],
      {k: v for k, v in source["encoder"].items() if k != "norm"},
    )


def test_one_source_for_each_modality():
  source = {
    ours: scenic.to_house(golden.reference_params(MAE, f"mae/only_{theirs}"))
    for theirs, ours in MODALITY.items()
  }
  initial = house("mbt/bottleneck", seed=4321)
  loaded = make().adapt(initial, source, {"audio": {}, "video": {}})
  assert loaded.missing == [
    *("bottleneck", "head/bias", "head/kernel", "norm/bias", "norm/scale")
  ]
  assert loaded.loaded["audio/block_03/mlp/fc1/bias"] == (
    "audio/encoder/block_03/mlp/fc1/bias"
  )
  complete(loaded, initial, source)


def test_mbt_starts_from_mbt():
  source, initial = house("mbt/bottleneck"), house("mbt/bottleneck", seed=4321)
  loaded = make().adapt(initial, source, {})
  assert not loaded.missing and not loaded.unused
  initial["head"] = {"kernel": np.zeros((32, 9)), "bias": np.zeros(9)}
  loaded = make(classes={"label": 9}).adapt(initial, source, {})
  assert loaded.missing == loaded.unused == ["head/bias", "head/kernel"]
  alone = make(modality="a").adapt(house("mbt/only_spectrogram"), source, {})
  assert (
    alone.loaded["audio/block_00/norm1/bias"] == "audio/block_00/norm1/bias"
  )
  assert all(p.startswith(("embed_v", "video/")) for p in alone.unused)


def test_source_of_another_size_is_refused():
  source, initial = house("mbt/bottleneck"), house("mbt/bottleneck")
  del source["video"]["block_03"]
  with pytest.raises(InputError, match="3 blocks for video, the model 4"):
    make().adapt(initial, source, {})
  source = house("mbt/bottleneck")
  source["audio"]["block_00"]["mlp"]["fc1"]["bias"] = np.zeros(60)
  with pytest.raises(InputError, match=r"shape \(64,\), but .* has \(60,\)"):
    make().adapt(initial, source, {})
  with pytest.raises(InputError, match="no audiovisual encoder among text"):
    make().adapt(initial, {"text": {"kernel": np.zeros(3)}}, {})


# --- Full size, training, configs --------------------------------------------


@pytest.mark.parametrize(
  "size, count, fusion_layer", [("B", 171.7, 8), ("L", 606.8, 16)]
)
def test_full_size(size, count, fusion_layer):
  config = base_config()
  config.model = mbt.default_model(size, classes={"label": 309})
  method = mbt.MBT(config)
  assert method.encoder().fusion_layer == fusion_layer
  shapes = {
    "frames": jax.ShapeDtypeStruct((2, 32, 224, 224, 3), jnp.float32),
    "fbank": jax.ShapeDtypeStruct((2, 800, 128), jnp.float32),
  }
  params = jax.eval_shape(method.init, jax.random.key(0), shapes)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert round(total / 1e6, 1) == count
  out = jax.eval_shape(method.predict, params, shapes)
  assert out["label"].shape == (2, 309)


def test_initial_values():
  method = make(classifier="token", positions="learned_1d")
  params = quick_jit(method.init)(jax.random.key(0), inputs())
  stored = trees.flatten(house("mbt/original_token"))
  found = trees.flatten(params)
  assert {k: v.shape for k, v in found.items()} == {
    k: v.shape for k, v in stored.items()
  }
  for path in ("head/kernel", "cls_video", "cls_audio", "embed_audio/bias"):
    assert not np.any(found[path])
  assert 0.015 < np.std(found["bottleneck"]) < 0.025
  assert 0.015 < np.std(found["positions_video"]) < 0.025
  np.testing.assert_allclose(
    np.std(found["embed_video/kernel"]), 1536**-0.5, rtol=0.05
  )
  video, audio = (
    found[f"{m}/block_00/mlp/fc1/kernel"] for m in ("video", "audio")
  )
  assert not np.array_equal(video, audio)


def test_training_separates_random_data():
  method = make(**SHALLOW, label_smoothing=0.1, drop_path=0.1)
  rng = np.random.default_rng(0)
  label = np.arange(8) % 7
  batch = {
    "frames": rng.uniform(-1, 1, (8, 4, 32, 32, 3)).astype(np.float32),
    "fbank": rng.standard_normal((8, 80, 32)).astype(np.float32),
    "label": np.eye(7, dtype=np.float32)[label],
    "index": np.arange(8, dtype=np.uint32),
  }
  batch = jax.tree.map(jnp.asarray, batch)
  params = quick_jit(method.init)(jax.random.key(0), batch)
  optimizer = optax.adam(3e-3)

  @quick_jit
  def train(params, state, i):
    def loss(params):
      return method.loss(params, batch, jax.random.key(i), i)[0]

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  state, found = optimizer.init(params), []
  for i in range(30):
    params, state, value = train(params, state, i)
    found.append(float(value))
  assert found[0] == pytest.approx(np.log(7), rel=1e-3)
  assert found[-1] < 0.6 * found[0]


@pytest.mark.parametrize(
  "model, words",
  [
    ({"fusion": "mbtt"}, "Did you mean 'mbt'"),
    ({"classifier": "cls"}, "model.classifier 'cls'"),
    ({"fusion_layer": 5}, "fusion_layer 5 is not in 0..4"),
    ({"fusion": "mid", "classifier": "token"}, "classifier='gap', not 'token'"),
    ({"modality": "audio"}, "model.modality 'audio'"),
    ({"classes": {"labels": 3}}, "Did you mean 'labels'"),
    ({"fusion_lyer": 1}, "Did you mean 'fusion_layer'"),
  ],
)
def test_bad_config_is_refused(model, words):
  with pytest.raises(InputError, match=words):
    make(**model)
