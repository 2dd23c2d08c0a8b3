"""Files of weights: every format there and back; what must be refused."""

import argparse
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from flax import serialization

from avjax.errors import InputError
from avjax.weights import families, formats
from tests import golden, public_weights

ARRAYS = {
  "blocks.0/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
  "half": np.array([1.5, -2], np.float16),
  "brain": np.array([[1.5], [-2]], ml_dtypes.bfloat16),
  "count": np.array(3, np.int64),
}


class Harmful:
  """Runs code where pickle reads it."""

  def __reduce__(self):
    return (sys.exit, ("code of the file ran",))


def save_torch(path, tree, **options):
  torch.save(tree, path, **options)
  return path


def assert_same(found, wanted):
  assert set(found) == set(wanted)
  for name, value in wanted.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value, strict=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_written_files_are_read_as_they_were(suffix, tmp_path):
  path = tmp_path / f"x{suffix}"
  formats.write(path, ARRAYS, {"origin": "test"})
  assert_same(formats.read(path), ARRAYS)
  words = {} if suffix == ".pth" else {"origin": "test"}
  assert formats.metadata(path).items() >= words.items()
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_failed_writing_leaves_the_old_file_whole(
  suffix, tmp_path, monkeypatch
):
  path = tmp_path / f"x{suffix}"
  formats.write(path, ARRAYS)

  def breaks(file, arrays, words):
    file.write_bytes(b"half a file")
    raise OSError("no space left")

  monkeypatch.setitem(formats.WRITERS, suffix, breaks)
  with pytest.raises(OSError, match="no space"):
    formats.write(path, {"other": np.ones(2)})
  assert_same(formats.read(path), ARRAYS)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
  "wrap",
  [
    lambda state: state,
    lambda state: {"model": state, "epoch": 3},
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
  ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_are_unwrapped(wrap, zipped, tmp_path):
  state = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2)}
  path = save_torch(
    tmp_path / "x.pt", wrap(state), _use_new_zipfile_serialization=zipped
  )
  found = formats.read(path)
  np.testing.assert_array_equal(found["a.weight"], [[0, 3], [1, 4], [2, 5]])
  assert set(found) == {"a.weight", "b"}


@pytest.mark.parametrize("name", ["checkpoint", "x.msgpack", "x.flax"])
def test_flax_files_are_read_with_or_without_a_suffix(name, tmp_path):
  tree = {"optimizer": {"target": {"a": {"b": np.ones(3)}}}, "step": 1}
  path = tmp_path / name
  path.write_bytes(serialization.msgpack_serialize(tree))
  assert_same(formats.read(path), {"a/b": np.ones(3)})


def test_files_without_a_suffix_are_told_by_their_bytes(tmp_path):
  torch_file = save_torch(tmp_path / "one", {"a": torch.ones(2)})
  assert set(formats.read(torch_file)) == {"a"}
  with (tmp_path / "two").open("wb") as file:
    np.savez(file, b=np.ones(2))
  assert set(formats.read(tmp_path / "two")) == {"b"}


@pytest.mark.parametrize(
  "tree, words",
  [
    ({"a": Harmful()}, "sys.exit"),
    ({"model": {}, "args": argparse.Namespace(x=1)}, "argparse.Namespace"),
    ({"a": 3}, "'a' is of type int, not a tensor"),
    ([torch.ones(2)], "holds list, not named tensors"),
    ({}, "holds no arrays"),
  ],
)
def test_pytorch_files_with_objects_are_refused(tree, words, tmp_path):
  path = save_torch(tmp_path / "x.pth", tree)
  with pytest.raises(InputError, match=words) as error:
    formats.read(path)
  assert str(path) in str(error.value)


def test_pickles_are_refused_in_every_guise(tmp_path):
  for name in ("x.pth", "x.npz", "x"):
    (tmp_path / name).write_bytes(pickle.dumps({"a": Harmful()}, protocol=2))
    with pytest.raises(InputError, match=name):
      formats.read(tmp_path / name)
  np.savez(tmp_path / "y.npz", a=np.array([Harmful()], object))
  with pytest.raises(InputError, match="which only pickle could read"):
    formats.read(tmp_path / "y.npz")
  np.savez(tmp_path / "z.npz", a=np.array(["text"]))
  with pytest.raises(InputError, match="'a' is <U4, not numbers"):
    formats.read(tmp_path / "z.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".msgpack"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_files_cut_short_are_refused(suffix, share, tmp_path):
  path = tmp_path / f"x{suffix}"
  if suffix == ".msgpack":
    path.write_bytes(serialization.msgpack_serialize({"a": np.ones(99)}))
  else:
    formats.write(path, ARRAYS)
  data = path.read_bytes()
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(InputError, match=f"x{suffix}"):
    formats.read(path)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_flipped_bits_are_noticed(suffix, tmp_path):
  path = tmp_path / f"x{suffix}"
  formats.write(path, ARRAYS)
  data = bytearray(path.read_bytes())
  data[data.index(ARRAYS["blocks.0/kernel"].tobytes()) + 4] ^= 1
  path.write_bytes(data)
  with pytest.raises(InputError, match="damaged"):
    formats.read(path)


def test_absent_files_and_unknown_suffixes_are_refused(tmp_path):
  with pytest.raises(InputError, match="no weights file .*absent"):
    formats.read(tmp_path / "absent.pth")
  with pytest.raises(InputError, match="Known: .npz, .pth, .safetensors"):
    formats.write(tmp_path / "x.h5", ARRAYS)


def test_pytorch_is_named_where_it_is_missing(tmp_path, monkeypatch):
  path = save_torch(tmp_path / "x.pth", {"a": torch.ones(2)})
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(InputError, match="extra `torch`"):
    formats.read(path)


# --- Families ----------------------------------------------------------------

MAE_FILE = golden.load("avmae_tiny.npz")
MBT_FILE = golden.load("avmae_tiny_mbt.npz")
TIMM = public_weights.vit_torch()
FILES = {
  "cavmae": public_weights.draw(public_weights.cavmae_shapes(depth=1)),
  "mae": public_weights.mae(),
  "mae encoder": public_weights.mae(decoder=None),
  "vit": public_weights.vit_npz(TIMM),
  "vit timm": TIMM,
  "avmae": golden.reference_params(MAE_FILE, "mae/mid_dshared"),
  "mbt": golden.reference_params(MBT_FILE, "mbt/bottleneck"),
  "mbt_original": golden.reference_params(MBT_FILE, "mbt/original_token"),
}


@pytest.mark.parametrize("name", FILES)
def test_families_are_told_by_their_names(name, tmp_path):
  state, family = FILES[name], name.split()[0]
  assert families.recognise(state, "x") == family
  assert all(map(families.FAMILIES[family].knows, state)) or "vit" in name
  formats.write(tmp_path / "x.npz", state)
  weights = families.load(tmp_path / "x.npz")
  assert weights.family == family and len(weights.names) == len(state)
  assert families.load(tmp_path / "x.npz", family).family == family


def test_foreign_names_are_refused_with_the_nearest():
  state = {
    "encoder.blocks.0.attn.qkv.weight": np.ones(3),
    "norm.bias": np.ones(3),
  }
  with pytest.raises(InputError) as error:
    families.recognise(state, "video.pth")
  words = str(error.value)
  assert "video.pth is of no family" in words
  assert "knows 1 of its 2 names" in words
  assert "'encoder.blocks.0.attn.qkv.weight' is most like" in words
  with pytest.raises(InputError, match="as 'mbt'"):
    families.recognise(TIMM, "x", "mbt")
  with pytest.raises(InputError, match="Did you mean 'cavmae'"):
    families.recognise(TIMM, "x", "cavmea")


def test_wrong_keys_and_shapes_name_the_file(tmp_path):
  state = dict(FILES["cavmae"])
  state["patch_embed_a.proj.wieght"] = state.pop("patch_embed_a.proj.weight")
  formats.write(tmp_path / "x.npz", state)
  with pytest.raises(
    InputError, match="x.npz: .*nearest: 'patch_embed_a.proj.w"
  ):
    families.load(tmp_path / "x.npz")
  state = {**FILES["cavmae"], "norm_a.weight": np.ones(31, np.float32)}
  formats.write(tmp_path / "x.npz", state)
  with pytest.raises(InputError, match=r"'norm_a.weight' has shape \(31,\)"):
    families.load(tmp_path / "x.npz")
