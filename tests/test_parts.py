"""Builds that are stopped, go on, and grow."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from avjax.data import demo_clip
from avjax.errors import InputError
from data_prep import builder, decode, media_files, parts, recorder
from tests import runs

NAMES = [f"-clip {k}" for k in range(7)]


class Tiny(builder.ClipBuilder, skip_registration=True):
  """Seven clips of which one may be missing."""

  name = "folder"
  VERSION = tfds.core.Version("1.0.0")

  def classes(self):
    return {"label": ("cat", "dog")}

  def rows(self):
    whole = [
      builder.Row(name, f"{name}.mp4", labels=("dog",)) for name in NAMES
    ]
    return {"train": whole[:5], "test": whole[5:]}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  rng = np.random.default_rng(0)
  for k, name in enumerate(NAMES):
    frames = np.full((8, 32, 48, 3), 20 * k, np.uint8)
    wave = rng.integers(-900, 900, 5_120).astype(np.int16)
    (folder / f"{name}.mp4").write_bytes(demo_clip.encode(frames, wave))
  return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  monkeypatch.setattr(parts, "ROWS", 2)


def build(media, folder, **options):
  return builder.build(
    Tiny, builder.Options(media=media, workers=0, **options), data_dir=folder
  )


def records(folder, split="train"):
  source = tfds.builder_from_directory(folder).as_data_source(split)
  return [(r["id"].decode(), r["waveform"].tobytes()) for r in source]


def report(folder):
  return json.loads((folder / "report.json").read_text())["splits"]


def decoded(monkeypatch):
  """Names of the files that are decoded from now on."""
  found, encode = [], decode.encode

  def spy(task):
    found.append(os.path.basename(task.path))
    return encode(task)

  monkeypatch.setattr(decode, "encode", spy)
  return found


def stop_at_test(monkeypatch, media, folder):
  """A build that is interrupted before the parts of the split `test`."""
  write = parts.Part.write

  def interrupted(part, results, cores):
    if part.split == "test":
      raise KeyboardInterrupt
    write(part, results, cores)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(parts.Part, "write", interrupted)
    build(media, folder)


def test_killed_build_goes_on_with_the_next_part(media, tmp_path, monkeypatch):
  code = (
    "import os, pathlib, signal, sys\n"
    "from data_prep import parts\n"
    "from tests import test_parts\n"
    "parts.ROWS, write = 2, parts.Part.write\n"
    "def dying(part, results, cores):\n"
    "  if part.split == 'test':\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
    "  write(part, results, cores)\n"
    "parts.Part.write = dying\n"
    "media, folder = map(pathlib.Path, sys.argv[1:])\n"
    "test_parts.build(media, folder)\n"
  )
  env = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
  call = [sys.executable, "-c", code, str(media), str(tmp_path / "killed")]
  done = subprocess.run(call, env=env, capture_output=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
  assert not list((tmp_path / "killed").glob("folder/*/*"))
  found = decoded(monkeypatch)
  resumed = build(media, tmp_path / "killed")
  assert found == [f"{name}.mp4" for name in NAMES[5:]]
  whole = build(media, tmp_path / "whole")
  for split in ("train", "test"):
    assert records(resumed, split) == records(whole, split)
  assert report(resumed) == report(whole)
  assert [p.name for p in (tmp_path / "killed").iterdir()] == ["folder"]


def test_other_options_do_not_use_the_parts(media, tmp_path, monkeypatch):
  stop_at_test(monkeypatch, media, tmp_path)
  found = decoded(monkeypatch)
  build(media, tmp_path, short_side=16)
  assert len(found) == len(NAMES)


def test_second_run_adds_what_was_missing(media, tmp_path, monkeypatch, capsys):
  some = tmp_path / "media"
  shutil.copytree(media, some)
  (some / f"{NAMES[1]}.mp4").unlink()
  for name in NAMES[5:]:
    (some / f"{name}.mp4").unlink()
  built = build(some, tmp_path)
  assert report(built)["train"]["counts"]["missing file"] == 1
  assert [name for name, _ in report(built)["test"]["missing file"]] == NAMES[
    5:
  ]
  before = records(built)
  assert list(tfds.builder_from_directory(built).info.splits) == ["train"]

  found = decoded(monkeypatch)
  shutil.copytree(media, some, dirs_exist_ok=True)
  assert build(some, tmp_path) == built
  assert found == [f"{name}.mp4" for name in (NAMES[1], *NAMES[5:])]
  after = records(built)
  assert after[:4] == before
  assert [name for name, _ in after[4:]] == [NAMES[1]]
  assert [name for name, _ in records(built, "test")] == NAMES[5:]
  for split, count in (("train", 5), ("test", 2)):
    entry = report(built)[split]
    assert entry["rows"] == entry["counts"]["built"] == count
    with np.load(built / f"index_{split}.npz") as index:
      assert index["id"].tolist() == [n for n, _ in records(built, split)]
      assert index["label_ends"].tolist() == list(range(1, count + 1))

  capsys.readouterr()
  assert build(some, tmp_path) == built
  assert len(found) == 3
  assert "has all there is" in capsys.readouterr().err


class Nested(Tiny, skip_registration=True):
  """Files are searched for, as most data sets do."""

  def rows(self):
    files = media_files.index(self.options.media)
    return {
      split: [
        dataclasses.replace(row, file=media_files.find(files, [row.file]))
        for row in rows
      ]
      for split, rows in super().rows().items()
    }


@pytest.mark.parametrize("place", ["", "deep/er"])
def test_stopped_build_adds_what_has_come_since(
  place, media, tmp_path, monkeypatch
):
  monkeypatch.setattr(sys.modules[__name__], "Tiny", Nested)
  some = tmp_path / "media"
  shutil.copytree(media, some)
  (some / f"{NAMES[1]}.mp4").unlink()

  stop_at_test(monkeypatch, some, tmp_path)
  (some / place).mkdir(parents=True, exist_ok=True)
  shutil.copy(media / f"{NAMES[1]}.mp4", some / place)
  found = decoded(monkeypatch)
  built = build(some, tmp_path)
  assert found == [f"{name}.mp4" for name in (*NAMES[5:], NAMES[1])]
  entry = report(built)["train"]
  assert entry["rows"] == entry["counts"]["built"] == 5
  assert records(built)[4][0] == NAMES[1]


def test_file_that_moved_is_decoded_again(media, tmp_path, monkeypatch):
  stop_at_test(monkeypatch, media, tmp_path)
  rows = Tiny.rows

  def elsewhere(self):
    splits = rows(self)
    splits["train"][0] = dataclasses.replace(splits["train"][0], end=0.1)
    return splits

  found = decoded(monkeypatch)
  monkeypatch.setattr(Tiny, "rows", elsewhere)
  build(media, tmp_path)
  assert found == [f"{name}.mp4" for name in (*NAMES[:2], *NAMES[5:])]


def test_rows_that_are_gone_or_changed_are_refused(
  media, tmp_path, monkeypatch
):
  build(media, tmp_path)
  rows = Tiny.rows
  monkeypatch.setattr(
    Tiny, "rows", lambda self: {"train": rows(self)["train"][1:]}
  )
  with pytest.raises(
    InputError,
    match="1 clips .*'train' are not in the annotations any more: "
    "'-clip 0'; pass --overwrite",
  ):
    build(media, tmp_path)

  def relabelled(self):
    splits = rows(self)
    row = splits["test"][0]
    splits["test"][0] = dataclasses.replace(row, captions=("other",))
    return splits

  monkeypatch.setattr(Tiny, "rows", relabelled)
  with pytest.raises(
    InputError, match="1 clips .*'test' have other labels .*: '-clip 5'"
  ):
    build(media, tmp_path)


def test_set_of_an_earlier_version_grows(media, tmp_path):
  """Its index says nothing of labels and captions."""
  some = tmp_path / "media"
  shutil.copytree(media, some)
  (some / f"{NAMES[1]}.mp4").unlink()
  built = build(some, tmp_path)
  for split in ("train", "test"):
    with np.load(built / f"index_{split}.npz") as index:
      columns = {k: index[k] for k in index if k != "digest"}
    np.savez_compressed(built / f"index_{split}.npz", **columns)
  shutil.copytree(media, some, dirs_exist_ok=True)
  build(some, tmp_path)
  assert report(built)["train"]["counts"]["built"] == 5
  with np.load(built / "index_train.npz") as index:
    assert len(index["digest"]) == 5


def test_two_processes_may_make_the_same_part(media, tmp_path):
  """The first to end names its files; the other's are removed."""
  row = builder.Row(NAMES[0], f"{NAMES[0]}.mp4", labels=("dog",))
  part = parts.Part("train", [row], tmp_path / "train-1.array_record")
  maker = recorder.Recorder(
    builder.Options(media=media), "video", {"label": ("cat", "dog")}
  )

  def slow():
    maker.make(part)  # another process, in the middle of this one's work
    yield None, parts.Tally()

  part.write(slow())
  assert part.finished and part.tally().lists["built"] == [NAMES[0]]
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
    [part.records.name, "train-1.json"]
  )


def test_added_class_is_named(media, tmp_path, monkeypatch):
  build(media, tmp_path)
  more = {"label": ("cat", "dog", "yak")}
  monkeypatch.setattr(Tiny, "classes", lambda self: more)
  with pytest.raises(InputError, match="2 classes of label -> 3; new: 'yak'"):
    build(media, tmp_path)


def test_table_of_outcomes():
  tally = parts.Tally()
  tally.lists["built"] = ["a"]
  tally.lists["missing file"] = [[f"-{k}", "is not a file"] for k in range(6)]
  tally.lists["duplicate"] = ["a"]
  head, row, *more = parts.table({"test": tally}).splitlines()
  assert head.split("  ") == [
    "split", "rows", "built", "missing file", "no audio", "no video", "corrupt",
    "too short", "duplicate",
  ]  # fmt: skip
  assert row.split() == ["test", "8", "1", "6", "0", "0", "0", "0", "1"]
  assert more == [
    "test, missing file: '-0', '-1', '-2', '-3', '-4', …",
    "test, duplicate: 'a'",
  ]


def test_rate_is_printed(media, tmp_path, capsys):
  build(media, tmp_path)
  assert re.search(
    r"folder: 7 clips in \d+ s of one core, [\d.]+ clips/s/core",
    capsys.readouterr().err,
  )


def test_set_that_was_put_aside_comes_back(media, tmp_path, monkeypatch):
  """A kill between the two renames at the end of a run that adds."""
  built = build(media, tmp_path)
  before = records(built)
  work = tmp_path / ".building-folder-video"
  work.mkdir()
  built.rename(work / "former")
  found = decoded(monkeypatch)
  assert build(media, tmp_path) == built
  assert found == [] and records(built) == before
  assert [p.name for p in tmp_path.iterdir()] == ["folder"]
  # Killed after the second rename: there is nothing to bring back.
  shutil.copytree(built, work / "former")
  assert build(media, tmp_path) == built
  assert not work.exists()


def test_one_build_at_a_time(media, tmp_path):
  work = tmp_path / ".building-folder-video"
  work.mkdir()
  with (work / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process builds in"):
      build(media, tmp_path)
