"""The page of speed: what it measures, goes on from, and prints."""

import contextlib
import ctypes
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import simplejpeg
from absl import flags

from avjax import (
  bench_configs,
  benchmark,
  config,
  experiment,
  speed_page,
  speed_rows,
  speed_tables,
)
from avjax import flops as flops_lib
from avjax.errors import InputError
from avjax.speed_rows import Task
from configs import uavm_vgg
from data_prep import synthetic
from tests import runs

PLACE = {"backend": "cpu", "device": "a CPU", "devices": 1, "jax": "0"}
NUMBERS = {
  "batch": 8, "group": 0, "repeats": 1, "step_s": 2.0, "clips_per_s": 4.0,
  "flops_per_clip": 1e9, "flops_per_s": 4e9, "peak_flops_per_s": 1e10,
  "share_of_peak": 0.4, "model_flops_per_clip": 1e9, "mfu": 0.0,
  "vendor_peak": 0.0, "parameters": 5, "held_bytes": 2048,
  "temporary_bytes": 1024, "measured_bytes": 0, "compile_s": 3.0,
}  # fmt: skip


def parse(*words):
  """Flags of the command, and the words that are none."""
  values = flags.FlagValues()
  benchmark.define_flags(values)
  return values, values(["benchmark", *words])


def command(*words):
  values, argv = parse(*words)
  benchmark.check_flags(values, argv[1:])
  speed_page.command(values, argv[1:])


@pytest.fixture
def measured(monkeypatch):
  """Every row has the same numbers; names of those that were measured."""
  names = []

  def apart(function, *args):
    if function is speed_rows.place:
      return dict(PLACE)
    names.append(args[0].name)
    return dict(NUMBERS)

  monkeypatch.setattr(speed_page, "apart", apart)
  return names


@pytest.mark.parametrize(
  "device, peak",
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 0),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100-PCIE-40GB", 312e12),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 0),
    ("NVIDIA RTX A1000 Laptop GPU", 0),
    ("NVIDIA RTX A5000", 111e12),
    ("NVIDIA RTX A5000 Laptop GPU", 0),
    ("Tesla V100-SXM2-32GB", 125e12),
    ("TPU v4", 0),
    ("TPU v5 lite", 0),
    ("AMD EPYC 9V74", 0),
  ],
)
def test_the_vendors_figure_of_a_device(device, peak):
  assert speed_rows.vendor_peak(device) == peak


def test_mfu_is_of_all_devices_and_of_16_bits():
  name = "NVIDIA H100 80GB HBM3"
  assert speed_rows.mfu(989e12, name, 2, "bfloat16") == 0.5
  assert speed_rows.mfu(989e12, name, 2, "float32") == 0
  assert speed_rows.mfu(1e12, "a CPU", 1, "bfloat16") == 0


@pytest.mark.parametrize(
  "batch, multiple, half", [(1536, 6, 768), (54, 1, 26), (6, 6, 0), (2, 1, 0)]
)
def test_half_a_batch_is_one_that_the_method_takes(batch, multiple, half):
  parts = types.SimpleNamespace(accumulate=1)
  setup = types.SimpleNamespace(
    config=types.SimpleNamespace(optimizer=parts),
    mesh=types.SimpleNamespace(size=1),
    method=types.SimpleNamespace(batch_multiple=multiple),
  )
  assert speed_rows.halved(setup, batch) == half


def test_a_batch_is_halved_until_it_fits(monkeypatch):
  """As on a device that holds eight clips."""

  class Step(benchmark.Step):
    def __init__(self, setup):
      if setup > 8:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
      self.clips = setup

  monkeypatch.setattr(bench_configs, "experiment_of", lambda _, size: size)
  monkeypatch.setattr(
    speed_rows, "halved", lambda _, batch_size: batch_size // 2
  )
  monkeypatch.setattr(benchmark, "Step", Step)
  step, measured = speed_rows.fitting(None, 32, False)
  assert (step.clips, measured) == (8, 0)
  with pytest.raises(InputError, match="a batch of 32 does not fit"):
    speed_rows.fitting(None, 32, True)


def test_model_flops_are_three_times_the_forward_pass():
  """UAVM's first layer is a norm, so that its step is just that."""
  config = runs.plain(uavm_vgg.get_config(""))
  setup = bench_configs.experiment_of(config, 8)
  counted = flops_lib.count(
    lambda state, batch: experiment.train_step(setup, state, batch),
    setup.state_shapes,
    setup.batch_shapes,
  )
  assert 3 * speed_rows.forward_flops(setup) == counted


def test_every_config_has_its_row(measured, tmp_path):
  """All that trains, of paper size."""
  command("--page", "steps", f"--json={tmp_path / 'speed.json'}")
  names = {row["of"] for row in speed_page.read(tmp_path / "speed.json")}
  for method in ("avmae", "cavmae", "deteclap", "avsiam", "coavt", "uavm"):
    assert any(f"configs/{method}_" in name for name in names)
  assert not any("demo" in name for name in names)
  values, _ = parse("--page")
  for task, _ in speed_page.page_tasks(values, ["steps"]):
    assert task.config["data"]["name"] != "av_demo"
    assert task.config["model"].get("size", "B") == "B"


def test_a_page_goes_on_from_its_record(measured, tmp_path, capsys):
  path = tmp_path / "speed.json"
  command("--page", "uavm_vgg", f"--json={path}")
  command("--page", "uavm_vgg", "cavmae_audioset", f"--json={path}")
  assert measured == ["uavm_vgg", "cavmae_audioset"]
  assert "1 of 2 rows are there already" in capsys.readouterr().err
  # Another batch is another row, other repeats are the same one anew.
  command("--page", "uavm_vgg", f"--json={path}", "--batch_size=4")
  command("--page", "uavm_vgg", f"--json={path}", "--repeats=9")
  assert measured[2:] == ["uavm_vgg", "uavm_vgg"]
  rows = speed_page.read(path)
  asked = [(row["name"], row["asked"], row["repeats_asked"]) for row in rows]
  assert asked == [
    ("uavm_vgg", 32, 9), ("cavmae_audioset", 2, 0), ("uavm_vgg", 4, 0),
  ]  # fmt: skip
  for row in rows:
    assert row["command"].startswith("python -m avjax.benchmark")
    assert row["date"] and row["avjax"] and row["dtype"] == "float32"
  first = capsys.readouterr().out.split("\n\n")[-1]
  command(f"--from_json={path}")
  assert capsys.readouterr().out.endswith(first)


def test_a_row_that_failed_is_said_and_measured_again(
  measured, monkeypatch, tmp_path, capsys
):
  path, works = tmp_path / "speed.json", speed_page.apart

  def fails(function, *args):
    if function is speed_rows.measure and args[0].name == "uavm_vgg":
      raise InputError("no memory")
    return works(function, *args)

  monkeypatch.setattr(speed_page, "apart", fails)
  words = ("--page", "uavm_vgg", "cavmae_audioset", f"--json={path}")
  with pytest.raises(InputError, match="not measured: uavm_vgg"):
    command(*words)
  assert "| `uavm_vgg` | failed: no memory |" in capsys.readouterr().out
  monkeypatch.setattr(speed_page, "apart", works)
  command(*words)
  assert measured == ["cavmae_audioset", "uavm_vgg"]
  assert "failed" not in capsys.readouterr().out


def test_a_row_that_failed_takes_the_place_of_no_numbers(
  measured, monkeypatch, tmp_path, capsys
):
  path, works = tmp_path / "speed.json", speed_page.apart
  words = ("--page", "uavm_vgg", f"--json={path}")
  command(*words)
  before = speed_page.read(path)

  def fails(function, *args):
    if function is speed_rows.measure and args[0].name == "uavm_vgg":
      raise InputError("no memory")
    return works(function, *args)

  monkeypatch.setattr(speed_page, "apart", fails)
  with pytest.raises(InputError, match="not measured: uavm_vgg: no memory"):
    command(*words, "--repeats=9")
  assert speed_page.read(path) == before
  assert "uavm_vgg: no memory in" in capsys.readouterr().err
  # Of another batch there are no numbers: that it failed is a row of its own.
  with pytest.raises(InputError, match="not measured"):
    command(*words, "--batch_size=4")
  assert [("failed" in row) for row in speed_page.read(path)] == [False, True]
  # Which is no failure of a later call for something else.
  command("--page", "cavmae_audioset", f"--json={path}")


def on_gpu(function, *args):
  """`apart`, as on a GPU."""
  if function is speed_rows.place:
    return PLACE | {"backend": "gpu", "device": "A GPU", "host": "A host"}
  return NUMBERS | {"ms_per_clip": 1.0, "read": "a picture"}


def test_the_page_on_a_gpu(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(speed_page, "apart", on_gpu)
  path = tmp_path / "speed.json"
  words = ("--page", "uavm_vgg", "one_frame", f"--json={path}")
  command(*words)
  step, pipeline = speed_page.read(path)
  assert step["dtype"] == pipeline["dtype"] == "bfloat16"
  assert pipeline["host"] == "A host" and "host" not in step
  out = capsys.readouterr().out
  assert "Training steps, bfloat16, on 1 x A GPU, median" in out
  assert "The pipeline, on 1 x A GPU, host A host, per CPU second" in out
  command(*words, "--dtype=float32")
  found = [row["dtype"] for row in speed_page.read(path)]
  assert found == ["bfloat16", "bfloat16", "float32", "float32"]
  with pytest.raises(InputError, match="1 of .* cores, .* feed the gpu"):
    command("--page", "uavm_vgg", "--pin")


# ml_collections reads config files in a way that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_options_change_one_thing_each(measured, monkeypatch, tmp_path, capsys):
  monkeypatch.chdir(runs.ROOT)
  values, _ = parse(
    "--config=configs/avmae_vgg.py:size=L", "--options", "--batch_size=4",
    "--stage=finetune",
  )  # fmt: skip
  tasks = {t.name: t for t, _ in speed_page.option_tasks(values, [])}
  assert set(tasks) == set(speed_page.OPTIONS)
  plain = tasks["plain"].config
  assert plain["method"] == "mbt" and plain["model"]["remat"] == "none"
  for name, change in speed_page.OPTIONS.items():
    found = config.differences(plain, tasks[name].config)
    assert len(found) == len(change)
    assert tasks[name].fixed and tasks[name].batch_size == 4
  words = ("--config=configs/uavm_vgg.py", "--options")
  values, _ = parse(*words)
  names = [t.name for t, _ in speed_page.option_tasks(values, [])]
  assert names == ["plain", "accumulate_2", "accumulate_4", "bfloat16"]
  with pytest.raises(InputError, match=r"'uavm' has no model\.scan"):
    command(*words, "scan")
  with pytest.raises(InputError, match="'scann'. Did you mean 'scan'"):
    command(*words, "scann")
  command(*words, "bfloat16", f"--json={tmp_path / 'x.json'}")
  assert measured == ["plain", "bfloat16"]
  out = capsys.readouterr().out
  assert "Options of configs/uavm_vgg.py, batch 144" in out
  assert "| `bfloat16` | 2 | 1.00 |" in out


def test_the_readme_has_the_tables_of_the_record():
  record = speed_page.read(runs.ROOT / "docs" / "speed.json")
  text = (runs.ROOT / "README.md").read_text()
  lines = set(speed_tables.tables(record).splitlines()) - set(text.splitlines())
  assert not lines


def test_files_that_are_no_record_are_refused(tmp_path):
  path = tmp_path / "rows.json"
  for text, error in (
    ("{", "cannot be read"),
    ("[]", "is no record"),
    (json.dumps({"title": "", "rows": [{"what": "x"}]}), "is no record"),
  ):
    path.write_text(text)
    with pytest.raises(InputError, match=error):
      command(f"--from_json={path}")


@pytest.mark.parametrize(
  "words, error",
  [
    (("--page", "cavmae"), "unknown row of the page 'cavmae'"),
    (("--page", "--compare", "avmae"), "give one of the two"),
    (("--page", "--stage=x"), "--stage goes with --config alone"),
    (("--page", "--options"), "--options goes with --config alone"),
    (("--from_json=x", "--pin"), "--pin goes with --config or"),
    (("--from_json=x", "more"), "unexpected argument 'more'"),
  ],
)
def test_what_the_page_refuses(words, error):
  with pytest.raises(InputError, match=error):
    command(*words)


def test_a_process_of_its_own():
  assert speed_page.apart(math.sqrt, 4.0) == 2
  with pytest.raises(InputError, match="ValueError: "):
    speed_page.apart(math.sqrt, -1.0)
  with pytest.raises(InputError, match="status 7"):
    speed_page.apart(os._exit, 7)


def faults():
  """Pages that were faulted in for memory that had been used before."""
  library, found = ctypes.CDLL(None), []
  library.malloc.restype = ctypes.c_void_p
  for _ in range(5):
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    place = ctypes.c_void_p(library.malloc(ctypes.c_size_t(1 << 26)))
    ctypes.memset(place, 1, 1 << 26)
    library.free(place)
  return found[-1] - found[1]


def test_a_process_of_its_own_keeps_memory_as_training_does(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert speed_page.apart(faults) < 16


def test_a_process_ends_with_the_one_that_waits(tmp_path):
  """Else a stopped page would go on measuring."""
  path = tmp_path / "pid"
  words = ["sh", "-c", 'echo $PPID > "$0.part" && mv "$0.part" "$0"; sleep 20']
  parent = subprocess.Popen(
    [sys.executable, "-c", "import subprocess, sys; "
     "from avjax import speed_page; "
     "speed_page.apart(subprocess.run, sys.argv[1:])", *words, str(path)],
    cwd=runs.ROOT,
  )  # fmt: skip
  runs.wait_until(path.exists, 60)
  status = pathlib.Path("/proc") / path.read_text().strip() / "status"
  assert "Z (zombie)" not in status.read_text()
  parent.terminate()
  parent.wait()
  runs.wait_until(
    lambda: not status.exists() or "Z (zombie)" in status.read_text(), 20
  )


# ------------------------------------------------------------ what is measured


def task(kind, name, stage, **options):
  return Task(kind, name, config.plain(stage), 8, 1, True, **options)


def test_numbers_of_a_step(demo_data):
  found = speed_rows.measure(
    task("steps", "cavmae_audioset", runs.stage("cavmae_audioset"))
  )
  assert set(found) == set(NUMBERS)
  assert found["batch"] == 8 and found["group"] == 0
  assert found["held_bytes"] > 12 * found["parameters"] > 0
  assert found["clips_per_s"] == pytest.approx(8 / found["step_s"])
  rate = found["flops_per_clip"] * found["clips_per_s"]
  assert found["flops_per_s"] == pytest.approx(rate)
  assert 0 < found["model_flops_per_clip"] < found["flops_per_clip"]
  assert found["share_of_peak"] > 0 and found["mfu"] == 0


@pytest.fixture
def on_demo(demo_data, monkeypatch):
  """av_demo instead of synthetic clips."""

  def on_noise(section, batch_size, stack):
    section = section.copy_and_resolve_references()
    with section.unlocked():
      section.data.dir = demo_data
    return section

  monkeypatch.setattr(speed_rows, "on_noise", on_noise)
  monkeypatch.setattr(speed_rows, "CLIPS", 8)


def test_a_step_fed_by_the_pipeline(on_demo):
  found = speed_rows.measure(
    task("together", "fed_one_frame", runs.stage("cavmae_audioset"))
  )
  assert found["step_to_both"] == found["step_s"] / found["fed_step_s"]
  assert found["clips_per_s"] == 8 / found["fed_step_s"]


@pytest.mark.parametrize(
  "name, read",
  [
    ("one_frame", "1 of 10 pictures, 3 s of sound"),
    ("host_mel", "1 of 10 pictures, 3 s of sound"),
    ("ten_views", "10 of 10 pictures, 3 s of sound"),
  ],
)
def test_the_pipeline_by_kind_of_clip(on_demo, name, read):
  stage = runs.stage("cavmae_vgg_finetune")
  found = speed_rows.measure(task("pipeline", name, stage))
  assert found["read"] == read
  assert found["ms_per_clip"] == pytest.approx(1e3 / found["clips_per_s"])
  assert found["jpeg_kb"] > 0 and found["record_kb"] > 96


@pytest.mark.parametrize("name", ["mel_host", "mel_device"])
def test_log_mel_alone(name):
  stage = runs.stage("cavmae_audioset")
  assert speed_rows.measure(task("mel", name, stage))["clips_per_s"] > 0


def test_the_words_that_a_method_prints_are_no_table(capsys):
  with contextlib.suppress(InputError):
    speed_rows.measure(task("mel", "mel_host", runs.stage("cavmae_audioset")))
  assert not capsys.readouterr().out


def test_synthetic_pictures_take_what_those_of_videos_take():
  frame = synthetic.picture(np.random.default_rng(0), 0.1)[0]
  content = simplejpeg.encode_jpeg(frame.copy(), quality=85)
  assert 10e3 < len(content) < 35e3
