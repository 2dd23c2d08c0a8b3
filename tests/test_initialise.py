"""Where a run starts from."""

import importlib
import json
import os

import numpy as np
import pytest

from avjax import initialise, train
from avjax.checkpoint import restore_params
from avjax.errors import InputError
from avjax.workdir import workdir
from tests import runs


def test_source_is_one_path_or_one_for_each_modality():
  assert initialise.parse("/a,b/c") == {"": "/a,b/c"}
  both = initialise.parse("audio:/a,video:/v")
  assert both == {"audio": "/a", "video": "/v"}
  with pytest.raises(InputError, match="names audio alone"):
    initialise.parse("audio:/a")


def test_places_without_a_run_are_refused(tmp_path):
  with pytest.raises(InputError, match="nowhere does not exist"):
    initialise.read(tmp_path / "nowhere")
  with pytest.raises(InputError, match="neither a run nor a checkpoint"):
    initialise.read(tmp_path)


def test_streams_start_from_a_run_each(demo_data, tmp_path):
  """AudioMAE for the sound, VideoMAE for the frames (§4.2)."""
  for m in ("a", "v"):
    config = runs.stage(
      "avmae_vgg", f"demo,modality={m}", data__dir=demo_data, evals={}
    )
    train.train_and_evaluate(runs.plain(config), tmp_path / m)
  config = runs.stage(
    "avmae_vgg_finetune", data__dir=demo_data, evals={}, checkpoint__best="",
    init_from=f"audio:{tmp_path / 'a'},video:{tmp_path / 'v'}",
    schedule__base_lr=0.0, optimizer__weight_decay=0.0,
  )  # fmt: skip
  train.train_and_evaluate(runs.plain(config), tmp_path / "both")
  _, found = restore_params(tmp_path / "both" / "checkpoints", None)
  for m, name in (("a", "audio"), ("v", "video")):
    _, source = restore_params(tmp_path / m / "checkpoints", None)
    kernel = source[f"embed_{name}"]["kernel"]
    np.testing.assert_array_equal(found[f"embed_{name}"]["kernel"], kernel)
  report = json.loads((tmp_path / "both" / "loading.json").read_text())
  assert "head/kernel" in report["missing"]
  assert any(path.startswith("audio/decoder") for path in report["unused"])


def fake_stage(config, run, profile, *, more):
  """What a stage leaves that tells it has been trained."""
  (run.checkpoints / "1").mkdir(parents=True, exist_ok=True)
  run.config.write_text("{}")
  return {}


@pytest.fixture
def staged(tmp_path, monkeypatch):
  """Trains the named stages of a staged run, at no cost; its folder."""
  monkeypatch.setattr(train, "train_stage", fake_stage)
  monkeypatch.setattr(train.report, "write_staged", lambda *_: None)

  def run(*names, start="elsewhere"):
    config = importlib.import_module("configs.cavmae_vgg").get_config("demo")
    config.stages = names
    config.finetune.init_from = start
    train.train_and_evaluate(config, tmp_path / "run")
    return tmp_path / "run"

  return run


def test_last_stage_is_the_last_in_order_not_in_time(staged):
  folder = staged("pretrain", "finetune")
  os.utime(folder / "finetune" / "config.json", (1, 1))
  os.utime(folder / "pretrain" / "config.json", (2, 2))
  assert initialise.locate(folder)[0].root.name == "finetune"
  staged("pretrain")
  assert initialise.locate(folder)[0].root.name == "finetune"
  (folder / "finetune" / "checkpoints" / "1").rmdir()
  assert initialise.locate(folder)[0].root.name == "pretrain"


def test_stages_that_are_trained_one_by_one_are_in_order(staged):
  with pytest.raises(InputError, match="starts from the one before it"):
    staged("finetune", start="previous")
  staged("pretrain")
  folder = staged("finetune")
  os.utime(folder / "finetune" / "config.json", (1, 1))
  assert initialise.locate(folder)[0].root.name == "finetune"


def test_folders_without_an_order_are_compared_in_time(staged):
  folder = staged("pretrain", "finetune")
  (folder / "stages.json").unlink()
  os.utime(folder / "finetune" / "config.json", (1, 1))
  assert initialise.locate(folder)[0].root.name == "pretrain"


def test_unchanged_config_is_not_written_again(tmp_path):
  config = runs.plain(runs.stage("cavmae_audioset"))
  run = workdir(tmp_path)
  train.check_config(config, run)
  os.utime(run.config, (1, 1))
  train.check_config(config, run)
  assert run.config.stat().st_mtime == 1
  with config.unlocked():
    config.log_every += 1
  train.check_config(config, run)
  assert run.read_config()["log_every"] == config.log_every


TWO_PROCESSES = """
import sys
from types import SimpleNamespace
import jax
import numpy as np
process, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, process)
from avjax import config, initialise, parallel
from avjax.methods.base import Method
from avjax.weights import families, formats
from avjax.workdir import workdir

class Plain:
  adapt = Method.adapt
  config = {"method": "plain"}

settings = config.base_config()
settings.init_from = f"{directory}/{process}.safetensors"
wanted = np.arange(32, dtype=np.float32).reshape(8, 4)
formats.write(settings.init_from, *families.house_arrays(
  {"a": {"kernel": wanted}}, {}, {"method": "plain"}, families.HOUSE))
settings.mesh.update(data=1, fsdp=-1)
mesh = parallel.make_mesh(settings.mesh)
initial = {name: {"kernel": np.full((8, 4), 5, np.float32)} for name in "ab"}
shardings = parallel.shardings(initial, mesh)
assert not shardings["a"]["kernel"].is_fully_addressable
make = jax.jit(lambda: initial, out_shardings=shardings)
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
  x.shape, x.dtype, sharding=x.sharding), make())
setup = SimpleNamespace(
  config=settings, method=Plain(), state_shapes={"params": shapes})
state = initialise.from_weights(setup, {"params": make()}, workdir(directory))
for name, value in (("a", wanted), ("b", initial["b"]["kernel"])):
  kernel = state["params"][name]["kernel"]
  assert kernel.sharding == shapes[name]["kernel"].sharding
  for shard in kernel.addressable_shards:
    assert shard.data.shape == (2, 4)
    np.testing.assert_array_equal(shard.data, value[shard.index])
"""


def test_two_processes_start_parameters_that_each_holds_a_part_of(tmp_path):
  runs.two_processes(TWO_PROCESSES, tmp_path)
  report = json.loads((tmp_path / "loading.json").read_text())
  assert report["missing"] == ["b/kernel"]
