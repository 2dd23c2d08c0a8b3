"""The loop: exact resume, kills, meshes, processes and refusals."""

import json
import signal
import socket

import jax
import numpy as np
import pytest

from avjax import config as config_lib
from avjax import train, trees
from avjax.checkpoint import Checkpoints
from avjax.data import batches
from avjax.errors import InputError
from avjax.workdir import workdir
from configs import avmae_vgg
from tests import runs

NAME = "avmae_vgg_finetune"


def stage(demo_data, name=NAME, **changes):
  """Most tests run the same program, which is compiled once for all."""
  return runs.stage(
    name, data__dir=demo_data, evals={}, **{**runs.CONSTANT, **changes}
  )


def train_stage(config, folder):
  return train.train_and_evaluate(runs.plain(config), folder)


def state_of(folder, step=None):
  checkpoints = Checkpoints(folder / "checkpoints", keep=None)
  step, state, _ = checkpoints.restore(step=step)
  checkpoints.close()
  return step, jax.device_get(state)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def third_fails(monkeypatch):
  """Another clip stands in for "x" at each third place of the run."""
  fill = batches.Batches._fill

  def filled(self, batch, first, row):
    name, failed = fill(self, batch, first, row)
    return name, failed + [("x", "corrupt")] * ((first + row) % 3 == 0)

  monkeypatch.setattr(batches.Batches, "_fill", filled)


def test_five_and_five_steps_equal_ten_bit_for_bit(
  demo_data, tmp_path, third_fails
):
  config = stage(
    demo_data, total_steps=10, checkpoint__every_steps=5,
    optimizer__average="ema",
  )  # fmt: skip
  train_stage(config, tmp_path / "ten")
  with pytest.MonkeyPatch.context() as patch:
    # Interrupted after step 5, as by SIGTERM.
    patch.setattr(train.Loop, "stopping", lambda self, step: step == 5)
    with pytest.raises(SystemExit):
      train_stage(config, tmp_path / "five")
  assert state_of(tmp_path / "five")[0] == 5
  train_stage(config, tmp_path / "five")
  (step_a, a), (step_b, b) = (
    state_of(tmp_path / name) for name in ("ten", "five")
  )
  assert (step_a, step_b) == (10, 10)
  assert_same(a, b)
  assert runs.losses(tmp_path / "ten") == runs.losses(tmp_path / "five")
  times = -(-10 * config.batch_size // 3)
  for name in ("ten", "five"):
    assert f"- `x`: {times}\n" in (tmp_path / name / "report.md").read_text()


def test_losses_are_equal_on_one_and_eight_devices(demo_data, tmp_path):
  found = {}
  for axes in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
    config = stage(demo_data, "avmae_vgg", total_steps=2, batch_size=16)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = axes
    folder = tmp_path / "x".join(map(str, axes))
    train_stage(config, folder)
    found[axes] = runs.losses(folder)
  for axes, values in found.items():
    for step, value in values.items():
      np.testing.assert_allclose(
        value, found[1, 1, 1][step], rtol=1e-5, err_msg=f"{axes} {step}"
      )


def test_scan_and_accumulation_do_not_change_the_run(demo_data, tmp_path):
  found = []
  for changes in ({}, {"model__scan": True}, {"optimizer__accumulate": 2}):
    config = stage(demo_data, **changes)
    folder = tmp_path / str(len(found))
    train_stage(config, folder)
    found.append(runs.losses(folder))
    names = trees.flatten(state_of(folder)[1]["params"])
    assert any("/block_00/" in name for name in names)
  for values in found[1:]:
    for step, value in values.items():
      np.testing.assert_allclose(value, found[0][step], rtol=1e-5)


def test_mixed_precision_keeps_float32_parameters(demo_data, tmp_path):
  config = stage(demo_data, dtype="bfloat16")
  train_stage(config, tmp_path)
  dtypes = {x.dtype for x in jax.tree.leaves(state_of(tmp_path)[1]["params"])}
  assert dtypes == {np.dtype("float32")}
  exact = stage(demo_data)
  train_stage(exact, tmp_path / "exact")
  for step, loss in runs.losses(tmp_path / "exact").items():
    np.testing.assert_allclose(runs.losses(tmp_path)[step], loss, rtol=0.02)


def test_loss_that_is_not_finite_stops_with_the_step(demo_data, tmp_path):
  config = stage(
    demo_data, total_steps=4, schedule__base_lr=1e30, checkpoint__every_steps=4
  )
  with pytest.raises(FloatingPointError, match=r"is (nan|inf|-inf) at step \d"):
    train_stage(config, tmp_path)
  assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_workdir_of_another_config_is_refused(demo_data, tmp_path):
  config = stage(demo_data)
  train_stage(config, tmp_path)
  config.schedule.base_lr = 0.5
  with pytest.raises(InputError, match=r"schedule.base_lr: .* -> 0.5"):
    train_stage(config, tmp_path)
  config = stage(demo_data, log_every=7)
  train_stage(config, tmp_path)  # What does not change the result may differ.


def test_failed_start_does_not_bind_the_folder(demo_data, tmp_path):
  config = stage(demo_data, init_from="nowhere")
  with pytest.raises(InputError, match="nowhere does not exist"):
    train_stage(config, tmp_path)
  train_stage(stage(demo_data), tmp_path)
  assert state_of(tmp_path)[0] == 2


def test_stage_whose_start_is_left_out_is_refused(tmp_path):
  config = avmae_vgg.get_config("demo")
  config.stages = ("finetune",)
  with pytest.raises(
    InputError, match="'finetune' .*config.finetune.init_from"
  ):
    train_stage(config, tmp_path)


def test_batch_that_does_not_divide_is_refused(demo_data, tmp_path):
  config = runs.stage(NAME, data__dir=demo_data, batch_size=30, mesh__data=8)
  with pytest.raises(InputError, match="batch size 30 .* 8 devices"):
    train_stage(config, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "float16"])
def test_a_dtype_that_is_not_computed_in_is_refused(dtype, demo_data, tmp_path):
  config = runs.stage(NAME, data__dir=demo_data, dtype=dtype)
  with pytest.raises(InputError, match=f"unknown dtype '{dtype}'.*bfloat16"):
    train_stage(config, tmp_path)


def test_steps_and_epochs_exclude_each_other(demo_data, tmp_path):
  config = runs.stage(NAME, data__dir=demo_data, total_epochs=1.0)
  with pytest.raises(InputError, match="total_steps and total_epochs"):
    train_stage(config, tmp_path)


def test_flipped_byte_is_noticed_and_the_previous_step_used(
  demo_data, tmp_path, caplog
):
  config = stage(demo_data, total_steps=3)
  train_stage(config, tmp_path)
  expected = state_of(tmp_path, 3)[1]
  (tmp_path / "done.json").unlink()
  files = [
    path
    for path in (tmp_path / "checkpoints" / "3").rglob("*")
    if path.is_file() and "d" in path.parts
  ]
  victim = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(bytes(data))
  train_stage(config, tmp_path)
  assert_same(state_of(tmp_path, 3)[1], expected)
  assert "3" in caplog.text


def test_kill_in_the_middle_resumes_to_the_same_result(demo_data, tmp_path):
  flags = ("--config.total_steps=6", f"--config.data.dir={demo_data}")
  whole = runs.run(NAME, tmp_path / "whole", *flags)
  assert whole.returncode == 0, whole.stderr[-3000:]
  folder = tmp_path / "killed"
  process = runs.start(NAME, folder, *flags)
  # A checkpoint is written after every step, so the kill falls into a save.
  assert runs.stop_at(process, folder, 3, signal.SIGKILL) == -signal.SIGKILL
  again = runs.run(NAME, folder, *flags)
  assert again.returncode == 0, again.stderr[-3000:]
  assert "resumed from step" in again.stderr
  assert_same(state_of(tmp_path / "whole")[1], state_of(folder)[1])


def test_sigterm_saves_and_exits_and_a_second_run_is_refused(
  demo_data, tmp_path
):
  flags = ("--config.total_steps=400", f"--config.data.dir={demo_data}")
  process = runs.start(
    NAME, tmp_path, *flags, "--config.checkpoint.every_steps=400"
  )
  try:
    while not (tmp_path / "metrics.jsonl").exists():
      assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
    second = runs.run(NAME, tmp_path, *flags,
                      "--config.checkpoint.every_steps=400")  # fmt: skip
    assert second.returncode == 2
    assert str(process.pid) in second.stderr
  finally:
    status = runs.stop_at(process, tmp_path, 1)
  assert status == 128 + signal.SIGTERM, (tmp_path / "log.txt").read_text()
  step, _ = state_of(tmp_path)
  assert 1 <= step < 400


def test_two_processes_train_like_one(demo_data, tmp_path):
  flags = ("--config.total_steps=2", f"--config.data.dir={demo_data}")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [
    runs.start(
      NAME, tmp_path / "two" / f"log{i}", *flags,
      f"--workdir={tmp_path / 'two'}", f"--coordinator=127.0.0.1:{port}",
      "--processes=2", f"--process_id={i}", devices=2,
    )
    for i in range(2)
  ]  # fmt: skip
  codes = [process.wait(timeout=240) for process in processes]
  logs = [
    (tmp_path / f"two/log{i}/log.txt").read_text()[-3000:] for i in range(2)
  ]
  assert codes == [0, 0], logs
  one = runs.run(NAME, tmp_path / "one", *flags)
  assert one.returncode == 0, one.stderr[-3000:]
  for step, loss in runs.losses(tmp_path / "one").items():
    np.testing.assert_allclose(
      runs.losses(tmp_path / "two")[step], loss, rtol=1e-5
    )
  scores = [
    json.loads((tmp_path / name / "done.json").read_text())["scores"]
    for name in ("one", "two")
  ]
  assert scores[0].keys() == scores[1].keys()
  for name, value in scores[0].items():
    np.testing.assert_allclose(scores[1][name], value, rtol=1e-4)


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--config.batch_sze=3", "Did you mean 'batch_size'"),
    ("--config.data.video.sze=3", "Did you mean 'size'"),
    ("--config.batch_size=many", "batch_size"),
    ("--coordinator=localhost:99", "needs --processes, which is 1"),
  ],
)
def test_wrong_key_is_one_line(tmp_path, flag, words):
  result = runs.run(NAME, tmp_path, flag)
  assert result.returncode == 2
  assert words in result.stderr
  assert "Traceback" not in result.stderr


def test_run_of_an_earlier_version_goes_on(demo_data, tmp_path):
  """Keys that came later have the values that held before."""
  config = runs.plain(runs.stage(NAME, data__dir=demo_data))
  saved = config_lib.plain(config)
  del saved["data"]["files"], saved["data"]["augment"]["roll"]
  run = workdir(tmp_path)
  run.config.write_text(json.dumps(saved))
  run.metrics.write_text('{"step": 1}\n')
  train.check_config(config, run)
  saved["data"]["augment"]["flip"] = 0.25
  run.config.write_text(json.dumps(saved))
  with pytest.raises(InputError, match="augment.flip: 0.25 -> 0.5"):
    train.check_config(config, run)


def test_absent_data_set_ends_within_seconds(tmp_path):
  result = runs.run(
    NAME, tmp_path / "run", f"--config.data.dir={tmp_path}",
    argument="",
  )  # fmt: skip
  assert result.returncode == 2
  assert "data_prep.build" in result.stderr and ":demo" in result.stderr
  assert not (tmp_path / "run" / "checkpoints").exists()
