"""Names and layouts of the public AV-MAE and MBT weights."""

import numpy as np
import pytest
from flax import serialization, traverse_util

from avjax.errors import InputError
from avjax.weights import scenic
from tests import golden


def tags(file, folder):
  ending = "/param_paths"
  names = [key[: -len(ending)] for key in file if key.endswith(ending)]
  return [name for name in names if name.startswith(folder)]


MAE, MBT = golden.load("avmae_tiny.npz"), golden.load("avmae_tiny_mbt.npz")
MODELS = [(MAE, tag) for tag in tags(MAE, "mae/")] + [
  (MBT, tag) for tag in tags(MBT, "mbt/")
]


def layout(tag):
  if tag.startswith("mae/"):
    return "avmae"
  return "mbt_original" if "original" in tag else "mbt"


@pytest.mark.parametrize("file, tag", MODELS, ids=[tag for _, tag in MODELS])
def test_every_public_tree_goes_there_and_back(file, tag):
  theirs = golden.reference_params(file, tag)
  assert scenic.layout_of(theirs) == layout(tag)
  ours = scenic.to_house(theirs)
  again = scenic.to_reference(ours, layout(tag), heads=4, decoder_heads=3)
  assert set(again) == set(theirs)
  for path, value in theirs.items():
    np.testing.assert_array_equal(again[path], value, strict=True)


def test_house_names_and_shapes_of_a_mid_fusion_tree():
  ours = scenic.to_house(golden.reference_params(MAE, "mae/mid_dshared"))
  flat = traverse_util.flatten_dict(ours, sep="/")
  assert set(ours) == {
    *("embed_audio", "embed_video", "encoder_audio", "encoder_video"),
    *("encoder_joint", "decoder_project_audio", "decoder_project_video"),
    *("mask_token_audio", "mask_token_video", "decoder"),
    *("head_audio", "head_video"),
  }
  shapes = {
    "embed_video/kernel": (1536, 32),
    "embed_audio/kernel": (256, 32),
    "encoder_joint/block_01/attention/qkv/kernel": (32, 96),
    "encoder_joint/block_01/attention/qkv/bias": (96,),
    "encoder_video/block_00/attention/out/kernel": (32, 32),
    "encoder_video/norm/scale": (32,),
    "decoder/block_01/mlp/fc1/kernel": (24, 48),
    "mask_token_audio": (24,),
    "head_video/bias": (1536,),
  }
  assert {path: flat[path].shape for path in shapes} == shapes


def test_qkv_is_query_then_key_then_value_heads_in_order():
  theirs = golden.reference_params(MAE, "mae/mid_dshared")
  block = "Transformer_rgb/encoderblock_1/MultiHeadDotProductAttention_0"
  ours = scenic.to_house(theirs)["encoder_video"]["block_01"]["attention"]
  np.testing.assert_array_equal(
    ours["qkv"]["kernel"][:, 32 + 8 : 32 + 16],
    theirs[f"{block}/key/kernel"][:, 1],
  )
  np.testing.assert_array_equal(
    ours["qkv"]["bias"][64:72], theirs[f"{block}/value/bias"][0]
  )


@pytest.mark.parametrize(
  "tag, stacks",
  [
    ("mbt/bottleneck", {"video", "audio"}),
    ("mbt/bottleneck_shared_encoder", {"shared"}),
    ("mbt/only_rgb", {"video"}),
    ("mbt/only_spectrogram", {"audio"}),
    ("mbt/original_token", {"video", "audio"}),
  ],
)
def test_streams_of_mbt(tag, stacks):
  ours = scenic.to_house(golden.reference_params(MBT, tag))
  assert set(ours) & {"video", "audio", "shared"} == stacks


def test_audio_only_of_the_original_project_has_its_own_names():
  flat = {
    path.replace("encoderblock_0", "encoderblock_0_spectrogram"): value
    for path, value in golden.reference_params(
      MBT, "mbt/only_spectrogram"
    ).items()
    if "encoderblock" not in path or "encoderblock_0/" in path
  }
  for leaf in ("kernel", "bias"):
    old = f"ProjectionHeadAndClassifier_0/output_projection/{leaf}"
    flat[f"output_projection/{leaf}"] = flat.pop(old)
  flat["cls"] = np.zeros((1, 1, 32), np.float32)
  assert scenic.layout_of(flat) == "mbt_original"
  ours = scenic.to_house(flat)
  assert set(ours["audio"]) == {"block_00"}
  assert ours["cls_audio"].shape == (32,)


def test_learned_positions_are_told_apart_by_width():
  theirs = golden.reference_params(MAE, "mae/early_dshared")
  wide, narrow = np.ones((1, 8, 32)), np.ones((1, 10, 24))
  theirs["posembed_input_rgb/pos_embedding"] = wide
  theirs["posembed_input_spectrogram/pos_embedding"] = narrow
  ours = scenic.to_house(theirs)
  assert ours["positions_video"].shape == (8, 32)
  assert ours["decoder_positions_audio"].shape == (10, 24)


def test_unknown_names_are_refused_with_the_nearest():
  theirs = golden.reference_params(MAE, "mae/mid_dshared")
  theirs["embedding_rbg/kernel"] = theirs.pop("embedding_rgb/kernel")
  with pytest.raises(InputError, match="nearest: 'embedding_rgb/kernel'"):
    scenic.to_house(theirs)
  with pytest.raises(InputError, match="Did you mean 'avmae'"):
    scenic.to_house(theirs, layout="avmea")


def test_query_without_its_key_is_refused():
  theirs = golden.reference_params(MBT, "mbt/only_rgb")
  lost = next(path for path in theirs if path.endswith("key/bias"))
  del theirs[lost]
  with pytest.raises(InputError, match="but not .*attention/key/bias"):
    scenic.to_house(theirs)


def test_house_name_without_a_place_is_refused():
  with pytest.raises(InputError, match="no name for 'mask_token_audio'"):
    scenic.to_reference({"mask_token_audio": np.ones(3)}, "mbt", heads=4)
  with pytest.raises(InputError, match="decoder_heads is 0"):
    scenic.to_reference(
      {"decoder": {"norm": {"bias": np.ones(3)}}}, "avmae", heads=4
    )


@pytest.mark.parametrize(
  "wrap",
  [
    lambda tree: {"optimizer": {"target": {"params": tree}, "state": {}}},
    lambda tree: {"optimizer": {"target": tree}, "global_step": 3},
    lambda tree: {"params": tree, "opt_state": {"0": {}}, "global_step": 3},
    lambda tree: tree,
  ],
)
def test_checkpoint_layouts_are_read_from_a_file(wrap, tmp_path):
  flat = golden.reference_params(MBT, "mbt/only_rgb")
  nested = traverse_util.unflatten_dict(flat, sep="/")
  file = tmp_path / "checkpoint"
  file.write_bytes(serialization.msgpack_serialize(wrap(nested)))
  ours = scenic.to_house(scenic.read_msgpack(file))
  np.testing.assert_array_equal(ours["bottleneck"], flat["bottleneck"][0])


@pytest.mark.parametrize("data", [b"", b"\x93abc", b"PK\x03\x04 not msgpack"])
def test_file_that_is_no_checkpoint_is_refused(data, tmp_path):
  file = tmp_path / "checkpoint"
  file.write_bytes(data)
  with pytest.raises(InputError, match="checkpoint"):
    scenic.read_msgpack(file)
  with pytest.raises(InputError, match="no weights file"):
    scenic.read_msgpack(tmp_path / "absent")
