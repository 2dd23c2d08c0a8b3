"""Retrieval subsets by rule and by somebody's list."""

import collections
import json
import subprocess
import sys

import numpy as np
import pytest

from avjax.errors import InputError
from data_prep import subset
from tests import runs


def test_five_of_each_of_309_classes():
  rng = np.random.default_rng(0)
  labels = [[int(k)] for k in rng.permutation(np.arange(309).repeat(7))]
  chosen = subset.select(labels, per_class=5)
  assert len(chosen) == len(set(chosen)) == 1_545
  counts = collections.Counter(labels[number][0] for number in chosen)
  assert set(counts.values()) == {5}
  assert chosen == subset.select(labels, per_class=5)
  assert chosen != subset.select(labels, per_class=5, seed=1)


def test_345_classes_of_many_labels():
  rng = np.random.default_rng(0)
  labels = [
    rng.choice(527, rng.integers(1, 4), replace=False).tolist()
    for _ in range(20_000)
  ]
  chosen = subset.select(labels, per_class=5, classes=345)
  assert len(chosen) == len(set(chosen)) == 1_725


def test_rare_classes_choose_first():
  """Class 1 would go empty-handed if class 0 took its only clip."""
  labels = [[0, 1], [0], [0]]
  assert 0 in subset.select(labels, per_class=1)
  assert subset.select(labels, per_class=1, classes=1, seed=2) != []
  assert subset.select([[0], [], [0]], per_class=5) == [0, 2]


@pytest.mark.parametrize(
  "name, text",
  [
    ("a.json", json.dumps({"data": [{"video_id": "-a_30"}, {"id": "b"}]})),
    ("b.json", json.dumps(["-a_30", "b"])),
    ("c.txt", "\ufeff-a_30\r\nb\r\n\r\n"),
    ("d.csv", "video_id,label\n-a_30,dog\nb,cat\n"),
    ("e.csv", "YTID, start\n-a, 30\nb\n"),
    ("f.csv", "# Segments csv\n# num_ytids=2\n# YTID, start\n-a, 30\nb\n"),
    ("g.txt", "#made by hand, 2\n-a_30\n # the rest\nb\n"),
  ],
)
def test_lists_of_many_forms(name, text, tmp_path):
  (tmp_path / name).write_text(text, encoding="utf-8")
  assert subset.read_list(tmp_path / name) == ["-a_30", "b"]


@pytest.mark.parametrize(
  "text, words",
  [
    ("", "holds no id"),
    ("[1]", "a clip without video_id: 1"),
    ('{"clips": []}', "one under 'data'"),
    ('{"data": [}', "line 1: expected JSON"),
  ],
)
def test_bad_lists_are_named(text, words, tmp_path):
  (tmp_path / "list").write_text(text)
  with pytest.raises(InputError, match=f"list.*{words}"):
    subset.read_list(tmp_path / "list")


def test_ids_fit_however_they_are_written():
  built = ["-a_b_000030", "-a_b_000040", "c_d", "eee_000010"]
  wanted = ["-a_b_30", "-a_b_000040.mp4", "c_d", "eee", "-a_b", "gone_000001"]
  assert subset.look_up(wanted, built) == {
    "-a_b_30": "-a_b_000030",
    "-a_b_000040.mp4": "-a_b_000040",
    "c_d": "c_d",
    "eee": "eee_000010",
  }


def test_starts_are_left_away_where_ids_are_videos(tmp_path):
  """AudioSet's ids; its tables have whole or broken starts, and a label."""
  path = tmp_path / "list.csv"
  text = '# YTID, start, end, labels\n-a_b, 30, 40, "/m/09x0r"\nc_7, 0, 10\n'
  path.write_text(text + "d, 5.000, 15.000\ne, 5.500, 15.500\nf, 30, 40\n")
  built = ["-a_b", "c_7", "d", "e", "f_000030", "f_000040", "c_7_000100"]
  wanted = subset.read_list(path)
  found = subset.look_up(wanted, built)
  assert list(found.values()) == ["-a_b", "c_7", "d", "e", "f_000030"]
  # Another part of the video is another clip.
  assert subset.look_up(["f_50", "c_7_200"], built[4:]) == {}


def test_command_writes_what_the_evaluator_reads(demo_data, tmp_path):
  def run(*flags):
    call = [
      sys.executable, "-m", "data_prep.subset", "--dataset=av_demo",
      "--split=train", f"--data_dir={demo_data}", *flags,
    ]  # fmt: skip
    return subprocess.run(
      call, cwd=runs.ROOT, capture_output=True, text=True, check=False
    )

  done = run("--per_class=1", f"--output={tmp_path / 'ids.txt'}")
  assert done.returncode == 0, done.stderr
  assert "24 of 48 clips" in done.stdout
  ids = (tmp_path / "ids.txt").read_text().splitlines()
  assert len(set(ids)) == 24
  (tmp_path / "theirs.json").write_text(json.dumps([*ids[:2], "-gone"]))
  done = run(f"--list={tmp_path}/theirs.json", f"--output={tmp_path}/two.txt")
  assert "1 of 3 ids have no built clip: '-gone'" in done.stderr
  assert (tmp_path / "two.txt").read_text().splitlines() == ids[:2]
