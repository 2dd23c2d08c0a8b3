"""Weights in and out: public files, folders and files of ours."""

import functools
import importlib
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import avjax
from avjax import config as config_lib
from avjax import convert, evaluate, initialise, methods, trees
from avjax.errors import InputError
from avjax.methods import avmae_config, cavmae_config, mbt
from avjax.nn.positions import sincos_2d
from avjax.weights import class_lists, families, formats, image
from tests import golden, public_weights, runs

# --- Files and configs -------------------------------------------------------

GOLDEN = golden.load("cavmae_tiny.npz")
TABLES = {f"{name}_{m}": GOLDEN[f"{name}_{m}_sample"]
          for name in ("pos_embed", "decoder_pos_embed")
          for m in "av"}  # fmt: skip
SMALL = {"width": 32, "heads": 4, "mlp": 128}
DECODER = {
  "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4,
  "decoder_mlp": 128,
}  # fmt: skip


@functools.cache
def recipe(classes=0):
  """The golden file's weights under the public keys."""
  return public_weights.cavmae(TABLES, classes=classes)


def config_of(method, model, frames=1024, **data):
  """A config at the sizes of the files."""
  config = config_lib.base_config()
  config.method, config.model, config.total_steps = method, model, 1
  config.data.update(variant="frames10", heads=("label",), **data)
  config.data.video.update(num_frames=1, stride=1)
  config.data.audio.seconds = 10.255
  config.data.fbank.update(edges="snip", frames=frames)
  return config


def pretraining(**options):
  model = cavmae_config.default_model("B", **SMALL, **DECODER)
  return config_of("cavmae", model, **options)


def finetuning(classes=7, **options):
  model = cavmae_config.finetune_model("B", classes={"label": classes}, **SMALL)
  return config_of("cavmae_finetune", model, **options)


def save(path, state, prefix="module."):
  """A PyTorch file with DataParallel's names."""
  tensors = {prefix + k: torch.from_numpy(v.copy()) for k, v in state.items()}
  torch.save(tensors, path)
  return path


def assert_same(found, wanted):
  assert set(found) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, name, strict=True)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """The recipe as a public file, and converted to a folder."""
  place = tmp_path_factory.mktemp("pretrained")
  file = save(place / "audio_model.25.pth", recipe())
  report = convert.convert(file, place / "run", config=pretraining())
  return file, place / "run", report


# --- There and back ----------------------------------------------------------


def test_a_public_file_gives_the_golden_losses(pretrained):
  _, folder, report = pretrained
  assert not report.missing and not report.unused and not report.misshaped
  assert len(report.aside) == 8 * (11 + 11 + 2)
  source = initialise.read(folder)
  method = methods.make(config_lib.from_plain(source.config))
  rng = np.random.default_rng(77)
  inputs = {
    "fbank": rng.standard_normal((3, 1024, 128)),
    "frames": rng.standard_normal((3, 3, 224, 224)).transpose(0, 2, 3, 1),
    "noise/audio": rng.uniform(size=(3, 512)),
    "noise/video": rng.uniform(size=(3, 196)),
  }
  inputs["frames"] = inputs["frames"][:, None]
  inputs = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
  loss, aux = jax.jit(method.loss)(
    source.params, inputs, jax.random.key(0), jnp.int32(0)
  )
  found = [loss, aux["metrics"]["loss_audio"], aux["metrics"]["loss_video"]]
  wanted = GOLDEN["np1_losses"][[0, 2, 3]]
  np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_public_names_come_back_bit_for_bit(suffix, pretrained, tmp_path):
  """File -> folder -> public file, unused LayerNorms too."""
  out = tmp_path / f"x{suffix}"
  convert.convert(pretrained[1], out, layout="public")
  assert_same(formats.read(out), formats.read(pretrained[0]) if suffix == ".pth"
              else {f"module.{k}": v for k, v in recipe().items()})  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_files_of_ours_keep_numbers_and_types(suffix, kind, tmp_path):
  state = {name: x.astype(kind) for name, x in recipe(7).items()}
  formats.write(tmp_path / "a.safetensors", state)
  ours = tmp_path / f"b{suffix}"
  report = convert.convert(tmp_path / "a.safetensors", ours)
  assert "classifier/out/bias" in report.loaded and not report.unused
  back = tmp_path / "c.npz"
  convert.convert(ours, back, layout="public")
  assert_same(formats.read(back), {f"module.{k}": v for k, v in state.items()})


def test_folder_holds_what_a_run_holds(pretrained):
  _, folder, report = pretrained
  names = {p.name for p in folder.iterdir()}
  assert names == {
    *("config.json", "checkpoints", "loading.json", "weights.json"),
    "aside.safetensors",
  }
  assert json.loads((folder / "loading.json").read_text())["missing"] == []
  assert not list(folder.parent.glob("*.tmp"))
  run, step = initialise.locate(folder / "checkpoints" / "0")
  assert (run.root, step) == (folder, 0)
  assert report.lines()[0].startswith("family cavmae: loaded")


@pytest.mark.parametrize("layout", ["avmae", "mbt"])
def test_scenic_weights_go_there_and_back(layout, tmp_path):
  if layout == "avmae":
    state = golden.reference_params(golden.load("avmae_tiny.npz"),
                                    "mae/mid_dshared")  # fmt: skip
    model = avmae_config.default_model(
      "B", width=32, depth=4, heads=4, mlp=64, fusion_layers=2,
      decoder_width=24, decoder_depth=2, decoder_heads=3, decoder_mlp=48,
    )  # fmt: skip
  else:
    state = golden.reference_params(golden.load("avmae_tiny_mbt.npz"),
                                    "mbt/bottleneck")  # fmt: skip
    classes = len(state["ProjectionHeadAndClassifier_0/output_projection/bias"])
    model = mbt.default_model(
      "B", width=32, depth=4, heads=4, mlp=64, fusion_layer=2,
      n_bottlenecks=state["bottleneck"].shape[1], classes={"label": classes},
    )  # fmt: skip
  formats.write(tmp_path / "x.npz", state)
  config = config_of(layout, model)
  config.data.video.num_frames = 4
  report = convert.convert(tmp_path / "x.npz", tmp_path / "run", config=config)
  assert report.family == layout and not report.missing and not report.unused
  convert.convert(tmp_path / "run", tmp_path / "y.npz", layout="public")
  assert_same(formats.read(tmp_path / "y.npz"), state)


# --- Into other models -------------------------------------------------------


def test_pretrained_file_starts_a_classifier(pretrained, tmp_path):
  report = convert.convert(pretrained[0], tmp_path / "r", config=finetuning())
  assert all(name.startswith("classifier/") for name in report.missing)
  assert {n.split("/")[0] for n in report.unused} >= {"decoder", "mask_token"}
  params = initialise.read(tmp_path / "r").params
  assert params["classifier"]["out"]["kernel"].shape == (32, 7)
  assert not (tmp_path / "r" / "aside.safetensors").exists()


def test_shorter_clips_keep_the_first_columns_of_every_mel_row(
  pretrained, tmp_path
):
  config = pretraining(frames=512)
  report = convert.convert(pretrained[0], tmp_path / "r", config=config)
  assert "64 -> 32" in report.reshaped["positions_audio"]
  found = initialise.read(tmp_path / "r").params["positions_audio"]
  np.testing.assert_array_equal(
    found.reshape(8, 32, 32),
    TABLES["pos_embed_a"].reshape(8, 64, 32)[:, :32],
  )
  np.testing.assert_allclose(found, sincos_2d((8, 32), 32), atol=1e-6)


def test_another_classifier_is_listed_as_mis_shaped(tmp_path):
  file = save(tmp_path / "x.pth", recipe(7))
  report = convert.convert(file, tmp_path / "r", config=finetuning(classes=9))
  assert report.misshaped == {
    "classifier/out/bias": "(7,) there, (9,) here",
    "classifier/out/kernel": "(32, 7) there, (32, 9) here",
  }
  assert any("mis-shaped: classifier/out/bias" in x for x in report.lines())


def test_other_sizes_are_refused_and_nothing_is_written(pretrained, tmp_path):
  config = pretraining()
  config.model.width = 48
  with pytest.raises(InputError, match=r"mis-shaped: .*\(32, 32\) there") as e:
    convert.convert(pretrained[0], tmp_path / "r", config=config)
  assert "encoder_joint/norm/scale (32,) there, (48,) here" in str(e.value)
  assert not list(tmp_path.iterdir())


def test_vggsound_classes_come_in_our_order(tmp_path):
  state = recipe(309)
  state["mlp_head.1.bias"] = np.arange(309, dtype=np.float32)
  weights = families.load(save(tmp_path / "x.pth", state))
  bias = weights.params["classifier"]["out"]["bias"]
  data = importlib.resources.files("avjax.data") / "classes" / "vggsound.json"
  order = json.loads(data.read_text())["cavmae"]
  for theirs in (0, 1, 100, 308):
    assert bias[order[theirs]] == theirs
  folder = tmp_path / "run"
  config = finetuning(classes=309, name="vggsound")
  convert.convert(tmp_path / "x.pth", folder, config=config)
  names = json.loads((folder / "classes.json").read_text())["label"]
  assert names == json.loads(data.read_text())["names"]
  back = class_lists.class_order(weights.params, to_house=False)
  np.testing.assert_array_equal(back["classifier"]["out"]["bias"], range(309))


@pytest.mark.parametrize(
  "change, words",
  [
    ("blocks_[av].10", "the source has 10 blocks in encoder_audio.*model 11"),
    ("blocks_v.10", "the source has 10 blocks in encoder_video.*model 11"),
    ("decoder_blocks.1", "the source has 1 blocks in decoder.*model 2"),
    ("blocks_u.0", "the source has 0 blocks in encoder_joint.*model 1"),
  ],
)
def test_another_number_of_blocks_is_refused(change, words, tmp_path):
  state = {k: x for k, x in recipe().items() if not re.match(change, k)}
  source = families.load(save(tmp_path / "x.pth", state))
  with pytest.raises(InputError, match=words):
    convert.become(source, pretraining())


def test_one_modality_starts_its_own_blocks(tmp_path):
  state = {k: x for k, x in recipe().items() if not re.search("_v(\\.|$)", k)}
  source = families.load(save(tmp_path / "x.pth", state))
  _, report, _ = convert.become(source, pretraining())
  assert all("video" in name for name in report.missing)
  assert "encoder_audio/block_10/norm1/scale" in report.loaded


# --- init_from and load ------------------------------------------------------


def test_init_from_takes_public_files(tmp_path):
  """The file itself, one for each modality, or the folder made of it."""
  state = public_weights.vit_torch()
  file = tmp_path / "ViT.npz"
  np.savez(file, **public_weights.vit_npz(state))
  config = runs.stage("avmae_vgg_finetune", "demo")
  config.model.update(mlp=128, patch_audio=(16, 16))
  folder = tmp_path / "run"
  report = convert.convert(file, folder, config=config)
  assert set(report.missing) == {"bottleneck", "head/bias", "head/kernel"}
  method = methods.make(config_lib.from_plain(config_lib.plain(config)))
  converted = initialise.read(folder)
  for parts in (
    {"": initialise.read(file)},
    {m: initialise.read(file) for m in ("audio", "video")},
    {"": converted},
  ):
    loaded = initialise.adapt(method, converted.params, parts)
    assert_same(trees.flatten(loaded.params), trees.flatten(converted.params))
    assert set(report.loaded) <= set(loaded.loaded)
  mixed = {"audio": initialise.read(file), "video": converted}
  with pytest.raises(
    InputError, match="ViT.npz is an image model, .*run is not"
  ):
    initialise.adapt(method, converted.params, mixed)


def test_image_models_need_a_config(tmp_path):
  formats.write(tmp_path / "mae.npz", public_weights.mae())
  source = initialise.read(tmp_path / "mae.npz")
  assert source.config == image.CONFIG
  with pytest.raises(InputError, match="mae.npz is an image model"):
    avjax.load(tmp_path / "mae.npz")
  with pytest.raises(InputError, match="2 blocks of width 32 with a decoder"):
    convert.convert(tmp_path / "mae.npz", tmp_path / "run")
  with pytest.raises(
    InputError, match="no names for weights of method 'image'"
  ):
    convert.convert(tmp_path / "mae.npz", tmp_path / "x.npz", layout="public")
  convert.convert(tmp_path / "mae.npz", tmp_path / "ours.safetensors")
  again = initialise.read(tmp_path / "ours.safetensors")
  assert_same(trees.flatten(again.params), trees.flatten(source.params))


def test_file_of_ours_is_a_model(pretrained, tmp_path):
  convert.convert(pretrained[1], tmp_path / "x.safetensors")
  model = avjax.load(tmp_path / "x.safetensors")
  assert (model.config.method, model.step) == ("cavmae", 0)
  assert_same(
    trees.flatten(model.params),
    trees.flatten(initialise.read(pretrained[1]).params),
  )


def test_files_are_no_runs(tmp_path):
  formats.write(tmp_path / "x.npz", recipe(7))
  with pytest.raises(InputError, match="avjax.convert --weights="):
    initialise.locate(tmp_path / "x.npz")
  with pytest.raises(InputError, match="7 classes; configs are known for 309"):
    initialise.read(tmp_path / "x.npz")


def test_converted_folder_can_be_evaluated_and_loaded(demo_data, tmp_path):
  config = runs.stage("avmae_vgg_finetune", "demo", data__dir=demo_data)
  config.model.update(mlp=128, patch_audio=(16, 16))
  np.savez(tmp_path / "ViT.npz", **public_weights.vit_torch())
  convert.convert(tmp_path / "ViT.npz", tmp_path / "run", config=config)
  assert json.loads((tmp_path / "run" / "classes.json").read_text())["label"]
  scores = evaluate.evaluate(tmp_path / "run")
  assert 0 <= scores["test/top1"] <= 100
  model = avjax.load(tmp_path / "run")
  assert model.step == 0 and model.class_names["label"]


# --- Published configs -------------------------------------------------------


def published(name, argument, method):
  module = importlib.import_module(f"configs.{name}")
  config = families.stage(module.get_config(argument), method)
  return config_lib.from_plain(config_lib.plain(config))


@pytest.mark.parametrize(
  "family, name, argument, method",
  [
    ("cavmae", "cavmae_audioset", "", "cavmae"),
    ("cavmae", "cavmae_as2m_finetune", "", "cavmae_finetune"),
    ("avmae", "avmae_audioset", "variant=public", "avmae"),
    ("mbt", "avmae_audioset_finetune", "variant=public", "mbt"),
    ("mbt", "avmae_vgg_finetune", "variant=public,modality=a", "mbt"),
  ],
)
def test_published_files_bring_their_configs(family, name, argument, method):
  """Full size: shapes alone, no memory."""
  config = published(name, argument, method)
  shapes = jax.eval_shape(
    functools.partial(convert._initial, config, methods.make(config))
  )
  blank = jax.tree.map(
    lambda x: np.broadcast_to(x.dtype.type(), x.shape), shapes
  )
  weights = families.Weights(family, method, blank, {}, None, ())
  found = config_lib.from_plain(families.config_of(weights))
  assert (found.method, found.init_from) == (method, "")
  assert found.data.to_dict() == config.data.to_dict()
  read = {"classes": found.model.get("classes"), "size": found.model.size}
  with config.unlocked():
    config.model.update({k: v for k, v in read.items() if k in config.model})
  assert found.model.to_dict() == config.model.to_dict()


def test_original_mbt_brings_its_clips():
  """Released files: a CLS, five bottleneck tokens, 401 positions of sound."""
  config = published("avmae_audioset_finetune", "size=B", "mbt")
  with config.unlocked():
    config.model.update(classifier="token", positions="learned_1d")
    config.model.update(audio_channels=3, n_bottlenecks=4)
  shapes = jax.eval_shape(
    functools.partial(convert._initial, config, methods.make(config))
  )
  blank = jax.tree.map(
    lambda x: np.broadcast_to(x.dtype.type(), x.shape), shapes
  )
  assert blank["bottleneck"].shape == (5, 768)
  assert blank["positions_audio"].shape == (401, 768)
  weights = families.Weights("mbt_original", "mbt", blank, {}, None, ())
  found = families.config_of(weights)
  assert found["model"]["classifier"] == "token"
  assert found["model"]["n_bottlenecks"] == 4
  assert found["model"]["audio_channels"] == 3
  assert found["data"]["audio"]["seconds"] == 8.0
  assert found["data"]["video"]["num_frames"] == 32


def test_counts_are_those_of_the_public_files():
  full = {"d": 768, "depth": 11, "decoder": (512, 8)}
  for classes, arrays, numbers in (
    (0, 647, 191_036_160), (527, 478, 164_907_023),
  ):  # fmt: skip
    shapes = public_weights.cavmae_shapes(**full, classes=classes)
    assert len(shapes) == arrays
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == numbers


# --- The command -------------------------------------------------------------


def command(*flags):
  args = [sys.executable, "-m", "avjax.convert", *flags]
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    args, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=120
  )


def test_command_prints_the_report(tmp_path):
  formats.write(tmp_path / "x.npz", recipe(7))
  done = command(f"--weights={tmp_path / 'x.npz'}",
                 f"--output={tmp_path / 'y.safetensors'}")  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "family cavmae: loaded" in done.stdout
  assert (tmp_path / "y.safetensors").exists()


def test_outputs_that_cannot_be_are_refused_first(pretrained, tmp_path):
  file, folder, _ = pretrained
  for output, layout, words in (
    (folder, "house", "not an empty folder"),
    (tmp_path / "x.h5", "house", "suffix of a weights file"),
    (tmp_path / "new", "public", "is for files"),
    (tmp_path / "x.pth", "house", "goes with --layout=public"),
    (tmp_path / "x.npz", "publik", "Did you mean 'public'"),
  ):
    with pytest.raises(InputError, match=words):
      convert.convert(file, output, layout=layout)
  assert not list(tmp_path.iterdir())
