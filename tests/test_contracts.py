"""Literal checks of the contracts that every method and tool shares."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from avjax import batch, config, workdir
from avjax.data import datasets
from avjax.errors import InputError, lookup
from avjax.methods import make
from tests import runs


def test_argument_values_take_the_type_of_their_default():
  args = config.parse_arg(
    "demo,epochs=800,encoder=early", epochs=400, encoder="mid"
  )
  assert args.demo is True
  assert args.epochs == 800
  assert args.encoder == "early"


def test_argument_may_be_missing():
  assert config.parse_arg(None, size="B").to_dict() == {
    "demo": False,
    "size": "B",
  }


@pytest.mark.parametrize(
  "arg, words",
  [
    ("encdoer=early", "Did you mean 'encoder'"),
    ("epochs=many", "epochs='many' is not int"),
    ("demo=perhaps", "is not true or false"),
    ("encoder=a,encoder=b", "given twice"),
  ],
)
def test_bad_argument_is_refused(arg, words):
  with pytest.raises(InputError, match=words):
    config.parse_arg(arg, encoder="mid", epochs=400)


def test_config_round_trips_through_json():
  first = config.base_config()
  again = config.from_plain(config.plain(first))
  assert config.differences(config.plain(first), config.plain(again)) == []
  assert again.data.video.mean == (0.5, 0.5, 0.5)


def test_differences_name_the_key_and_both_values():
  old, new = config.plain(config.base_config()), config.base_config()
  new.data.video.size = 64
  assert config.differences(old, config.plain(new)) == [
    "data.video.size: 224 -> 64"
  ]


def test_top_level_keys_of_a_staged_config_reach_every_stage():
  staged = config.staged(
    pretrain=config.base_config(), finetune=config.base_config()
  )
  staged.seed = 7
  staged.mesh.fsdp = 2
  staged.data_dir = "somewhere"
  resolved = config.plain(staged)
  assert resolved["stages"] == ["pretrain", "finetune"]
  for name in resolved["stages"]:
    assert resolved[name]["seed"] == 7
    assert resolved[name]["mesh"]["fsdp"] == 2
    assert resolved[name]["data"]["dir"] == "somewhere"
  assert resolved["pretrain"]["init_from"] == ""
  assert resolved["finetune"]["init_from"] == "previous"


def good_batch():
  return {
    "frames": np.zeros((2, 4, 8, 8, 3), np.uint8),
    "waveform": np.zeros((2, 160), np.int16),
    "index": np.arange(2, dtype=np.uint32),
    "id": ["a", "-b"],
  }


def test_batch_check_accepts_the_contract():
  batch.check(good_batch())
  assert "id" not in batch.arrays(good_batch())


@pytest.mark.parametrize(
  "key, value, words",
  [
    ("frame", np.zeros((2,), np.uint8), "Did you mean 'frames'"),
    ("waveform", np.zeros((2, 160), np.float32), "float32; expected int16"),
    ("index", np.zeros((2, 1), np.uint32), "expected \\[b\\]"),
    ("valid", np.zeros((3,), bool), "holds 3 examples, others 2"),
  ],
)
def test_batch_check_names_key_and_both_values(key, value, words):
  with pytest.raises(InputError, match=words):
    batch.check({**good_batch(), key: value})


def test_unknown_name_lists_the_nearest():
  with pytest.raises(InputError, match="Did you mean 'adam'"):
    lookup({"adam": 1, "sgd": 2}, "adm", "optimiser")


def test_unknown_method_is_refused():
  bad = config.base_config()
  bad.method = "avmea"
  with pytest.raises(InputError, match="Did you mean 'avmae'"):
    make(bad)


def test_missing_data_set_names_the_command_and_demo(tmp_path):
  section = config.data_section()
  section.name, section.dir = "vggsound", str(tmp_path)
  with pytest.raises(InputError, match="data_prep.build.*:demo"):
    datasets.built_dir(section)


def test_newest_version_is_taken(tmp_path):
  section = config.data_section()
  section.dir = str(tmp_path)
  for version in ("1.9.0", "1.10.0"):
    folder = tmp_path / "av_demo" / "video" / version
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
  assert datasets.built_dir(section).name == "1.10.0"


def test_workdir_names(tmp_path):
  run = workdir.workdir(tmp_path)
  assert run.stage("pretrain").checkpoints == tmp_path / "pretrain/checkpoints"
  with pytest.raises(InputError, match="is not a run"):
    run.read_config()


def test_training_takes_neither_tensorflow_nor_pytorch(tmp_path):
  """They are installed here and cost seconds, as does what only draws clips."""
  code = (
    "import importlib, sys\n"
    "import avjax.main, avjax.train, avjax.writer\n"
    "from avjax import evaluators, methods, workdir\n"
    "from data_prep import av_demo\n"
    "for table in (methods.METHODS, evaluators.EVALUATORS):\n"
    "  for place in table.values():\n"
    "    importlib.import_module(place.split(':')[0])\n"
    "avjax.writer.Writer(workdir.workdir(sys.argv[1])).close()\n"
    "heavy = {'tensorflow', 'torch', 'torchvision', 'scipy.signal'}\n"
    "found = heavy & set(sys.modules)\n"
    "assert not found, found\n"
  )
  for name in ("torch", "tensorboardX"):
    assert importlib.util.find_spec(name), f"{name} is not installed"
  subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)], check=True, cwd=runs.ROOT
  )
