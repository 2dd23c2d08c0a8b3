"""Apache Beam builds what worker processes build."""

import sys

import pytest

from avjax.errors import InputError
from tests.test_parts import (
  build,
  media,  # noqa: F401 (a fixture)
  records,
  report,
  small_parts,  # noqa: F401 (a fixture)
)


def test_direct_runner_builds_the_same(media, tmp_path, capsys):  # noqa: F811
  here = build(media, tmp_path / "here")
  there = build(media, tmp_path / "there", beam=("runner=DirectRunner",))
  assert "7 rows in" in capsys.readouterr().err
  for split in ("train", "test"):
    assert records(here, split) == records(there, split)
  assert report(here) == report(there)
  assert [p.name for p in (tmp_path / "there").iterdir()] == ["folder"]
  # How it was built does not matter when it is to grow.
  assert build(media, tmp_path / "there") == there


def test_workers_may_be_other_processes(media, tmp_path):  # noqa: F811
  flags = (
    "runner=DirectRunner",
    "direct_running_mode=multi_processing",
    "direct_num_workers=2",
  )
  built = build(media, tmp_path, beam=flags)
  assert report(built)["train"]["counts"]["built"] == 5


def test_unknown_runner_is_refused(media, tmp_path):  # noqa: F811
  with pytest.raises(InputError, match="DirctRunner.*DirectRunner"):
    build(media, tmp_path, beam=("runner=DirctRunner",))
  assert list(tmp_path.iterdir()) == []


def test_missing_package_names_the_extra(
  media,  # noqa: F811
  tmp_path,
  monkeypatch,
):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(InputError, match=r"pip install -e '.\[beam\]'"):
    build(media, tmp_path, beam=())


def test_part_that_nobody_made_is_an_error(media, tmp_path, monkeypatch):  # noqa: F811
  from data_prep import beam

  monkeypatch.setattr(beam, "_run", lambda *_: None)
  with pytest.raises(RuntimeError, match="is not finished: do its workers see"):
    build(media, tmp_path, beam=())
