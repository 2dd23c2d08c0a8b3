"""CoAVT's two encoders, its start from others' weights and its use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config as config_lib
from avjax import initialise, methods, trees
from avjax.errors import InputError
from avjax.methods import coavt, coavt_config
from avjax.methods import coavt_objectives as objectives
from avjax.nn.bert import QueryEncoder
from tests import cavmae_golden as cavmae
from tests import qformer_golden, runs

KEY, STEP = jax.random.key(0), jnp.int32(0)
TEXT = {
  "text_width": 16, "text_depth": 1, "text_heads": 2, "text_mlp": 32,
  "queries": 3,
}  # fmt: skip
WORDS = {"vocabulary": 40, "positions": 10, "projection": 8}
VANILLA = {"modes": ("av",)}
BASELINE = {
  **VANILLA, "query_encoder": False, "objectives": ("contrast",),
}  # fmt: skip


@functools.cache
def method(**model):
  """Pretraining at sizes at which a compilation is cheap."""
  config = config_lib.base_config()
  config.method = "coavt"
  values = {**cavmae.SMALL, **TEXT, **WORDS, "dropout": 0.0, **model}
  config.model = coavt_config.default_model("B", **values)
  return methods.make(config)


@functools.cache
def classifier(**model):
  config = config_lib.base_config()
  config.method = "coavt_finetune"
  values = {**cavmae.SMALL, **TEXT, "classes": {"label": 7}, **model}
  config.model = coavt_config.finetune_model("B", **values)
  return methods.make(config)


def inputs(b=8):
  """Clips with texts of 2 to 6 words."""
  rng = np.random.default_rng(3)
  length = rng.integers(4, 7, (b, 1))
  return {
    **cavmae.small_inputs(b),
    "text": jnp.asarray(rng.integers(4, 39, (b, 6)), jnp.int32),
    "text_mask": jnp.asarray(np.arange(6) < length),
  }


@functools.cache
def params(made=None):
  made = made or method()
  shapes = jax.eval_shape(made.init, KEY, inputs())
  rng = np.random.default_rng(4)
  drawn = jax.tree.map(
    lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), shapes
  )
  drawn["query_encoder"]["temperature"] = jnp.float32(0.07)
  return drawn


@functools.cache
def gradient(made):
  """(params, inputs) -> ((loss, metrics), gradient), compiled once."""

  def loss(params, inputs):
    total, aux = made.loss(params, inputs, KEY, STEP)
    return total, aux["metrics"]

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


# --- Objective ---------------------------------------------------------------


def test_parts_of_the_loss():
  names = ("contrast", "matching", "language")
  shown = {f"{name}_{mode}" for name in names for mode in ("av", "a", "v")}
  (total, metrics), _ = gradient(method())(params(), inputs())
  np.testing.assert_allclose(total, sum(metrics[n] for n in shown), rtol=1e-6)
  assert {name for name in metrics if "accuracy" not in name} == shown | {
    "temperature"
  }


def test_loss_does_not_depend_on_the_devices():
  """Contrast and negatives are the global batch's, draws each example's."""
  (one, metrics), grads = gradient(method())(params(), inputs())
  spread = runs.over_devices(inputs())
  (eight, others), spread_grads = gradient(method())(params(), spread)
  np.testing.assert_allclose(one, eight, rtol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(value, others[name], rtol=1e-4, err_msg=name)
  for a, b in zip(*map(jax.tree.leaves, (grads, spread_grads)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_missing_counts_in_no_pair():
  """No sound: not in a and av. No text: in none. Padding: in none."""
  given = inputs()
  given["has_audio"] = jnp.arange(8) != 2
  given["text_mask"] = given["text_mask"].at[5].set(False)
  given["valid"] = jnp.arange(8) != 7
  (total, metrics), grads = gradient(method())(params(), given)
  for key, rows in (("fbank", [2, 5, 7]), ("frames", [5, 7])):
    given[key] = given[key].at[jnp.array(rows)].add(3.0)
  given["text"] = given["text"].at[jnp.array([5, 7])].set(0)
  (again, changed), _ = gradient(method())(params(), given)
  for name in metrics:
    np.testing.assert_allclose(
      metrics[name], changed[name], rtol=1e-5, err_msg=name
    )
  np.testing.assert_allclose(total, again, rtol=1e-6)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_all_texts_equal():
  """Nothing is a negative, so language modelling alone remains."""
  given = inputs()
  for key in ("text", "text_mask"):
    given[key] = jnp.broadcast_to(given[key][:1], given[key].shape)
  (total, metrics), grads = gradient(method())(params(), given)
  for mode in ("av", "a", "v"):
    assert metrics[f"matching_{mode}"] == 0
    # Of all candidates only the own one is left.
    np.testing.assert_allclose(metrics[f"contrast_{mode}"], 0, atol=1e-6)
  assert total > 1 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  "model",
  [
    {}, VANILLA, BASELINE, {"modes": ("a",)}, {"modes": ("av", "a")},
    {"objectives": ("contrast",)}, {"objectives": ("contrast", "language")},
    {"objectives": ("matching", "language")}, {"freeze_encoder": True},
  ],
)  # fmt: skip
def test_what_no_loss_reaches_is_frozen(model):
  made = method(**model)
  shapes = jax.eval_shape(made.init, KEY, inputs())
  silent = cavmae.silent_paths(made, shapes, inputs())
  assert silent == cavmae.frozen_paths(made, shapes)


def test_one_pass_serves_all_pairs():
  """The rows of each pair are those of a pass of its own."""
  made, given = method(), inputs(2)
  media = made.tokens(params(), given, ("av", "a", "v"))
  assert [x.shape[1] for x in media] == [12, 8, 4]
  feature, _ = made.feature(params(), tuple(media))
  for i, mode in enumerate(("av", "a", "v")):
    own = made.encode_media(params(), given, mode)
    np.testing.assert_allclose(feature[:, i], own["feature"], atol=1e-5)
    np.testing.assert_allclose(media[i], own["tokens"], atol=1e-5)


def test_pairs_are_those_of_passes_of_their_own(monkeypatch):
  """Its text, another text for the clip, and another clip for the text."""
  steps = iter((1, 2))  # texts are drawn first, then clips

  def drawn(logits, allowed, keys):
    del allowed, keys
    b = len(logits)
    return (jnp.arange(b) + next(steps)) % b, jnp.ones(b, bool)

  monkeypatch.setattr(coavt, "hard_negatives", drawn)
  model = {"text_depth": 2, "mask_audio": 0.0, "mask_video": 0.0}
  made, given = method(**model), inputs(4)
  drawn_params = params(made)

  @jax.jit
  def run(params):
    _, aux = made.loss(params, given, KEY, STEP)
    ids, mask = given["text"], given["text_mask"]
    expected = {}
    for mode in ("av", "a", "v"):
      (x,) = made.tokens(params, given, (mode,))
      logits = [
        made.judged(params, x, ids, mask),
        made.judged(params, x, jnp.roll(ids, -1, 0), jnp.roll(mask, -1, 0)),
        made.judged(params, jnp.roll(x, -2, 0), ids, mask),
      ]
      matched = jnp.array([[True], [False], [False]]).repeat(4, 1)
      each = objectives.matching(jnp.stack(logits), matched, "mean_logits")
      expected[f"matching_{mode}"] = each.mean()
      _, cache = made.asked(params, x)
      words = made.run(params, QueryEncoder.language, cache, ids, mask)
      expected[f"language_{mode}"] = objectives.language(words, ids, mask, 0.1)
    return aux["metrics"], expected

  metrics, expected = run(drawn_params)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_deep_scan_is_the_same():
  plain = method(text_depth=4)
  deep = method(text_depth=4, scan=True, remat="full")
  (one, metrics), grads = gradient(plain)(params(plain), inputs(2))
  (two, others), theirs = gradient(deep)(params(plain), inputs(2))
  np.testing.assert_allclose(one, two, rtol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(value, others[name], rtol=1e-4, err_msg=name)
  for a, b in zip(*map(jax.tree.leaves, (grads, theirs)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_masks_keep_what_the_ratios_say():
  ids = method().draw(inputs(), KEY)
  assert {m: x.shape for m, x in ids.items()} == {
    "audio": (8, 2), "video": (8, 2),
  }  # fmt: skip
  again = method().draw({k: v[::-1] for k, v in inputs().items()}, KEY)
  assert all(np.array_equal(ids[m], again[m][::-1]) for m in ids)
  assert method(mask_audio=0.0, mask_video=0.0).draw(inputs(), KEY) == {}


# --- Use ---------------------------------------------------------------------


def test_captions_word_by_word_are_those_of_one_pass():
  made, given = method(), inputs(2)
  ids, mask = given["text"][:, :4], jnp.ones((2, 4), bool)
  (tokens,) = made.tokens(params(), given, ("av",))
  _, cache = made.asked(params(), tokens)
  whole = made.run(params(), QueryEncoder.language, cache, ids, mask)
  found, state = made.caption_start(params(), tokens, 4)
  assert all(x.shape[0] == 2 for x in jax.tree.leaves((found, state)))
  step = jax.jit(made.caption_step)
  for position in range(4):
    token = ids[:, position] if position else jnp.full(2, 39)
    logits, state = step(params(), found, state, token, position)
    np.testing.assert_allclose(logits, whole[:, position], atol=1e-4)


def test_matching_score_is_the_mean_logit():
  made, given = method(), inputs(2)
  (tokens,) = made.tokens(params(), given, ("a",))
  ids, mask = given["text"], given["text_mask"]
  score = made.match(params(), tokens, ids, mask)
  logits = made.judged(params(), tokens, ids, mask)
  assert logits.shape == (2, 3, 2)
  np.testing.assert_allclose(score, logits[..., 1].mean(1), rtol=1e-6)


def test_embeddings():
  made, given = method(), inputs(2)
  found = made.embed(params(), given)
  assert {k: v.shape[1] for k, v in found.items()} == {
    "audio": 16, "video": 16, "av": 16, "text": 8,
  }  # fmt: skip
  alone = made.embed(params(), {"fbank": given["fbank"]})
  np.testing.assert_allclose(alone["audio"], found["audio"], atol=1e-5)
  assert set(alone) == {"audio"}
  several = {k: given[k][:, None] for k in ("text", "text_mask")}
  again = made.embed(params(), {**given, **several})["text"]
  np.testing.assert_allclose(again, found["text"], atol=1e-6)
  np.testing.assert_allclose(jnp.square(again).sum(1), 1, rtol=1e-5)


def test_baseline_compares_means():
  made, given = method(**BASELINE), inputs(2)
  own = params(made)
  found = made.encode_media(own, given, "v")
  assert set(found) == {"feature"} and found["feature"].shape == (2, 1, 8)
  paths = trees.flatten(own)
  assert not any("/cross/" in p or "/language/" in p for p in paths)
  assert made.embed(own, given)["audio"].shape == (2, 16)


def test_modes_of_clips():
  assert method().retrieval_modes == ("a", "v", "av")
  config = method().config.copy_and_resolve_references()
  config.data.modality = "a"
  assert methods.make(config).retrieval_modes == ("a",)


# --- Classification ----------------------------------------------------------


def test_classifier_reads_the_mean_of_the_queries():
  made, given = classifier(dropout=0.0), inputs(3)
  own = params(made)
  assert made.modes == ("av", "a", "v")
  assert own["query_encoder"]["positions"].shape == (1, 16)
  means = made.embed(own, given)
  layer = own["classifier"]
  for mode, name in (("av", "av"), ("a", "audio"), ("v", "video")):
    logits = made.predict(own, given, mode=mode)["label"]
    expected = means[name] @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
  lacking = {**given, "has_audio": jnp.array([True, False, True])}
  mixed = made.predict(own, lacking)["label"]
  pictures = made.predict(own, given, mode="v")["label"]
  np.testing.assert_allclose(mixed[1], pictures[1], atol=1e-5)
  both = made.embed(own, lacking)["av"]
  np.testing.assert_array_equal(both[1], means["video"][1])
  np.testing.assert_array_equal(both[::2], means["av"][::2])


def test_micro_batches_drop_differently():
  """The key of a step is one for all of them."""
  for dropout in (0.5, 0.0):
    made, given = classifier(dropout=dropout), inputs(3)
    run = jax.jit(lambda p, x, m=made: m.loss(p, x, KEY, STEP)[0])
    later = {**given, "index": given["index"] + 3}
    first, again, other = (
      float(run(params(made), x)) for x in (given, given, later)
    )
    assert first == again
    assert (first == other) == (not dropout)


@pytest.mark.parametrize("modality", ["av", "a", "v"])
def test_what_the_classifier_does_not_reach_is_frozen(modality):
  made = classifier(modality=modality)
  shapes = jax.eval_shape(made.init, KEY, inputs())
  silent = cavmae.silent_paths(made, shapes, inputs())
  assert silent == cavmae.frozen_paths(made, shapes)
  assert made.group("classifier/kernel") == "head"


# --- Optimiser ---------------------------------------------------------------


@pytest.mark.parametrize(
  "path, layer, group, decay",
  [
    ("embed_audio/kernel", 0, "default", True),
    ("positions_audio", 0, "frozen", True),
    ("encoder_joint/block_00/norm1/scale", 2, "default", False),
    ("query_encoder/words/embedding", 3, "query_encoder", True),
    ("query_encoder/queries", 3, "query_encoder", True),
    ("query_encoder/temperature", 3, "temperature", False),
    ("query_encoder/block_00/cross/kv/bias", 3, "query_encoder", False),
  ],
)
def test_layers_groups_and_decay(path, layer, group, decay):
  info = method().param_info(path)
  assert (info.layer, info.group, info.decay) == (layer, group, decay)


# --- Start -------------------------------------------------------------------


def test_starts_from_cavmae_and_bert():
  """The audio-visual encoder is CAV-MAE's, text and queries BERT's."""
  made = cavmae.pretraining(**cavmae.SMALL, **cavmae.SMALL_DECODER, scan=False)
  media = jax.tree.map(
    lambda x: np.full(x.shape, 2.0), jax.eval_shape(made.init, KEY, inputs())
  )
  text = qformer_golden.params("coavt")
  sizes = {
    "text_width": 32, "text_depth": 3, "text_heads": 4, "text_mlp": 64,
    "vocabulary": 61, "queries": 7, "projection": 16,
  }  # fmt: skip
  target = method(**sizes)
  fresh = params(target)
  loaded = target.adapt(
    fresh, {"av": media, "text": text}, {"av": {}, "text": {}}
  )
  for path, value in trees.flatten(loaded.params).items():
    if not path.startswith("query_encoder"):
      assert (value == 2).all() and loaded.loaded[path] == f"av/{path}"
  words = loaded.params["query_encoder"]["words"]["embedding"]
  assert np.array_equal(words[:60], text["words"]["embedding"])
  # Fewer queries, and another encoder's width.
  assert set(loaded.missing) == {
    "query_encoder/queries",
    *(f"query_encoder/block_0{i}/cross/kv/kernel" for i in range(3)),
  }
  assert "av/mask_token" in loaded.unused
  assert loaded.reshaped["query_encoder/words/embedding"]


def test_starts_from_one_of_the_two():
  fresh = params()
  encoder = {k: v for k, v in fresh.items() if k != "query_encoder"}
  loaded = method().adapt(fresh, encoder, {"method": "cavmae"})
  told = {path.split("/")[0] for path in loaded.missing}
  assert told == {"query_encoder"} and len(loaded.loaded) > 30
  loaded = method().adapt(fresh, fresh["query_encoder"], {"method": "bert"})
  assert not any(p.startswith("query_encoder") for p in loaded.missing)
  assert not loaded.unused


def test_classifier_starts_from_pretraining():
  loaded = classifier().adapt(params(classifier()), params(), {})
  assert set(loaded.missing) == {"classifier/kernel", "classifier/bias"}
  assert "query_encoder/words/embedding" in loaded.unused
  again = method().adapt(params(), params(), {})
  assert not again.missing and not again.unused


def test_sources_by_part():
  parse = initialise.parse
  assert parse("av:a,text:b/c.bin") == {"av": "a", "text": "b/c.bin"}
  with pytest.raises(InputError, match="names text alone; give .*av:PATH"):
    parse("text:b")
  with pytest.raises(InputError, match="names audio, text alone"):
    parse("audio:a,text:b")


# --- What is refused ---------------------------------------------------------


@pytest.mark.parametrize(
  "model, words",
  [
    ({"modes": ()}, r"model.modes=\(\): one or more of av, a, v"),
    ({"modes": ("a", "a")}, "each once"),
    ({"modes": ("va",)}, "model.modes"),
    ({"objectives": ("match",)}, "Did you mean 'matching'"),
    ({"matching_loss": "mean"}, "model.matching_loss"),
    ({"equal_texts": "none"}, "model.equal_texts"),
    ({"query_encoder": False}, "there is nothing but"),
    ({"queries": 0}, "model.queries=0: at least 1"),
    ({"text_heads": 3}, "model.text_width 16 .* model.text_heads 3"),
    ({"scan": True, "cross_every": 2}, "cross_every=2"),
  ],
)
def test_impossible_models_are_refused(model, words):
  with pytest.raises(InputError, match=words):
    method(**model)


def test_inputs_without_text_are_refused():
  given = {k: v for k, v in inputs().items() if "text" not in k}
  with pytest.raises(InputError, match="set data.text.vocabulary"):
    jax.eval_shape(method().loss, params(), given, KEY, STEP)
