"""The query encoder against BLIP-2's, and its own promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import trees
from avjax.errors import InputError
from avjax.nn import bert, bert_block, sizes
from tests import qformer_golden as made

LAYOUT = "coavt"


def apply(module, params, method, *args, **options):
  return module.apply({"params": params}, *args, method=method, **options)


def cross_entropy(logits, labels, smoothing=0.0):
  """PyTorch's: the smoothed part is spread over all classes."""
  log = jax.nn.log_softmax(logits)
  hit = jnp.take_along_axis(log, labels[..., None], -1)[..., 0]
  return -(1 - smoothing) * hit - smoothing * log.mean(-1)


def losses(module, params, enc, ids, mask):
  """Everything the golden file has of one model, losses among it."""
  call = functools.partial(apply, module, params)
  out, cache = call("query", enc)
  text = call("text", ids, mask)
  found = {"query_out": out, "lm_query_out": out, "text_out": text}
  found["itc_q"] = call("project", "query", out)
  found["itc_t"] = call("project", "text", text[:, 0])
  found |= contrast(found["itc_q"], found["itc_t"], params["temperature"])
  found |= match(call, enc, ids, mask)
  found |= language(call("language", cache, ids, mask), ids, mask)
  terms = ("itc_loss_smooth0.1", "itm_loss", "lm_loss_smooth0.1")
  return found | {"total_loss": sum(found[name] for name in terms)}


def contrast(q, t, temperature):
  """Similarity of the best query, both directions (equations 2 and 3)."""
  sim = jnp.einsum("iqp,jp->iqj", q, t).max(1)
  own, eye = jnp.arange(len(sim)), jnp.eye(len(sim), dtype=bool)
  found = {"itc_sim_x2t": sim}
  for smoothing in (0, 0.1):
    both = [
      cross_entropy(s / temperature, own, smoothing) for s in (sim, sim.T)
    ]
    found[f"itc_loss_smooth{smoothing}"] = jnp.mean(jnp.stack(both))
  away = [jnp.where(eye, -jnp.inf, s / temperature) for s in (sim, sim.T)]
  names = ("neg_prob_text_for_x", "neg_prob_x_for_text")
  return found | dict(zip(names, map(jax.nn.softmax, away), strict=True))


def match(call, enc, ids, mask):
  """Pairs, then other media for each text, then other texts."""
  b = len(ids)
  x = jnp.concatenate([jnp.arange(b), (jnp.arange(b) + 1) % b, jnp.arange(b)])
  t = jnp.concatenate([jnp.arange(b), jnp.arange(b), (jnp.arange(b) + 2) % b])
  rows = call("joint", enc[x], ids[t], mask[t])
  out = rows[:, : rows.shape[1] - ids.shape[1]]
  logits = call("matching", out)
  label = jnp.where(jnp.arange(3 * b) < b, 1, 0)
  each = cross_entropy(logits, jnp.broadcast_to(label[:, None], out.shape[:2]))
  likely = jax.nn.softmax(logits).mean(1)[jnp.arange(3 * b), label]
  return {
    "itm_query_out": out[:b],
    "itm_text_out": rows[:b, out.shape[1] :],
    "itm_logits_per_query": logits,
    "itm_logits": logits.mean(1),
    "itm_loss": cross_entropy(logits.mean(1), label).mean(),
    "itm_loss_each_query": each.mean(),
    "itm_loss_mean_probability": -jnp.log(likely).mean(),
  }


def language(logits, ids, mask):
  """The next word, pads left out."""
  found, kept = {"lm_logits": logits}, mask[:, 1:]
  for smoothing in (0, 0.1):
    each = cross_entropy(logits[:, :-1], ids[:, 1:], smoothing)
    mean = jnp.where(kept, each, 0).sum() / kept.sum()
    found[f"lm_loss_smooth{smoothing}"] = mean
  return found


# Neither changes a number; the other tests have neither.
COMPILED = {
  "coavt": {"scan": True, "remat": "full"},
  "blip2": {"remat": "dots"},
}


@functools.cache
def outputs(layout):
  """Values and gradients of a layout, as numpy."""
  with jax.enable_x64(True):
    options = COMPILED[layout]
    module, inputs = made.module(layout, **options), made.inputs()
    params = jax.tree.map(jnp.float64, made.params(layout))
    convert = bert_block.stacked if module.scan else dict
    check_shapes(module, convert(params), inputs)
    length = inputs[0].shape[1]
    enc_mask = jnp.arange(length) < jnp.array([[length], [7], [11], [11]])

    def total(params):
      params = convert(params)
      found = losses(module, params, *inputs)
      masked, _ = apply(module, params, "query", inputs[0], enc_mask)
      return found["total_loss"], found | {"query_out_encmask": masked}

    grad = jax.jit(jax.grad(total, has_aux=True))
    grads, found = grad(params)
    return jax.tree.map(np.asarray, (found, grads))


def check_shapes(module, params, inputs):
  own = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  told = jax.tree.map(lambda x: x.shape, params)
  assert told == jax.tree.map(lambda x: x.shape, own)


NOT_HERE = ("greedy_ids", "keys", "shapes", "weight_sums", "grad_norms",
            "grad_word_embeddings")  # fmt: skip


@pytest.mark.parametrize("layout", made.LAYOUTS)
def test_every_pass_is_the_public_one(layout):
  found, _ = outputs(layout)
  names = [
    key.removeprefix(f"{layout}/")
    for key in made.file()
    if key.startswith(f"{layout}/") and "_hidden_" not in key
  ]
  assert set(names) - set(NOT_HERE) == set(found)
  for name in set(names) - set(NOT_HERE):
    cosine = name.startswith("itc_sim")
    np.testing.assert_allclose(
      found[name],
      made.file()[f"{layout}/{name}"],
      err_msg=name,
      **(made.COSINES if cosine else made.VALUES),
    )


@pytest.mark.parametrize("layout", made.LAYOUTS)
def test_gradients_are_the_public_ones(layout):
  _, grads = outputs(layout)
  del grads["temperature"]  # not in the file
  named = made.by_public_name(grads, layout)
  expected = made.file()[f"{layout}/grad_norms"]
  norms = [np.linalg.norm(x) for x in named.values()]
  # A key's bias has no gradient but rounding.
  np.testing.assert_allclose(norms, expected, **made.GRAD_NORM)
  np.testing.assert_allclose(
    named["embeddings.word_embeddings.weight"],
    made.file()[f"{layout}/grad_word_embeddings"],
    **made.VALUES,
  )


def test_every_layer_is_the_public_one():
  def kept(module, _):
    return isinstance(module, bert.Block) or module.name == "norm"

  with jax.enable_x64(True):
    module, (enc, ids, mask) = made.module(LAYOUT), made.inputs()
    params = jax.tree.map(jnp.asarray, made.params(LAYOUT))
    calls = {
      "query_hidden_{}_mean": ("query", (enc,), lambda x: x.mean(-2)),
      "text_hidden_{}_cls": ("text", (ids, mask), lambda x: x[..., 0, :]),
    }
    for name, (method, args, reduce) in calls.items():
      run = functools.partial(
        module.apply,
        {"params": params},
        method=method,
        capture_intermediates=kept,
        mutable="intermediates",
      )
      _, caught = jax.jit(run)(*args)
      caught = caught["intermediates"]
      layers = [caught["norm"]["__call__"][0]]
      layers += [caught[f"block_{i:02d}"]["__call__"][0][0] for i in range(3)]
      for i, x in enumerate(layers):
        expected = made.file()[f"{LAYOUT}/{name.format(i)}"]
        x = np.broadcast_to(reduce(x), expected.shape)
        np.testing.assert_allclose(x, expected, **made.VALUES)


# --- Its own promises --------------------------------------------------------


@functools.cache
def small(**options):
  """A golden model in float32, its parameters and inputs."""
  params = jax.tree.map(jnp.float32, made.params(LAYOUT))
  module = made.module(LAYOUT, jnp.float32, **options)
  params = bert_block.stacked(params) if module.scan else params
  return module, params, made.inputs("f4")


@pytest.mark.parametrize("layout", made.LAYOUTS)
def test_words_by_steps_are_the_public_ones(layout):
  module, (enc, _, _) = made.module(layout, jnp.float32), made.inputs("f4")
  params = jax.tree.map(jnp.float32, made.params(layout))
  expected = made.file()[f"{layout}/greedy_ids"]
  _, cache = jax.jit(functools.partial(apply, module, params, "query"))(enc)
  text_cache = module.empty(len(enc), expected.shape[1])
  step = jax.jit(functools.partial(apply, module, params, "step"))
  token, words = jnp.full(len(enc), module.vocabulary - 1), []
  for position in range(expected.shape[1]):
    words.append(token)
    logits, text_cache = step(cache, text_cache, token, position)
    token = logits.argmax(-1)
  np.testing.assert_array_equal(jnp.stack(words, 1), expected)
  # The same logits as all at once.
  ids = jnp.asarray(expected).at[:, 0].set(5)  # [DEC] stands there anyway
  mask = jnp.ones(ids.shape, bool)
  whole = jax.jit(functools.partial(apply, module, params, "language"))
  np.testing.assert_allclose(
    logits, whole(cache, ids, mask)[:, -1], **made.FLOAT32
  )


@pytest.mark.parametrize("layout", made.LAYOUTS)
def test_what_pairs_share_is_computed_once_with_the_same_result(layout):
  scan = {"scan": True} if layout == "coavt" else {}
  module = made.module(layout, jnp.float32, **scan)
  params = jax.tree.map(jnp.float32, made.params(layout))
  params = bert_block.stacked(params) if scan else params
  enc, ids, mask = made.inputs("f4")
  more = enc[:, :5] * 0.5
  # Two pairs of each clip with `enc`, the second with the next text; one with
  # `more`.
  texts = jnp.stack([jnp.arange(4), (jnp.arange(4) + 1) % 4, jnp.arange(4)], 1)
  texts = texts.reshape(-1)

  @jax.jit
  def run():
    call = functools.partial(apply, module, params)
    seen = call("cross_cache", enc).beside(call("cross_cache", more))
    found = call(
      "match", seen, ids, mask, pairs_each=(2, 1), expand=lambda x: x[texts]
    )
    alone = [call("match", x, ids[texts], mask[texts]) for x in (
      jnp.repeat(enc, 3, axis=0), jnp.repeat(more, 3, axis=0)
    )]  # fmt: skip
    expected = jnp.where((jnp.arange(12) % 3 < 2)[:, None, None], *alone)
    out, cache = call("query", (enc, more))
    words = call("language", cache, ids, mask, repeats=2)
    twice = [jnp.repeat(x, 2, axis=0) for x in (ids, mask)]
    pairs = [(found, expected), (words, call("language", cache, *twice))]
    pairs += [(call("first", ids, mask), call("text", ids, mask)[:, 0])]
    # As many pairs as texts, with other texts.
    moved = call("match", enc, ids, mask, expand=lambda x: x[::-1])
    pairs += [(moved, call("match", enc, ids[::-1], mask[::-1]))]
    return [*pairs, (call("query", seen)[0], out)]

  for found, expected in run():
    np.testing.assert_allclose(found, expected, **made.FLOAT32)


def test_dropout_draws_anew_and_trains_only():
  module, params, (enc, ids, mask) = small(scan=True)

  @functools.partial(jax.jit, static_argnames="train")
  def run(seed, train=False):
    rngs = {"dropout": jax.random.key(seed)}
    call = functools.partial(apply, module, params, rngs=rngs, train=train)
    out, cache = call("query", enc)
    rows = [out, call("text", ids, mask), call("match", enc, ids, mask)]
    return [*rows, call("language", cache, ids, mask)]

  same, other = run(1, train=True), run(2, train=True)
  for a, b, again, still, x in zip(
    same, other, run(1, train=True), run(1), run(2), strict=True
  ):
    assert np.abs(a - b).max() > 1e-2
    np.testing.assert_array_equal(a, again)
    np.testing.assert_array_equal(still, x)


def test_a_text_without_words_stays_finite():
  module, params, (enc, ids, mask) = small(scan=True)
  mask = mask.at[0].set(False)

  def total(params):
    out, cache = apply(module, params, "query", enc)
    parts = [apply(module, params, "match", enc, ids, mask)]
    parts += [apply(module, params, "language", cache, ids, mask)]
    parts += [apply(module, params, "text", ids, mask)]
    return sum(jnp.sum(x**2) for x in parts)

  for x in jax.tree.leaves(jax.jit(jax.grad(total))(params)):
    assert np.isfinite(x).all()


def test_pads_and_later_words_are_not_seen():
  module, params, (enc, ids, mask) = small()

  @jax.jit
  def run(ids, mask):
    _, cache = apply(module, params, "query", enc)
    out = apply(module, params, "match", enc, ids, mask)
    return out, apply(module, params, "language", cache, ids, mask)

  before, logits = run(ids, mask)
  # In float32 and without a scan, too, they are the public ones.
  for name, x in (("itm_query_out", before), ("lm_logits", logits)):
    expected = made.file()[f"{LAYOUT}/{name}"]
    np.testing.assert_allclose(x, expected, **made.FLOAT32)
  after, _ = run(jnp.where(mask, ids, 7), mask)
  np.testing.assert_array_equal(before, after)
  _, changed = run(ids.at[:, 3].set(9), mask)
  np.testing.assert_array_equal(logits[:, :3], changed[:, :3])
  assert np.abs(logits[:, 3] - changed[:, 3]).max() > 1e-3


def test_half_precision_gives_logits_in_float32():
  module, params, (enc, ids, mask) = small()
  module = module.clone(dtype=jnp.bfloat16)
  shapes = jax.eval_shape(
    lambda *x: module.apply({"params": params}, *x), enc, ids, mask
  )
  assert {str(x.dtype) for x in jax.tree.leaves(shapes)} == {"float32"}
  out, _ = jax.jit(functools.partial(apply, module, params, "query"))(enc)
  assert out.dtype == jnp.bfloat16
  close = made.file()[f"{LAYOUT}/query_out"]
  np.testing.assert_allclose(out.astype("f4"), close, rtol=0, atol=0.15)


FULL_SIZE = {"coavt": 138.3e6, "blip2": 180.8e6}


@pytest.mark.parametrize("layout", made.LAYOUTS)
def test_the_number_of_parameters_at_full_size(layout):
  module = made.module(layout, jnp.float32).clone(
    size=sizes.SIZES["B"], vocabulary=30_523, positions=512, projection=256
  )
  module = module.clone(queries={"coavt": 16, "blip2": 32}[layout])
  enc = jax.ShapeDtypeStruct((1, 4, 768), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 4), bool)
  shapes = jax.eval_shape(module.init, jax.random.key(0), enc, ids, mask)
  flat = trees.flatten(shapes["params"])
  count = sum(int(np.prod(x.shape)) for x in flat.values())
  assert abs(count - FULL_SIZE[layout]) < 0.05e6
  assert flat["temperature"].shape == ()
  cross = sum("cross/query/kernel" in path for path in flat)
  assert cross == {"coavt": 12, "blip2": 6}[layout]


def test_first_values_are_berts_and_as_loud_when_narrow():
  for width, expected in ((768, 0.02), (48, 0.08)):
    draw = bert_block.first_values(width)
    x = draw(jax.random.key(0), (width, 4 * width))
    np.testing.assert_allclose(x.std(), expected, rtol=0.02)
    y = x[:, :width]
    # What two matrices in a row, values and `out`, add to a row of variance 1.
    gain = np.linalg.norm(y @ x[:, width : 2 * width]) / width**0.5
    np.testing.assert_allclose(gain, 768 * 0.02**2, rtol=0.05)


def test_mistakes_are_named():
  module, params, (enc, ids, mask) = small()
  long = jnp.zeros((4, 17), jnp.int32)
  with pytest.raises(InputError, match="17 words has no place in 16 positions"):
    apply(module, params, "text", long, jnp.ones((4, 17), bool))
  with pytest.raises(InputError, match=r"4 texts for 12 pairs of \(2, 1\)"):
    apply(module, params, "match", (enc, enc), ids, mask, pairs_each=(2, 1))
  with pytest.raises(InputError, match="one enc_mask for 2 arrays"):
    apply(module, params, "query", (enc, enc), jnp.ones((4, 11), bool))
  module = module.clone(scan=True, cross_every=2)
  with pytest.raises(InputError, match="cross_every is 2"):
    jax.eval_shape(module.init, jax.random.key(0), enc, ids, mask)
