"""The files of object scores: what fits, what is refused, what is kept."""

import itertools
import json
import pickle

import numpy as np
import pytest

from avjax import config
from avjax.data import example, object_scores, pipeline, records
from avjax.data.object_scores import Scores, Writer
from avjax.errors import InputError

LABELS = ["Dog", "Cat", "Bell"]
SOURCE = {"model": "a.pt", "size": 640}


def writer(folder, clips, labels=LABELS, source=SOURCE, modality="audio"):
  return Writer(folder, modality, labels=labels, source=source, clips=clips)


def rows(count, first=0.0):
  values = first + np.arange(count * 3, dtype=np.float32) / 8
  return values.reshape(count, 3)


@pytest.fixture
def stored(tmp_path):
  """Scores of -a and b; c failed; d is missing."""
  with writer(tmp_path, ["-a", "b", "c", "d"]) as made:
    made.write(["b", "-a"], rows(2))
    made.fail("c", "no sound")
  return tmp_path


def test_scores_are_read_as_they_were_written(stored):
  found = Scores(stored, "audio")
  assert (found.labels, found.clips) == (LABELS, ["-a", "b", "c", "d"])
  assert found.source == SOURCE and found.failed == {"c": "no sound"}
  assert found.values.dtype == np.float16 and found.values.shape == (4, 3)
  np.testing.assert_array_equal(found.values[:2], rows(2)[::-1])
  assert np.isnan(found.values[2:]).all()
  assert found.done().tolist() == [True, True, False, False]
  assert found.rows(["d", "x", "-a"]).tolist() == [3, -1, 0]
  again = pickle.loads(pickle.dumps(found))
  np.testing.assert_array_equal(again.values, found.values)
  assert again.rows(["b"]).tolist() == [1]


def test_files_of_another_program_need_no_source(tmp_path):
  np.save(tmp_path / "video.npy", rows(1).astype(np.float16))
  said = {"labels": LABELS, "clips": ["é"]}
  (tmp_path / "video.json").write_text(
    json.dumps(said, ensure_ascii=False), encoding="utf-8"
  )
  found = Scores(tmp_path, "video")
  assert found.source == {} and found.failed == {}
  assert found.rows(["é"]).tolist() == [0]
  with pytest.raises(InputError, match="audio.json.*data_prep.object_labels"):
    Scores(tmp_path, "audio")


def test_what_was_made_is_kept_when_clips_are_added(stored):
  with writer(stored, ["e", "d", "-a", "e"]) as more:
    assert more.clips == ["-a", "b", "c", "d", "e"]
    assert more.missing() == ["d", "e"]  # of those asked for
    more.write(["e"], rows(1, first=2.0))
  found = Scores(stored, "audio")
  np.testing.assert_array_equal(found.values[:2], rows(2)[::-1])
  np.testing.assert_array_equal(found.values[4:], rows(1, first=2.0))
  assert found.failed == {"c": "no sound"}


def test_failures_are_asked_for_again_only_with_retry(stored):
  with writer(stored, ["b", "c", "d"]) as again:
    assert again.missing() == ["d"]
    again.retry()
    assert again.missing() == ["c", "d"]
    again.write(["c"], rows(1))
    again.fail("d", "corrupt")
  assert Scores(stored, "audio").failed == {"d": "corrupt"}
  with writer(stored, ["b"]) as other:
    other.retry()  # d is not asked for
  assert Scores(stored, "audio").failed == {"d": "corrupt"}


def test_growth_that_was_cut_short_does_no_harm(stored):
  """The array had grown, the JSON file had not."""
  before = (stored / "audio.json").read_bytes()
  writer(stored, ["x", "y"]).close()
  (stored / "audio.json").write_bytes(before)
  assert Scores(stored, "audio").values.shape == (4, 3)
  with writer(stored, ["d"]) as same:  # nothing is added: the file stays
    assert same.missing() == ["d"]
    same.write(["d"], rows(1))
  with writer(stored, ["y"]) as more:
    assert more.clips == ["-a", "b", "c", "d", "y"] and more.missing() == ["y"]
  assert Scores(stored, "audio").done().sum() == 3


@pytest.mark.parametrize(
  "change, words",
  [
    ({"labels": ["Dog", "Bell", "Cat"]}, r"other labels.*1: 'Cat' there, 'Be"),
    ({"labels": LABELS[:2]}, r"other labels \(3 there, 2 now"),
    ({"source": {**SOURCE, "model": "b.pt"}}, "source.*model: 'a.pt' there"),
    ({"labels": []}, "list of labels is empty"),
    ({"labels": ["Dog", "Cat", "Dog"]}, "'Dog' is listed twice"),
  ],
)
def test_other_labels_or_another_source_are_refused(stored, change, words):
  before = (stored / "audio.npy").read_bytes()
  with pytest.raises(InputError, match=words):
    writer(stored, ["new"], **change)
  assert (stored / "audio.npy").read_bytes() == before
  writer(stored, ["-a"]).close()  # the lock was given back


def test_a_later_version_of_the_library_may_go_on(stored):
  with writer(stored, ["new"], source={**SOURCE, "library": "yolo 9"}) as more:
    assert more.missing() == ["new"]
  assert Scores(stored, "audio").done().sum() == 2


def _cut(folder):
  path = folder / "audio.npy"
  path.write_bytes(path.read_bytes()[:-1])


def _json(**change):
  def apply(folder):
    path = folder / "audio.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

  return apply


def _array(make):
  return lambda folder: np.save(folder / "audio.npy", make())


DAMAGES = {
  "array cut": (_cut, "audio.npy"),
  "array gone": (lambda f: (f / "audio.npy").unlink(), "audio.npy"),
  "no array": (lambda f: (f / "audio.npy").write_bytes(b""), "audio.npy"),
  "pickle": (_array(lambda: np.array([{}], object)), "audio.npy"),
  "rank": (_array(lambda: np.zeros(4, np.float16)), r"\(4,\).*\(4, 3\)"),
  "dtype": (_array(lambda: np.zeros((4, 3))), "float64.*float16"),
  "few rows": (_array(lambda: np.zeros((3, 3), "f2")), r"\(3, 3\).*\(4, 3\)"),
  "columns": (_array(lambda: np.zeros((4, 2), "f2")), r"\(4, 2\).*\(4, 3\)"),
  "not JSON": (
    lambda f: (f / "audio.json").write_text("{"),
    "audio.json.*object_labels",
  ),
  "a list": (lambda f: (f / "audio.json").write_text("[]"), "'labels' is not"),
  "numbers": (_json(clips=[1, 2, 3, 4]), "'clips' is not a list of texts"),
  "twice": (_json(clips=["b", "c", "b", "d"]), "'clips' names 'b' twice"),
  "label twice": (_json(labels=["Dog"] * 3), "'labels' names 'Dog' twice"),
  "source": (_json(source="YOLO"), "'source' is not a table"),
  "failed": (_json(failed=["c"]), "'failed' is not a table"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_in_words(stored, damage):
  apply, words = DAMAGES[damage]
  apply(stored)
  with pytest.raises(InputError, match=words):
    Scores(stored, "audio")
  with pytest.raises(InputError, match=words):
    writer(stored, ["-a"])


def test_only_finite_scores_of_known_clips_are_written(stored):
  with writer(stored, ["d"]) as made:
    for bad in (np.nan, np.inf, 1e6):  # the last is infinite as float16
      with pytest.raises(ValueError, match="finite"):
        made.write(["d"], np.array([[0, bad, 0]], np.float32))
    with pytest.raises(ValueError, match="no row for clip 'x'"):
      made.write(["x"], rows(1))
    with pytest.raises(ValueError, match="no row for clip 'x'"):
      made.fail("x", "corrupt")
    assert made.missing() == ["d"]


def test_one_process_at_a_time_writes_a_modality(stored):
  first = writer(stored, ["d"])
  with pytest.raises(InputError, match="another process writes audio scores"):
    writer(stored, ["d"])
  writer(stored, ["d"], modality="video").close()
  assert Scores(stored, "audio").clips[3] == "d"  # reading needs no lock
  first.close()
  writer(stored, ["d"]).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="file"):
    writer(tmp_path / "file", ["a"])


def test_rows_are_looked_at_in_blocks(monkeypatch, stored):
  whole = Scores(stored, "audio").done()
  monkeypatch.setattr(object_scores, "BLOCK", 1)
  np.testing.assert_array_equal(Scores(stored, "audio").done(), whole)


def test_a_column_gives_the_scores_of_a_splits_clips(stored, caplog):
  ids = ["d", "b", "x", "-a"]
  column = object_scores.columns(stored, ids)["objects/audio"]
  assert "no scores of 2 of the 4 clips, such as 'd'" in caplog.text
  packed = pickle.dumps(column)
  for one in (column, pickle.loads(packed)):
    found = np.stack([one[number] for number in range(4)])
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[[1, 3]], rows(2))
    assert np.isnan(found[[0, 2]]).all()
  # Every worker gets a copy: rows, not two million names.
  assert b"-a" not in packed


def test_a_run_sees_no_scores_that_come_later(stored):
  column = object_scores.columns(stored, ["d", "b"])["objects/audio"]
  with writer(stored, ["d", "z"]) as more:
    more.write(["d", "z"], rows(2))
  assert np.isnan(column[0]).all() and np.isfinite(column[1]).all()


def test_a_row_that_is_not_all_finite_is_no_row(tmp_path):
  values = np.ones((4, 3), np.float16)
  values[0, 1], values[1, 1] = np.nan, np.inf
  np.save(tmp_path / "audio.npy", values)
  said = {"labels": LABELS, "clips": ["a", "b", "c", "d"]}
  (tmp_path / "audio.json").write_text(json.dumps(said))
  column = object_scores.columns(tmp_path, said["clips"])["objects/audio"]
  assert np.isnan([column[0], column[1]]).all()
  np.testing.assert_array_equal(column[2], values[2])


def test_clips_without_any_scores_are_refused(stored):
  with pytest.raises(InputError, match="0 of the 2 clips; at least 50%"):
    object_scores.columns(stored, ["x", "c"])


# --- In batches ---------------------------------------------------------------


def told(number):
  """Scores that tell the clip."""
  return np.float32([number, number / 2, -number])


@pytest.fixture(scope="module")
def scored_data(demo_data, tmp_path_factory):
  """A config's section, and the clips' numbers by id; the last has none."""
  data = config.data_section()
  data.update(dir=demo_data, variant="frames10", heads=(), threads=1)
  data.video.update(num_frames=1, size=16, resize=16)
  data.object_scores = str(tmp_path_factory.mktemp("scores"))
  ids = records.Split(data, "train").column("id").tolist()
  with writer(data.object_scores, ids[::-1], modality="video") as made:
    for number, name in enumerate(ids[:-1]):
      made.write([name], told(number)[None])
  return data, {name: number for number, name in enumerate(ids)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_holds_the_scores_of_its_clips(scored_data, workers):
  data, numbers = scored_data
  data = data.copy_and_resolve_references()
  data.workers = workers
  names = []
  batches = pipeline.train_batches(data, batch_size=24, seed=1)
  for batch in itertools.islice(batches, 2):
    assert set(batch) & {"objects/audio", "objects/video"} == {"objects/video"}
    for name, row in zip(batch["id"], batch["objects/video"], strict=True):
      last = numbers[name] == len(numbers) - 1
      expected = np.full(3, np.nan) if last else told(numbers[name])
      np.testing.assert_array_equal(row, expected)
    names += batch["id"]
  batches.close()
  assert sorted(names) == sorted(numbers)  # an epoch


def test_a_clip_that_stands_in_brings_its_own_scores(scored_data, monkeypatch):
  data, numbers = scored_data
  whole = example.from_record

  def from_record(record, *rest):
    if numbers[record.text("id")] % 4 == 0:
      raise ValueError("damaged")
    return whole(record, *rest)

  monkeypatch.setattr(example, "from_record", from_record)
  batch = next(pipeline.train_batches(data, batch_size=24, seed=1))
  for name, row in zip(batch["id"], batch["objects/video"], strict=True):
    assert numbers[name] % 4 and np.nansum(row[0]) in (0, numbers[name])


def test_evaluation_needs_no_scores(scored_data, tmp_path):
  data, _ = scored_data
  data = data.copy_and_resolve_references()
  data.object_scores = str(tmp_path / "gone")
  batches = pipeline.eval_batches(data, split="test", batch_size=8)
  assert not any(key.startswith("objects/") for key in next(batches))
  with pytest.raises(InputError, match=r"gone/audio\.json"):
    next(pipeline.train_batches(data, batch_size=8, seed=1))
