"""Weights of the Audio Spectrogram Transformer as a start."""

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

from avjax import config as config_lib
from avjax import methods, trees
from avjax.errors import InputError
from avjax.methods import avsiam_config
from avjax.weights import ast, families, formats, image, vit
from tests import public_weights
from tests.test_weights_mae_vit import started, torch_vit

D = 32


def made(grid=(12, 101), depth=2):
  """AST's own names; the classifiers of DeiT are in its files, too."""
  state = public_weights.vit_torch(D, depth)
  n = grid[0] * grid[1]
  more = {
    "pos_embed": (1, n + 2, D), "dist_token": (1, 1, D),
    "patch_embed.proj.weight": (D, 1, 16, 16), "head_dist.bias": (5,),
  }  # fmt: skip
  state |= public_weights.draw(more, seed=7)
  named = {f"module.v.{name}": x for name, x in state.items()}
  head = {f"module.mlp_head.{i}.bias": (k,) for i, k in ((0, D), (1, 5))}
  return named | public_weights.draw(head)


def transformers(state):
  """`made` under the names of the library, written out by hand."""
  prefix, found = "audio_spectrogram_transformer.", {}
  renamed = (
    ("cls_token", "embeddings.cls_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.", "encoder.layer."), ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"), ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"), ("attn.proj", "attention.output.dense"),
  )  # fmt: skip
  for name, x in state.items():
    short = name.removeprefix("module.").removeprefix("v.")
    if short.startswith("mlp_head"):
      part = {"0": "layernorm", "1": "dense"}[short[9]]
      found[f"classifier.{part}.bias"] = x
    elif "attn.qkv" in short:
      _, block, *_, leaf = short.split(".")
      parts = zip(("query", "key", "value"), np.split(x, 3), strict=True)
      for part, value in parts:
        inner = f"encoder.layer.{block}.attention.attention.{part}.{leaf}"
        found[prefix + inner] = value
    elif not short.startswith("head"):
      for old, new in renamed:
        short = short.replace(old, new)
      short = (
        short.replace("norm.", "layernorm.") if short[:5] == "norm." else short
      )
      found[prefix + short] = x
  return found


# --- Names and layouts -------------------------------------------------------


def test_both_namings_give_one_tree():
  state = made()
  tree = trees.flatten(ast.to_image(state))
  known = {n: x for n, x in tree.items() if not n.startswith("unused/")}
  other = trees.flatten(ast.to_image(transformers(state)))
  for name, x in known.items():
    np.testing.assert_array_equal(other[name], x, strict=True, err_msg=name)
  expected = set(trees.flatten(vit.to_image(public_weights.vit_torch(D))))
  assert set(known) == {n for n in expected if not n.startswith("unused/")}
  table = state["module.v.pos_embed"][0]
  np.testing.assert_array_equal(tree["cls_position"], table[0])
  np.testing.assert_array_equal(tree["positions"][3, 7], table[2 + 3 * 101 + 7])
  assert {n for n in tree if n not in known} == {
    *(f"unused/{n}" for n in ("dist_token", "dist_position", "head.weight")),
    *(f"unused/{n}.bias" for n in ("head", "head_dist", "mlp_head.0")),
    "unused/mlp_head.1.bias",
  }


@pytest.mark.parametrize("names", [made, lambda: transformers(made())])
def test_family_is_told_by_the_names(names, tmp_path):
  state = names()
  assert all(map(families.FAMILIES["ast"].knows, state))
  formats.write(tmp_path / "x.safetensors", state)
  weights = families.load(tmp_path / "x.safetensors")
  assert (weights.family, weights.method) == ("ast", image.METHOD)
  with pytest.raises(InputError, match="2 blocks of width 32.*give --config"):
    families.config_of(weights)


def test_grids_are_those_of_public_files():
  for grid in ((12, 101), (10, 85), (9, 73), (8, 64), (12, 50), (12, 12)):
    assert ast.GRIDS[grid[0] * grid[1]] == grid
  assert len(ast.GRIDS) == len(ast.STRIDES) * len(ast.FRAMES)


@pytest.mark.parametrize(
  "name, shape, words",
  [
    ("pos_embed", (1, 1213, D), r"1213 positions .*12x101"),
    ("pos_embed", None, "no 'pos_embed'"),
    ("patch_embed.proj.weight", (D, 1, 128, 2), r"\(1, 128, 2\).*\(1, 16, 16"),
  ],
)
def test_weights_of_other_shapes_are_refused(name, shape, words):
  state = made()
  del state[f"module.v.{name}"]
  if shape:
    state[f"module.v.{name}"] = np.zeros(shape, np.float32)
  with pytest.raises(InputError, match=words):
    ast.to_image(state)


# --- AVSiam ------------------------------------------------------------------


def avsiam(frames=1_024):
  config = config_lib.base_config()
  config.method = "avsiam"
  sizes = {"width": D, "depth": 2, "heads": 2, "mlp": 4 * D}
  sizes |= {"decoder_width": D, "decoder_depth": 1, "decoder_heads": 2}
  config.model = avsiam_config.default_model("B", **sizes)
  inputs = {
    "fbank": jax.ShapeDtypeStruct((6, frames, 128), np.float32),
    "frames": jax.ShapeDtypeStruct((6, 1, 224, 224, 3), np.float32),
  }
  method = methods.make(config)
  shapes = jax.eval_shape(method.init, jax.random.key(0), inputs)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  return config, method, zeros


def test_sound_computes_what_ast_does():
  """AST of stride 16, without its two tokens: the mean over patches."""
  state = made((8, 64))
  config, method, params = avsiam()
  loaded = image.start(params, ast.to_image(state), config)
  rng = np.random.default_rng(0)
  fbank = rng.standard_normal((2, 1_024, 128)).astype(np.float32)
  frames = np.zeros((2, 1, 224, 224, 3), np.float32)
  found = jax.jit(method.embed)(
    loaded.params, {"fbank": fbank, "frames": frames}
  )
  theirs = {n.removeprefix("module.v."): x for n, x in state.items()}
  spectrogram = torch.from_numpy(fbank.swapaxes(1, 2)[:, None].copy())
  tokens = torch_vit(theirs, spectrogram, extra=2, gelu="none")
  mean = tokens.mean(1)
  mean /= np.linalg.norm(mean, axis=1, keepdims=True)
  np.testing.assert_allclose(found["audio"], mean, atol=2e-6)


def test_everything_that_is_left_has_a_reason():
  config, _, params = avsiam()
  loaded = image.start(params, ast.to_image(made()), config)
  fresh = ("decoder", "mask_token", "head_")
  assert all(name.startswith(fresh) for name in loaded.missing)
  left = {n for n in loaded.unused if not n.startswith("unused/")}
  assert left == {"cls", "cls_position"}
  assert "embed_audio/kernel" not in loaded.reshaped
  assert loaded.reshaped["positions_audio"] == "12x101 -> 8x64"
  assert "a third each" in loaded.reshaped["embed_video/kernel"]


def test_grey_pictures_are_seen_as_spectrograms():
  config, _, params = avsiam()
  state = made()
  params = image.start(params, ast.to_image(state), config).params
  public = state["module.v.patch_embed.proj.weight"][:, 0].transpose(1, 2, 0)
  audio = params["embed_audio"]["kernel"].reshape(16, 16, D)  # mel, time
  np.testing.assert_array_equal(audio, public)
  video = params["embed_video"]["kernel"].reshape(16, 16, 3, D)
  np.testing.assert_allclose(video.sum(2), public, rtol=1e-6, atol=1e-9)
  for colour in range(3):
    np.testing.assert_array_equal(video[:, :, colour], video[:, :, 0])


@pytest.mark.parametrize("frames", [1_024, 512])
def test_positions_keep_their_mel_bin_and_time(frames):
  """Where a position lies in AST's grid is what it holds."""
  state, (rows, columns) = made(), (8, frames // 16)
  mel, time = np.meshgrid(np.arange(12), np.arange(101), indexing="ij")
  table = state["module.v.pos_embed"]
  table[0, 2:, 0], table[0, 2:, 1] = mel.reshape(-1), time.reshape(-1)
  config, _, params = avsiam(frames)
  params = image.start(params, ast.to_image(state), config).params
  sound = params["positions_audio"].reshape(rows, columns, D)
  first, last = np.arange(8) * 11 / 7, np.arange(columns) * 100 / (columns - 1)
  np.testing.assert_allclose(
    sound[..., 0].T, np.tile(first, (columns, 1)), 1e-5
  )
  np.testing.assert_allclose(sound[..., 1], np.tile(last, (rows, 1)), 1e-5)
  grid = torch.from_numpy(table[:, 2:].reshape(1, 12, 101, D))
  expected = functional.interpolate(
    grid.permute(0, 3, 1, 2), (14, 14), mode="bilinear", align_corners=False
  )
  expected = expected[0].permute(1, 2, 0).reshape(196, D)
  picture = params["positions_video"]
  np.testing.assert_allclose(picture, expected, rtol=1e-5, atol=1e-5)


# --- Other models ------------------------------------------------------------


def test_time_comes_first_in_mbt():
  state = made()
  sources = {
    "audio": ast.to_image(state),
    "video": vit.to_image(public_weights.vit_torch(D)),
  }
  config = {"positions": "learned_1d", "time": 1_616}
  params = started("mbt", sources, mels=192, **config).params
  public = state["module.v.patch_embed.proj.weight"][:, 0].transpose(2, 1, 0)
  kernel = params["embed_audio"]["kernel"].reshape(16, 16, D)  # time, mel
  np.testing.assert_array_equal(kernel, public)
  table = state["module.v.pos_embed"][0, 2:].reshape(12, 101, D)
  sound = params["positions_audio"].reshape(101, 12, D)
  np.testing.assert_array_equal(sound, table.swapaxes(0, 1))


def test_cavmae_takes_positions_of_sound_for_sound_alone():
  picture = vit.to_image(public_weights.vit_torch(D))
  sources = {"audio": ast.to_image(made((8, 64))), "video": picture}
  for name in ("cavmae", "cavmae_finetune"):
    loaded = started(name, sources, time=1_024)
    sound, source = loaded.params["positions_audio"], sources["audio"]
    np.testing.assert_array_equal(sound, source["positions"].reshape(512, D))
    alone = started(name, picture, time=1_024)
    assert "positions_audio" in alone.missing
