"""MAE and ViT weights as a start for audiovisual models."""

import pathlib

import jax
import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn import functional

from avjax import config as config_lib
from avjax import initialise, methods, trees
from avjax.errors import InputError
from avjax.methods import avmae_config, cavmae_config, mbt
from avjax.nn.av_encoder import INPUTS
from avjax.weights import cavmae, image, mae, vit
from tests import public_weights

SIZE = {"width": 32, "depth": 2, "heads": 2, "mlp": 128}
DECODER = {
  "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 3,
  "decoder_mlp": 96,
}  # fmt: skip
MODELS = {
  "avmae": lambda **more: avmae_config.default_model(
    "B", **SIZE, **DECODER, **{"fusion_layers": 1, **more}
  ),
  "mbt": lambda **more: mbt.default_model(
    "B", **SIZE, fusion_layer=1, classes={"label": 7}, **more
  ),
  "cavmae": lambda **more: cavmae_config.default_model(
    "B", **SIZE, **DECODER, **more
  ),
  "cavmae_finetune": lambda **more: cavmae_config.finetune_model(
    "B", **SIZE, classes={"label": 7}, **more
  ),
}


def build(name, frames=4, time=64, mels=128, side=224, **model):
  """Config, method and the shapes of its parameters."""
  config = config_lib.base_config()
  config.method, config.model = name, MODELS[name](**model)
  config.data.fbank.num_mels, config.data.video.size = mels, side
  method = methods.make(config)
  frames = 1 if name.startswith("cavmae") else frames
  inputs = {
    "fbank": jax.ShapeDtypeStruct((2, time, mels), np.float32),
    "frames": jax.ShapeDtypeStruct((2, frames, side, side, 3), np.float32),
  }
  return config, method, jax.eval_shape(method.init, jax.random.key(0), inputs)


def started(name, tree, **options):
  config, _, shapes = build(name, **options)
  return image.start(shapes, tree, config)


# --- Names and layouts -------------------------------------------------------


def test_both_namings_of_a_vit_give_one_tree():
  torch_names = public_weights.vit_torch()
  ours = trees.flatten(vit.to_image(torch_names))
  npz = trees.flatten(vit.to_image(public_weights.vit_npz(torch_names)))
  known = {name for name in ours if not name.startswith("unused/")}
  assert known == {name for name in npz if not name.startswith("unused/")}
  for name in known:
    np.testing.assert_array_equal(ours[name], npz[name], strict=True)
  assert "unused/head/kernel" in npz and "unused/head.weight" in ours


def test_query_without_its_key_is_refused():
  state = public_weights.vit_npz(public_weights.vit_torch())
  del state[
    "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"
  ]
  with pytest.raises(InputError, match="but not .*_1/key/bias"):
    vit.to_image(state)


def test_positions_of_no_square_are_refused():
  state = public_weights.vit_torch()
  state["pos_embed"] = state["pos_embed"][:, :100]
  with pytest.raises(InputError, match="100 positions are no square|99"):
    vit.to_image({**state, "pos_embed": state["pos_embed"][:, :99]})


def torch_vit(state, x, heads=2, extra=1, gelu="tanh"):
  """The ViT itself, without the `extra` tokens; GELU as in our AV-MAE."""
  t = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
  patch = (t["patch_embed.proj.weight"], t["patch_embed.proj.bias"])
  x = functional.conv2d(x, *patch, stride=16).flatten(2).transpose(1, 2)
  x = x + t["pos_embed"][:, extra:]

  def norm(x, name):
    weights = (t[f"{name}.weight"], t[f"{name}.bias"])
    return functional.layer_norm(x, x.shape[-1:], *weights, 1e-6)

  def linear(x, name):
    return functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

  for i in range(2):
    p = f"blocks.{i}."
    b, n, d = x.shape
    qkv = linear(norm(x, f"{p}norm1"), f"{p}attn.qkv")
    q, k, v = qkv.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(q, k, v)
    x = x + linear(y.transpose(1, 2).reshape(b, n, d), f"{p}attn.proj")
    y = linear(norm(x, f"{p}norm2"), f"{p}mlp.fc1")
    y = functional.gelu(y, approximate=gelu)
    x = x + linear(y, f"{p}mlp.fc2")
  return norm(x, "norm").numpy()


@pytest.mark.parametrize("modality", ["v", "a"])
def test_one_modality_computes_what_the_vit_does(modality):
  """A still clip as an image, a spectrogram as a grey one."""
  state = public_weights.vit_torch()
  rng = np.random.default_rng(0)
  shape = (2, 64, 64, 3 if modality == "v" else 1)
  x = np.broadcast_to(rng.standard_normal(shape), (2, 64, 64, 3))
  x = x.astype(np.float32)
  options = {"modality": modality, "positions": "learned_1d"}
  config, method, shapes = build(
    "avmae", frames=2, time=64, mels=64, side=64, **options
  )
  tree = vit.to_image(state)
  first = tree["positions"].reshape(-1, 32)[:16]
  tree["positions"] = first.reshape(4, 4, 32)
  loaded = image.start(shapes, tree, config)
  state["pos_embed"] = state["pos_embed"][:, :17]
  inputs = {
    "frames": np.stack([x, x], axis=1),
    "fbank": x[..., 0],
  }
  key = {"v": "frames", "a": "fbank"}[modality]
  tokens = jax.jit(method.encode)(
    {k: v for k, v in loaded.params.items() if "decoder" not in k
     and not k.startswith(("head", "mask"))},
    {key: inputs[key]},
  )  # fmt: skip
  (found,) = tokens.values()
  expected = torch_vit(state, torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
  np.testing.assert_allclose(found, expected, atol=2e-5)


# --- Where it goes -----------------------------------------------------------


def public_script(state):
  """§5.3: MAE's state dict as CAV-MAE's, written out by hand."""
  made, last = {}, "blocks.1."
  for name, x in state.items():
    if name.startswith("blocks.0."):
      for m in "av":
        made[name.replace("blocks.", f"blocks_{m}.")] = x
    elif name.startswith(last):
      leaf = name.removeprefix(last)
      made[f"blocks_u.0.{leaf}"] = x
      if leaf.startswith("norm"):
        norm, part = leaf.split(".")
        for m in "av":
          made[f"blocks_u.0.{norm}_{m}.{part}"] = x
    elif name.startswith("norm."):
      for norm in ("norm", "norm_a", "norm_v"):
        made[name.replace("norm", norm)] = x
    elif name.startswith("decoder_pred."):
      made[name.replace("pred", "pred_v")] = x
      made[name.replace("pred", "pred_a")] = x[:256]
    elif name == "decoder_pos_embed":
      made["decoder_pos_embed_v"] = x[:, 1:]
    elif name.startswith(("decoder_", "mask_token")):
      made[name] = x
  kernel = state["patch_embed.proj.weight"]
  made["patch_embed_v.proj.weight"] = kernel
  made["patch_embed_a.proj.weight"] = kernel.sum(1, keepdims=True)
  for m in "av":
    made[f"patch_embed_{m}.proj.bias"] = state["patch_embed.proj.bias"]
  made["pos_embed_v"] = state["pos_embed"][:, 1:]
  return made


FRESH = {
  *("modality_token_audio", "modality_token_video", "positions_audio"),
  *("decoder_modality_token_audio", "decoder_modality_token_video"),
  "decoder_positions_audio",
}


def test_cavmae_starts_from_mae_as_the_public_script_has_it():
  state = public_weights.mae()
  loaded = started("cavmae", mae.to_image(state), time=1024)
  expected, _ = cavmae.to_house(public_script(state))
  expected, found = trees.flatten(expected), trees.flatten(loaded.params)
  assert set(loaded.loaded) == set(expected)
  assert set(loaded.missing) == FRESH
  assert set(loaded.unused) == {"cls", "cls_position"}
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_cavmae_without_a_decoder_keeps_its_own():
  tree = mae.to_image(public_weights.mae(decoder=None))
  loaded = started("cavmae", tree)
  decoder = ("decoder", "mask_token", "head_", "modality_", "positions_audio")
  assert all(name.startswith(decoder) for name in loaded.missing)
  classifier = started("cavmae_finetune", tree)
  own = ("classifier/", "modality_", "positions_audio")
  assert all(name.startswith(own) for name in classifier.missing)


def test_cavmae_resizes_positions_for_another_picture():
  loaded = started("cavmae", mae.to_image(public_weights.mae()), side=112)
  assert "14 x 14 -> 7 x 7" in loaded.reshaped["positions_video"]


@pytest.mark.parametrize("encoder", ["mid", "early", "separate"])
def test_avmae_takes_the_encoder_alone(encoder):
  tree = mae.to_image(public_weights.mae())
  loaded = started("avmae", tree, encoder=encoder)
  for name in loaded.loaded:
    assert name.startswith(("embed_", "encoder"))
  # LayerNorms before the joint blocks have no origin.
  inner = [n for n in loaded.missing if n.startswith("encoder")]
  assert bool(inner) == (encoder == "mid")
  flat = trees.flatten(loaded.params)
  for stack, layer in {
    "mid": [("encoder_audio/block_00", 0), ("encoder_joint/block_00", 1)],
    "early": [("encoder/block_01", 1)],
    "separate": [("encoder_audio/block_01", 1), ("encoder_video/block_00", 0)],
  }[encoder]:
    source = tree["encoder"][f"block_{layer:02d}"]["attention"]["qkv"]["kernel"]
    found = flat[f"{stack}/attention/qkv/kernel"]
    np.testing.assert_array_equal(found, source)


def test_tubelets_get_the_kernel_in_the_centre_frame():
  state = public_weights.vit_torch()
  loaded = started("mbt", vit.to_image(state))
  kernel = loaded.params["embed_video"]["kernel"].reshape(2, 16, 16, 3, 32)
  public = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(kernel[1], public)
  assert not kernel[0].any()
  sound = loaded.params["embed_audio"]["kernel"].reshape(16, 16, 32)
  np.testing.assert_array_equal(sound, public.sum(2))
  assert set(loaded.missing) == {"bottleneck", "head/kernel", "head/bias"}


def test_a_spectrogram_thrice_takes_the_kernel_as_it_is():
  state = public_weights.vit_torch()
  loaded = started("mbt", vit.to_image(state), audio_channels=3)
  public = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
  sound = loaded.params["embed_audio"]["kernel"]
  np.testing.assert_array_equal(sound, public.reshape(-1, 32))


def test_learned_positions_go_by_the_public_rule():
  """Bilinear with fixed corners; the CLS's row first; repeated over time."""
  state = public_weights.vit_torch()
  loaded = started(
    "mbt", vit.to_image(state), time=160, side=64, classifier="token",
    positions="learned_1d",
  )  # fmt: skip
  rows = state["pos_embed"][0]
  grid = rows[1:].reshape(14, 14, 32)
  zoom = scipy.ndimage.zoom(grid, (10 / 14, 8 / 14, 1), order=1)
  sound = loaded.params["positions_audio"]
  np.testing.assert_allclose(sound[1:], zoom.reshape(-1, 32), atol=1e-6)
  zoom = scipy.ndimage.zoom(grid, (4 / 14, 4 / 14, 1), order=1)
  frames = loaded.params["positions_video"]
  tiled = np.tile(zoom.reshape(-1, 32), (2, 1))
  np.testing.assert_allclose(frames[1:], tiled, atol=1e-6)
  bottleneck = loaded.params["bottleneck"]
  corners = grid[[0, 0, -1, -1], [0, -1, 0, -1]]
  np.testing.assert_allclose(bottleneck[1:], corners, atol=1e-6)
  for table in (sound, frames, bottleneck):
    np.testing.assert_array_equal(table[0], rows[0])
  np.testing.assert_array_equal(
    loaded.params["cls_video"], state["cls_token"][0, 0]
  )
  assert "cls_audio" in loaded.missing  # as in the public code


def test_two_image_models_start_a_stream_each():
  first, second = public_weights.vit_torch(), public_weights.mae(decoder=None)
  second = {name: value + 1 for name, value in second.items()}
  sources = {"audio": vit.to_image(first), "video": mae.to_image(second)}
  params = started("mbt", sources).params
  for m, state in (("audio", first), ("video", second)):
    kernel = state["blocks.1.attn.qkv.weight"].T
    found = params[m]["block_01"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(found, kernel)


@pytest.mark.parametrize(
  "sizes, words",
  [
    ({"depth": 3}, "3 blocks of width 32, the model 2 of width 32"),
    ({"d": 48}, "2 blocks of width 48, the model 2 of width 32"),
  ],
)
def test_other_sizes_are_refused_with_both_numbers(sizes, words):
  tree = vit.to_image(public_weights.vit_torch(**sizes))
  with pytest.raises(InputError, match=words):
    started("mbt", tree)


def test_other_patches_are_refused():
  with pytest.raises(InputError, match=r"'embed_audio/kernel' .*\(16, 16, 3"):
    tree = vit.to_image(public_weights.vit_torch())
    started("mbt", tree, patch_audio=(16, 32))


def test_sound_is_turned_between_cavmae_and_mbt():
  """Patches and tokens are mel first in the one, time first in the other."""
  config, method, shapes = build(
    "mbt", time=96, positions="learned_1d", patch_video=(1, 16, 16)
  )
  _, _, source = build("cavmae_finetune", time=96)
  rng = np.random.default_rng(0)
  source = jax.tree.map(lambda x: rng.standard_normal(x.shape), source)
  place = pathlib.Path("run")
  part = initialise.Source(source, {"method": "cavmae_finetune"}, 0, place)
  loaded = initialise.adapt(method, shapes, {"": part})
  theirs = source["embed_audio"]["kernel"].reshape(16, 16, 32)
  ours = loaded.params["embed_audio"]["kernel"].reshape(16, 16, 32)
  assert config.model.patch_audio == (16, 16)
  np.testing.assert_array_equal(ours, np.float32(theirs.swapaxes(0, 1)))
  theirs = source["positions_audio"].reshape(8, 6, 32)
  ours = loaded.params["positions_audio"].reshape(6, 8, 32)
  np.testing.assert_array_equal(ours, np.float32(theirs.swapaxes(0, 1)))
  both = {m: initialise.Source(source, part.config, 0, place) for m in INPUTS}
  again = initialise.adapt(method, shapes, both).params
  np.testing.assert_array_equal(
    again["embed_audio"]["kernel"], loaded.params["embed_audio"]["kernel"]
  )
