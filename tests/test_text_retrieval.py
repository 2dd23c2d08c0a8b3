"""Text retrieval against brute force, with a tiny method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avjax import evaluators, ranking
from avjax.data import pipeline, text
from avjax.errors import InputError
from tests import captioned, runs

WORDS = (
  "bell", "dog", "drum", "clock", "wolf", "sea", "ship", "drill", "flute",
  "organ",
)  # fmt: skip


def described(rng, clips, *, most=3):
  """Up to three captions of each clip; some clips have none."""
  captions = []
  for _ in range(clips):
    count = rng.integers(0, most + 1)
    captions.append([
      f"a {rng.choice(WORDS)} and a {rng.choice(WORDS)}" for _ in range(count)
    ])  # fmt: skip
  return captions


def evaluate(
  tmp_path, captions, params, *, size=8, config=None, has=(), **more
):
  batches = list(captioned.batches(captions, size=size, **dict(has)))
  pictures = []
  made = config or captioned.config()
  context = captioned.context(made, batches, tmp_path, pictures)
  section = captioned.section("text_retrieval", **more)
  return evaluators.make(context, section).run(params, 0), pictures


def brute_force(captions, params, mode, *, top=None, add=True):
  """Scores of both ways, pair by pair."""
  tokenizer = text.tokenizer(captioned.config().data)
  clips = [k for k, texts in enumerate(captions) if texts]
  pairs = [(k, caption) for k in clips for caption in captions[k]]

  def said(caption):
    ids = tokenizer.ids(caption, captioned.LENGTH)
    return (1 + np.arange(len(ids))) @ params["words"][ids]

  def similar(k, caption):
    words = said(caption)
    return (params[mode][k] @ (words / np.linalg.norm(words))).max()

  def matched(k, caption):
    return 3 * np.tanh(params["tokens"][k].mean(axis=0) @ said(caption) / 9)

  def ranks(scores, own):
    best = max(scores[k] for k in own)
    others = [s for k, s in enumerate(scores) if k not in own]
    # Sums in another order differ in the last digits.
    above = sum(s > best + 1e-5 for s in others)
    return 1 + above + sum(abs(s - best) <= 1e-5 for s in others) / 2

  def order(k_s, caption_s):
    scores = [similar(k, c) for k, c in zip(k_s, caption_s, strict=True)]
    if top is None:
      return scores
    # Captions with the same words are one candidate.
    what = caption_s if len(set(k_s)) == 1 else k_s
    best = sorted(set(zip(scores, what, strict=True)), reverse=True)[:top]
    kept = {one for _, one in best}
    chosen = [i for i, one in enumerate(what) if one in kept]
    return [
      100 + matched(k_s[i], caption_s[i]) + add * s if i in chosen else s
      for i, s in enumerate(scores)
    ]

  forward = [
    ranks(order(clips, [caption] * len(clips)), [clips.index(k)])
    for k, caption in pairs
  ]
  texts = [caption for _, caption in pairs]
  backward = [
    ranks(
      order([k] * len(texts), texts),
      [i for i, (other, _) in enumerate(pairs) if other == k],
    )
    for k in clips
  ]
  return np.array(forward), np.array(backward)


def expected(ranks):
  none = np.zeros(len(ranks), bool)
  found = ranking.scores(ranks.astype(float), none)
  del found["tied"]
  return found


@pytest.mark.parametrize("add", [True, False])
def test_against_brute_force(tmp_path, add):
  rng = np.random.default_rng(0)
  captions = described(rng, 21)
  params = captioned.params(rng, 24)
  found, _ = evaluate(
    tmp_path, captions, params, rerank=6, rerank_add=add, match_batch=20
  )
  count = sum(map(bool, captions))
  assert found["gallery"] == count and found["left_out"] == 21 - count > 0
  assert found["queries"] == sum(map(len, captions))
  assert found["texts"] == len({c for texts in captions for c in texts})
  assert found["texts"] < found["queries"]
  assert found["reranked_clips"] == found["reranked_texts"] == 6
  for mode in ("a", "v", "av"):
    for prefix, options in (("", {}), ("reranked_", {"top": 6, "add": add})):
      ways = brute_force(captions, params, mode, **options)
      for way, ranks in zip((f"t2{mode}", f"{mode}2t"), ways, strict=True):
        for name, value in expected(ranks).items():
          got = found[f"{prefix}{way}_{name}"]
          assert got == pytest.approx(value), (prefix, way, name)
  assert found["a_sum_R"] == pytest.approx(
    sum(found[f"{way}_R{k}"] for way in ("t2a", "a2t") for k in (1, 5, 10))
  )


def test_candidates_are_at_most_all(tmp_path):
  rng = np.random.default_rng(1)
  captions = described(rng, 9)
  params = captioned.params(rng, 16)
  found, _ = evaluate(tmp_path, captions, params, modes=("av",))
  assert found["reranked_clips"] == found["gallery"]
  assert found["reranked_texts"] == found["texts"] < 128
  forward, backward = brute_force(captions, params, "av", top=128)
  assert found["reranked_t2av_R1"] == pytest.approx((forward <= 1).mean())
  assert found["reranked_av2t_R5"] == pytest.approx((backward <= 5).mean())
  assert not any("t2a_" in name or "t2v_" in name for name in found)


def test_without_a_matching_score_nothing_is_re_ranked(tmp_path):
  rng = np.random.default_rng(2)
  captions = described(rng, 9)
  params = captioned.params(rng, 16, queries=1, tokens=False)
  found, _ = evaluate(tmp_path, captions, params)
  assert "t2av_R1" in found and "gallery" in found
  assert not any(name.startswith("reranked") for name in found)
  with_tokens = {**params, "tokens": np.ones((16, 2, 4), np.float32)}
  again, _ = evaluate(tmp_path, captions, with_tokens, rerank=0)
  assert again == found


def test_clips_that_lack_a_modality_count_for_no_mode(tmp_path):
  rng = np.random.default_rng(3)
  captions = [["a bell"], ["a dog"], [], ["a drum"]]
  params = captioned.params(rng, 8)
  has = {"has_audio": [True, False, True, True]}
  found, _ = evaluate(tmp_path, captions, params, has=has)
  assert found["gallery"] == 2 and found["left_out"] == 2
  found, _ = evaluate(tmp_path, captions, params, has=has, modes=("v",))
  assert found["gallery"] == 3 and found["left_out"] == 1
  one = captioned.config(modality="v")
  found, _ = evaluate(tmp_path, captions, params, config=one)
  assert "t2v_R1" in found and "t2a_R1" not in found
  with pytest.raises(InputError, match="no clip has a caption.*4 were left"):
    evaluate(tmp_path, [[]] * 4, params)


def test_equal_embeddings_are_chance(tmp_path):
  params = captioned.params(np.random.default_rng(4), 16)
  same = {k: np.ones_like(x) / 2 for k, x in params.items() if k != "words"}
  captions = [[f"a {WORDS[k % 10]}"] for k in range(12)]
  found, _ = evaluate(tmp_path, captions, {**params, **same})
  assert found["t2av_R1"] == found["reranked_t2av_R1"] == 0
  assert found["t2av_median_rank"] == 6.5 and found["t2av_tied"] == 1
  # Two of ten words are of two clips: their captions tie in the other way.
  assert found["av2t_tied"] > 0


def test_a_batch_spread_over_devices_gives_the_same(tmp_path):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  where = NamedSharding(mesh, PartitionSpec("data"))
  rng = np.random.default_rng(5)
  captions, params = described(rng, 13), captioned.params(rng, 16)
  params = {k: jnp.asarray(x) for k, x in params.items()}
  alone, _ = evaluate(tmp_path, captions, params, match_batch=13)
  section = captioned.section("text_retrieval", match_batch=13)
  spread = [
    (jax.device_put(batch, where), ids)
    for batch, ids in captioned.batches(captions, size=8)
  ]
  context = captioned.context(captioned.config(), spread, tmp_path)
  evaluator = evaluators.make(context, section)
  found = evaluator.run(params, 0)
  assert found == pytest.approx(alone)
  assert evaluator._match._cache_size() == evaluator._step._cache_size() == 1


def test_a_mode_is_not_told_of_the_other_modality(tmp_path):
  seen = {}

  class Spy(captioned.Tables):
    def encode_media(self, params, inputs, mode):
      seen[mode] = {"frames", "fbank", "text"} & set(inputs)
      return super().encode_media(params, inputs, mode)

  rng = np.random.default_rng(6)
  [(batch, ids)] = captioned.batches([["a bell"], ["a dog"]], size=2)
  batch["fbank"] = np.zeros((2, 3, 4), np.float32)
  batch["frames"] = np.zeros((2, 1, 2, 2, 3), np.uint8)
  made = captioned.context(
    captioned.config(), [(batch, ids)], tmp_path, method=Spy
  )
  section = captioned.section("text_retrieval", rerank=0)
  evaluators.make(made, section).run(captioned.params(rng, 2), 0)
  assert seen == {"a": {"fbank"}, "v": {"frames"}, "av": {"frames", "fbank"}}


@pytest.mark.parametrize(
  "options, data, words",
  [
    ({"captions": 0}, {}, "need captions of at least 1; it is 0"),
    ({"views": 2}, {}, "views is 2, not 1"),
    ({"modes": ("av", "va")}, {}, "unknown mode of retrieval 'va'"),
    ({"modes": ("a",)}, {"modality": "v"}, "needs data.modality='a' or 'av'"),
  ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, options, data, words):
  made = captioned.context(captioned.config(**data), [], tmp_path)
  section = captioned.section("text_retrieval", **options)
  with pytest.raises(InputError, match=words):
    evaluators.make(made, section)
  other = captioned.context(
    captioned.config(), [], tmp_path, method=evaluators.base.Method
  )
  with pytest.raises(InputError, match="Method has no retrieval_modes, encode"):
    evaluators.make(other, captioned.section("text_retrieval"))


# ------------------------------------------------------ on stored clips


def on_stored(demo_data, tmp_path, **options):
  """av_demo's own captions; half of the clips are found."""
  made = runs.stage("cavmae_audioset", data__dir=demo_data)
  made.data.heads = ()
  made.data.text.update(vocabulary="av_demo", length=captioned.LENGTH)
  batches = [
    ({k: batch[k] for k in ("index", "valid", "text", "text_mask")}, [])
    for batch in pipeline.eval_batches(
      made.data, split="test", batch_size=8, captions=5
    )
  ]
  params = captioned.params(np.random.default_rng(0), 24)
  first = np.concatenate([b["text"][:, 0] for b, _ in batches])
  mask = np.concatenate([b["text_mask"][:, 0] for b, _ in batches])
  own = captioned.Tables(made).encode_text(
    jax.tree.map(jnp.asarray, params), first, mask
  )
  params["av"][::2, 0] = own[::2]
  pictures = []
  context = captioned.context(made, batches, tmp_path, pictures)
  section = captioned.section("text_retrieval", captions=5, **options)
  return evaluators.make(context, section).run(params, 7), pictures


def test_pictures_and_a_subset(demo_data, tmp_path):
  found, pictures = on_stored(
    demo_data, tmp_path, pictures=2, modes=("av",), rerank=0
  )
  assert found["gallery"] == 24 and found["queries"] > 24
  assert [name for name, _ in pictures] == [
    "test_text_t2av", "test_text_av2t",
  ]  # fmt: skip
  green = np.array([0, 158, 115])  # frames and words of what is right
  for (_, image), least in zip(pictures, (4_000, 400), strict=True):
    assert (image == green).all(axis=-1).sum() > least
    assert 0.05 < (image == 255).all(axis=-1).mean() < 0.9
  path = tmp_path / "ids"
  path.write_text("test_00001\ntest_00003\n")
  found, _ = on_stored(demo_data, tmp_path, subset=str(path))
  assert found["gallery"] == 2
