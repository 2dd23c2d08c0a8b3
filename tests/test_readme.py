"""Every command of the README runs; paper-sized ones are resolved."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tarfile

import pytest
import torch

from avjax import sweep
from data_prep import av_demo, object_labels
from tests import object_models, public_weights, runs

TEXT = (runs.ROOT / "README.md").read_text()
MAIN = ("--config=configs/avmae_vgg.py:demo", "--workdir=runs/demo")

# Commands of .ci/run, which runs them as they stand.
WHOLE = ("python3 -m venv",)


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a command is given to end in seconds, and how it has to end."""

  added: tuple[str, ...] = ()
  code: int = 0
  words: tuple[str, ...] = ()
  devices: int = 1


# Of both stages and of the study, whose rows meet their data and programs.
SIZE = ["batch_size=8", f"data.demo.seed={runs.DEMO['seed']}"]
SIZE += [f"model.{k}={v}" for k, v in runs.STAGES.items()]
SMALL = [f"--config.pretrain.model.{k}={v}" for k, v in runs.MODEL.items()]
SMALL += [
  f"--config.pretrain.model.{k}={v}"
  for k, v in runs.PER_METHOD["avmae"].items()
]

SMALL_CAV = [
  f"--config.model.{k}={v}"
  for k, v in {**runs.MODEL, **runs.PER_METHOD["cavmae"]}.items()
]

# By the start of a command.
EXPECTED = {
  "python -m avjax.evaluate": Expected(words=("test/top1",)),
  "python -m avjax.embed": Expected(words=("embeddings.npz: 1 of 1",)),
  "python -m avjax.convert --list": Expected(words=("as-full-51.2.pth",)),
  "python -m avjax.convert": Expected(words=("family cavmae",)),
  "python -m avjax.sweep": Expected(
    ("--smoke", "--seeds=0", f"--overrides={','.join(SIZE)}"),
    words=("| pretrained_audiovisual |", "| pretrained_video |"),
  ),
  "python -m avjax.benchmark --compare": Expected(
    ("--demo", "--repeats=1", "--batch_size=6"),
    words=("| avsiam |", "| avmae |"),
  ),
  "python -m avjax.benchmark --page": Expected(
    ("uavm_vgg", "features", "--demo", "--repeats=1"),
    words=("| UAVM training on features", "| stored features"),
  ),
  "python -m avjax.benchmark --from_json": Expected(
    words=("| CAV-MAE pretraining", "| one picture, sound", "| `scan` |"),
  ),
  "python -m avjax.benchmark --config=configs/cavmae_audioset.py": Expected(
    ("remat_full", "--repeats=1", *SMALL_CAV), words=("| `remat_full` |",)
  ),
  # Of true width; two blocks a stack.
  "python -m avjax.speed_ratio": Expected(
    ("--depth=2", "--repeats=1"),
    words=("| cavmae |", "| avsiam |", "| stack |"),
  ),
  "python -m avjax.plan": Expected(
    tuple(SMALL), words=("| all-reduce over data |", "limit: ")
  ),
  "python -m avjax.benchmark": Expected(
    ("--repeats=1", *SMALL), words=("| step, synthetic batch |",)
  ),
  # Of the paper's size; tests/test_configs.py checks its shapes. It ends
  # where its clips would be read, all arguments being understood.
  "python -m avjax.main": Expected(
    code=2, words=("vggsound", "python -m data_prep.build"), devices=4
  ),
  "python -m data_prep.extract": Expected(words=("1 written",)),
  "python -m data_prep.subset": Expected(words=("retrieval.txt: 2 of 2",)),
  "python -m data_prep.build": Expected(words=("2 built, 1 missing file",)),
  "python -m data_prep.stats": Expected(words=("--config.data.fbank.mean=",)),
  "python -m data_prep.object_labels": Expected(
    words=("scored  ", "object_scores/vggsound")
  ),
  # Runs of CAV-MAE take minutes; tests/test_compare.py has small ones.
  "python -m avjax.compare": Expected(code=2, words=("runs/cavmae",)),
  "python -m data_prep.features": Expected(
    words=("stored", "features/vggsound")
  ),
  "python -m data_prep.show": Expected(words=("vggsound_video_test.png",)),
}


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
  lines = [line for block in blocks("bash") for line in block.splitlines()]
  return [line for line in lines if not line.startswith(WHOLE)]


@pytest.fixture(scope="module")
def place(demo_data, tmp_path_factory):
  """A folder that looks like the checkout after the main job, but tiny."""
  folder = tmp_path_factory.mktemp("checkout")
  for name in ("configs", "data_prep", "docs"):
    (folder / name).symlink_to(runs.ROOT / name)
  clip = av_demo.example_media(demo_data).read_bytes()
  (folder / "clip.mp4").write_bytes(clip)
  (folder / "videos").mkdir()
  for name in ("-aaaaaaaaaa_000030.mp4", "bbbbbbbbbbb_000007.mp4"):
    (folder / "videos" / name).write_bytes(clip)
  state = public_weights.draw(
    public_weights.cavmae_shapes(192, decoder=(128, 4))
  )
  state = {f"module.{k}": torch.from_numpy(v) for k, v in state.items()}
  torch.save(state, folder / "audio_model.pth")
  object_models.write_clap(folder / "clap")
  for name, channels in (("vgg_audio_feat", 1), ("convnext_base-6075fbad", 3)):
    state, _ = public_weights.convnext(channels)
    state = {k: torch.from_numpy(v) for k, v in state.items()}
    torch.save(state, folder / f"{name}.pth")
  names = object_labels.read_labels()
  object_models.write_yolo(folder / "yolov8x-oiv7.pt", names)
  with tarfile.open(folder / "videos.tar.gz", "w:gz") as archive:
    archive.add(folder / "clip.mp4", "bbbbbbbbbbb_000007.mp4")
  (folder / "videos/bbbbbbbbbbb_000007.mp4").unlink()
  (folder / "vggsound.csv").write_text(
    '-aaaaaaaaaa,30,"dog barking",test\nbbbbbbbbbbb,7,"people whistling",test\n'
    'ccccccccccc,1,"dog barking",test\n'
  )
  steps = [
    f"--config.{stage}.{item}"
    for stage in ("pretrain", "finetune")
    for item in (*sweep.SMOKE, *SIZE)
  ]
  call = [sys.executable, "-m", "avjax.main", *MAIN, *steps]
  done = run(call, folder, demo_data)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "| finetune | test/top1 |" in done.stdout
  assert "pictures of pretrain: runs/demo/pretrain/pictures" in done.stdout
  return folder


def run(call, folder, demo_data, devices=1):
  env = {**os.environ, "AVJAX_DATA": demo_data, "JAX_PLATFORMS": "cpu",
         "XLA_FLAGS": runs.xla_flags(devices),
         "PYTHONPATH": str(folder)}  # fmt: skip
  return subprocess.run(
    call, cwd=folder, env=env, capture_output=True, text=True, timeout=400
  )


def test_the_two_commands_are_there():
  for heading in ("Run it", "Test it"):
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)\n```", section, re.DOTALL)
    assert len(block.splitlines()) == 1


def check(line, place, demo_data):
  start = next((s for s in EXPECTED if line.startswith(s)), None)
  assert start, f"{line!r} is run by no test"
  expected = EXPECTED[start]
  call = [sys.executable, *shlex.split(line)[1:], *expected.added]
  done = run(call, place, demo_data, expected.devices)
  text = f"{line}\n{done.stdout}{done.stderr}"
  assert done.returncode == expected.code, text[-3000:]
  assert all(words in text for words in expected.words), text[-3000:]


def test_commands_and_snippets(place, demo_data):
  """One after the other: some read what others wrote."""
  for line in commands():
    check(line, place, demo_data)
  for code in blocks("python"):
    done = run([sys.executable, "-c", code], place, demo_data)
    assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
    assert done.stdout.strip()
