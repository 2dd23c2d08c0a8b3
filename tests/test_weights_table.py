"""The list of public checkpoints, and what a file alone leaves open."""

import functools
import importlib
import importlib.resources
import json
import re

import numpy as np
import pytest

import avjax
from avjax import config as config_lib
from avjax import convert
from avjax.methods import cavmae_config
from avjax.nn import sizes
from avjax.weights import class_lists, families, formats, table
from tests import public_weights

SMALL = {"width": 32, "heads": 4, "mlp": 128}


def recipe(classes=0):
  """Weights of CAV-MAE; of size Ti with the fixture `tiny`."""
  return public_weights.cavmae({}, classes=classes)


def save(path, state):
  """A file with the public names, in a format that needs no PyTorch."""
  formats.write(path, {f"module.{name}": x for name, x in state.items()})
  return path


# --- The list ----------------------------------------------------------------


def table_configs(row):
  """The configs that a row names, with its flags, as the trainer gets them."""
  flags = re.findall(r"--config\.([\w.]+)=(\S+)", row.config)
  named = re.findall(r"(\w+)\.py(?::([\w=,+]+))?", row.config)
  assert named, row
  for name, argument in named:
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    for path, text in flags:
      *parts, last = path.split(".")
      place = functools.reduce(lambda at, key: at[key], parts, config)
      kind = type(place[last])
      place[last] = text == "True" if kind is bool else kind(text)
    yield config


def test_table_names_families_and_configs_that_exist():
  for row in table.CHECKPOINTS:
    assert row.family in families.FAMILIES and row.licence
    assert list(table_configs(row))
  names = [row.name for row in table.CHECKPOINTS]
  assert len(set(names)) == len(names)
  assert table.markdown().count("\n") == len(table.CHECKPOINTS) + 1


def test_table_gives_finetuned_rows_their_modality():
  words = {"audiovisual": "av", "audio": "a", "video": "v"}
  found = {}
  for row in table.CHECKPOINTS:
    last = re.split(r"[ _]", row.score if row.family == "cavmae" else row.name)
    if last[-1] in words and row.family in ("cavmae", "mbt"):
      (config,) = table_configs(row)
      config = families.stage(config, "")
      if "modality" in config.model and "_finetune" in row.config:
        assert config.model.modality == words[last[-1]], row
        assert config.data.modality == words[last[-1]], row
        found[row.name] = config.model.modality
  for name in ("as_46.6.pth", "as_37.7.pth", "vgg_59.8.pth"):
    assert found[name] == "a"
  assert len(found) == 7 + 7


def test_table_gives_pretraining_files_their_recipes():
  """As CAV-MAE's README tells them apart."""
  found = {}
  for row in table.CHECKPOINTS:
    if row.family == "cavmae" and "_finetune" not in row.config:
      (config,) = table_configs(row)
      model = config.model
      assert model.mask_audio == model.mask_video
      file = re.search(r"[\w.-]+\.pth", row.name)[0]
      found[file] = (
        config.batch_size, model.group_size, model.contrast_weight,
        model.masking, model.mask_audio, model.norm_pix,
        model.contrast_two_way,
      )  # fmt: skip
  base = (48, 12, 0.01, "unstructured", 0.75, True, False)
  assert found == {
    "audio_model.21.pth": (256, 64, *base[2:]),
    "audio_model.25.pth": (108, 27, *base[2:]),
    "cav-mae-base.pth": base,
    "cav-mae-base-nonorm.pth": (*base[:5], False, False),
    "50.pth": (*base[:4], 0.5, True, False),
    "65.pth": (*base[:4], 0.65, True, False),
    "85.pth": (*base[:4], 0.85, True, False),
    "time_freq_75.pth": (*base[:3], "time_frequency", 0.75, True, False),
    "time_freq_50.pth": (*base[:3], "time_frequency", 0.5, True, False),
    "time_75.pth": (*base[:3], "time", 0.75, True, False),
    "freq_75.pth": (*base[:3], "frequency", 0.75, True, False),
    "cav-mae-base-c0.001.pth": (48, 12, 0.001, *base[3:]),
    "cav-mae-base-c0.1.pth": (48, 12, 0.1, *base[3:]),
    "single_direction.pth": (120, 30, *base[2:]),
    "symc.pth": (120, 30, *base[2:6], True),
  }


# --- What a file does not show -----------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
  """The size of the files here is a standard one."""
  monkeypatch.setitem(sizes.SIZES, "Ti", sizes.Size(32, 12, 4, 128))


def test_file_of_both_branches_is_said_to_be_taken_as_both(
  tiny, tmp_path, caplog
):
  """Public files of sound alone hold the picture's branch, too."""
  weights = families.load(save(tmp_path / "vgg_59.8.npz", recipe(309)))
  assert families.config_of(weights)["model"]["modality"] == "av"
  (told,) = [r for r in caplog.records if r.levelname == "WARNING"]
  assert "cavmae_vgg_finetune.py:modality=a" in told.getMessage()
  (row,) = [r for r in table.CHECKPOINTS if r.name == "vgg_59.8.pth"]
  (config,) = table_configs(row)
  config.model.update(SMALL)
  with config.unlocked():
    config.model.classes = {"label": 309}
  caplog.clear()
  folder = tmp_path / "run"
  report = convert.convert(tmp_path / "vgg_59.8.npz", folder, config=config)
  assert not report.missing and not report.misshaped
  assert all("video" in name or "joint" in name for name in report.unused)
  assert avjax.load(folder).config.model.modality == "a"
  assert not [r for r in caplog.records if "modality" in r.getMessage()]


def test_what_a_pretraining_file_does_not_show_is_said(tiny, tmp_path, caplog):
  file = save(tmp_path / "cav-mae-base-nonorm.npz", recipe())
  with caplog.at_level("INFO", logger="absl"):
    config = families.config_of(families.load(file))
  assert config["model"]["norm_pix"] is True
  for key in (
    "norm_pix=True", "masking='unstructured'", "mask_audio=0.75",
    "mask_video=0.75", "contrast_weight=0.01", "contrast_two_way=False",
    "group_size=27",
  ):  # fmt: skip
    assert f"model.{key}" in caplog.text
  assert "--list" in caplog.text


def test_public_file_is_a_model_with_names_of_classes(tiny, tmp_path):
  """The data set need not be there: its list comes with the package."""
  state = recipe(309)
  state["mlp_head.1.bias"] = np.arange(309, dtype=np.float32)
  model = avjax.load(save(tmp_path / "vgg_65.5.npz", state))
  names = model.class_names["label"]
  data = importlib.resources.files("avjax.data") / "classes" / "vggsound.json"
  order = json.loads(data.read_text())["cavmae"]
  assert len(names) == 309 and names == sorted(names)
  bias = np.asarray(model.params["classifier"]["out"]["bias"])
  for theirs in range(309):
    assert bias[order[theirs]] == theirs
  # The ends of CAV-MAE's class_labels_indices_vgg.csv.
  for theirs, name in ((0, "ambulance siren"), (308, "air horn")):
    assert names[bias.tolist().index(theirs)] == name
  assert model.config.model.classes.label == 309
  ours = tmp_path / "ours.safetensors"
  convert.convert(tmp_path / "vgg_65.5.npz", ours)
  assert avjax.load(ours).class_names == model.class_names


def test_names_of_classes_are_not_guessed():
  config = config_lib.base_config()
  config.model = cavmae_config.finetune_model("B", classes={"label": 309})
  config.data.update(name="vggsound", heads=("label",))
  assert len(class_lists.class_names("cavmae", config)["label"]) == 309
  assert class_lists.class_names("mbt_original", config) == {}
  with config.unlocked():
    config.model.classes = {"label": 7}
  assert class_lists.class_names("cavmae", config) == {}
  with config.unlocked():
    config.data.name = "av_demo"
  assert class_lists.class_names("cavmae", config) == {}
