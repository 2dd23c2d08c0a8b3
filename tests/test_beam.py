"""Apache Beam builds what worker processes build."""

import sys

import pytest

from avjax.errors import InputError
from data_prep import beam
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
  assert "7 clips in" in capsys.readouterr().err
  for split in ("train", "test"):
    assert records(here, split) == records(there, split)
  assert report(here) == report(there)
  assert [p.name for p in (tmp_path / "there").iterdir()] == ["folder"]
  # How it was built does not matter when it is to grow.
  assert build(media, tmp_path / "there") == there


def test_options_reach_the_pipeline(capsys):
  flags = (
    "runner=DirectRunner",
    "direct_running_mode=multi_processing",
    "direct_num_workers=2",
    "job_name=x",
    "-flink_mastr=a:1",
  )
  options = beam._pipeline(flags).options.get_all_options()
  assert options["direct_running_mode"] == "multi_processing"
  assert (options["direct_num_workers"], options["job_name"]) == (2, "x")
  words = "'--flink_mastr' is no option of Beam's own; did you mean "
  assert words in capsys.readouterr().err
  with pytest.raises(InputError, match="direct_num_workers=two: a value does"):
    beam._pipeline(("direct_num_workers=two",))


def test_workers_may_be_other_processes(media, tmp_path):  # noqa: F811
  """Beam's own local runner, in two processes beside this one."""
  flags = (
    "runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner",
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


class Nothing:
  """A pipeline's result that made nothing."""

  def wait_until_finish(self):
    """It has ended."""


def test_part_that_nobody_made_is_an_error(media, tmp_path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(beam, "_start", lambda *_: Nothing())
  monkeypatch.setattr(beam, "LATE", 0.1)
  with pytest.raises(RuntimeError, match="is not finished: do its workers see"):
    build(media, tmp_path, beam=())


def test_failure_in_a_worker_is_raised(media, tmp_path, monkeypatch):  # noqa: F811
  def fail(*_):
    raise OSError("no space left")

  monkeypatch.setattr(beam, "_start", fail)
  with pytest.raises(OSError, match="no space left"):
    build(media, tmp_path, beam=())
