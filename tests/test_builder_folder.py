"""A user's own folder of media, with and without a table."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

import avjax
from avjax import train
from avjax.errors import InputError
from data_prep import folder
from tests import runs
from tests.test_builders_captioned import (
  captions,
  clips,
  encode,
  make,
  movie,
  report,
  sound,
)


@pytest.fixture(scope="module")
def short():
  """An MP4 file of one second."""
  return encode(1.0)


@pytest.fixture
def own(short, tmp_path):
  """A folder of media and other files."""
  place = tmp_path / "own"
  for name in ("b/-x.mp4", "b/y.mp4", "a.mp4", "c \xe9/z.mp4"):
    movie(place / name, short)
  sound(place / "a.wav")
  (place / "b/broken.mp4").write_bytes(b"no media" * 100)
  (place / "notes.txt").write_text("no media")
  return place


TABLE = (
  "\ufeffpath,labels,caption,split,start,end\r\n"
  'b/-x.mp4,dog | cat,"a dog, and a cat",,,\r\n'
  "b/y.mp4,bird;dog,a bird,train,0.2,0.8\r\n"
  'b/-x.mp4,, "what barks?",train,,\r\n'
  "gone.mp4,cat,,train,,\r\n"
  "b/broken,cat,,train,,\r\n"
  "b/y.mp4,cat,,train,0.5,\r\n"
  "./c \xe9/z,cat,,train,,\r\n"
  "b/y.mp4,bird,,test,,\r\n"
  "a.mp4,bird,,test,,\r\n"
  "a.mp4,bird,,train,,\r\n"
)


def test_folder_with_a_table_trains(own, tmp_path):
  (own / "annotations.csv").write_bytes(TABLE.encode())
  place = make(folder.Folder, own, tmp_path / "data")
  assert report(place, "train") == {
    "built": ["b/-x", "b/y@0.2-0.8", "b/y@0.5-", "c \xe9/z", "a"],
    "missing file": ["gone"],
    "corrupt": ["b/broken"],
  }
  assert report(place, "test") == {"built": ["b/y", "a"]}
  names = tfds.builder_from_directory(place).info.metadata["classes"]["label"]
  assert names == ["bird", "cat", "dog"]
  built = clips(place, "train")
  assert list(built["b/-x"]["label"]) == [2, 1]
  assert captions(built["b/-x"]) == ["a dog, and a cat", "what barks?"]
  cut = built["b/y@0.2-0.8"]
  assert (cut["start"], cut["end"]) == pytest.approx((0.2, 0.8))
  assert list(cut["label"]) == [0, 2]
  stage = runs.stage(
    "avmae_vgg", data__name="folder", data__dir=str(tmp_path / "data")
  )
  stage.total_steps, stage.batch_size = 1, 4
  workdir = tmp_path / "run"
  scores = train.train_and_evaluate(runs.plain(stage), workdir)
  assert scores and np.isfinite(list(scores.values())).all()
  assert np.isfinite(runs.losses(workdir)[1])


def test_own_classes_are_learnt_and_kept_with_the_model(own, tmp_path):
  (own / "annotations.csv").write_bytes(TABLE.encode())
  make(folder.Folder, own, tmp_path / "data")
  stage = runs.stage(
    "avmae_vgg_finetune", data__name="folder", data__dir=str(tmp_path / "data")
  )
  stage.total_steps, stage.batch_size = 1, 4
  scores = train.train_and_evaluate(runs.plain(stage), tmp_path / "run")
  assert 0 <= scores["test/top1"] <= 1
  shutil.rmtree(tmp_path / "data")
  model = avjax.load(tmp_path / "run")
  ((first, *rest),) = model.classify(str(own / "b/y.mp4"))
  assert {name for name, _ in (first, *rest)} == {"bird", "cat", "dog"}


def test_ids_do_not_depend_on_the_files(own, tmp_path):
  (own / "annotations.csv").write_text(
    "path,labels\na.mp4,dog\na.wav,dog\nzz,cat\nb/y.mp4,cat\n"
  )
  place = make(folder.Folder, own, tmp_path / "data")
  ids = {"built": ["a.mp4", "a.wav", "b/y"], "missing file": ["zz"]}
  assert report(place, "train") == ids
  # What comes later is found in a subfolder.
  shutil.copy(own / "a.mp4", own / "b/zz.mp4")
  shutil.copy(own / "a.wav", own / "b/y.wav")
  assert make(folder.Folder, own, tmp_path / "data") == place
  assert report(place, "train") == {"built": ["a.mp4", "a.wav", "b/y", "zz"]}


def test_folder_without_a_table(own, tmp_path):
  place = make(folder.Folder, own, tmp_path / "data")
  assert report(place, "train") == {
    "built": ["a.mp4", "a.wav", "b/-x.mp4", "b/y.mp4", "c \xe9/z.mp4"],
    "corrupt": ["b/broken.mp4"],
  }
  assert dict(tfds.builder_from_directory(place).info.splits).keys() == {
    "train"
  }


BAD = {
  "column": (
    "t.csv", "path,lables\na.mp4,x\n",
    "column of .*t.csv 'lables'. Did you mean 'labels'",
  ),
  "no path": (
    "t.csv", "labels\nx\n", "a header with the columns path, found 'labels'",
  ),
  "start": (
    "t.csv", "path,start\na.mp4,1\nb/y.mp4,soon\n",
    "t.csv line 3: expected a number >= 0 as start, found 'soon'",
  ),
  "order": (
    "t.csv", "path,start,end\na.mp4,2.5,1\n",
    "t.csv line 2: .*after the start, found 'start 2.5 and end 1'",
  ),
  "split": (
    "t.csv", "path,split\na.mp4,tests\n",
    "t.csv line 2 'tests'. Did you mean 'test'",
  ),
  "outside": (
    "t.csv", "path\n../a.mp4\n", "'../a.mp4' is not inside",
  ),
  "fields": (
    "t.csv", "path,caption\na.mp4,a dog, a cat\n",
    "t.csv line 2: expected 2 fields",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_malformed_rows_are_named(name, own, tmp_path):
  file, text, words = BAD[name]
  path = tmp_path / file
  path.write_text(text)
  with pytest.raises(InputError, match=words):
    make(folder.Folder, own, tmp_path / "data", path)
