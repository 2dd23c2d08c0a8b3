"""Archives are unpacked into their folder and nowhere else."""

import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from avjax.errors import InputError
from data_prep import extract
from tests import runs

FILES = {"a/-x.mp4": b"video", "b.txt": b"words" * 1_000}


def tarred(path, mode="w:gz", more=()):
  with tarfile.open(path, mode) as file:
    for name, content in FILES.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
    for info in more:
      file.addfile(info, io.BytesIO(b"evil" if info.isreg() else b""))
  return path


def zipped(path, more=()):
  with zipfile.ZipFile(path, "w") as file:
    for name, content in FILES.items():
      file.writestr(name, content)
    for info in more:
      file.writestr(info, "evil")
  return path


def member(name, kind=tarfile.REGTYPE, link=""):
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, link
  info.size = 4 if kind == tarfile.REGTYPE else 0
  return info


def contents(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.mark.parametrize("name", ["m.tar", "m.tar.gz", "m.tar.xz", "m.zip"])
def test_archives_are_unpacked_and_not_twice(name, tmp_path):
  path, out = tmp_path / name, tmp_path / "-out"
  mode = f"w:{path.suffix[1:].replace('tar', '')}"
  zipped(path) if name.endswith("zip") else tarred(path, mode)
  found = extract.extract(path, out, max_bytes=10_000)
  assert found == {"written": list(FILES)}
  assert contents(out) == FILES
  (out / "b.txt").write_bytes(b"stopped here")
  found = extract.extract(path, out, max_bytes=10_000)
  assert found == {"there already": ["a/-x.mp4"], "written": ["b.txt"]}
  assert contents(out) == FILES


def test_tar_stays_inside(tmp_path):
  bad = [
    member("../evil"),
    member(str(tmp_path / "evil")),
    member("link", tarfile.SYMTYPE, str(tmp_path)),
    member("link/evil"),
    member("hard", tarfile.LNKTYPE, "../../evil"),
    member("device", tarfile.CHRTYPE),
  ]
  path, out = tarred(tmp_path / "m.tar", "w", bad), tmp_path / "inner" / "out"
  found = extract.extract(path, out, max_bytes=10_000)
  assert found["outside the folder"] == ["../evil", str(tmp_path / "evil")]
  assert found["link or device"] == ["link", "hard", "device"]
  # The link was not made, so this is a file in a folder of that name.
  assert contents(out) == {**FILES, "link/evil": b"evil"}
  assert sorted(os.listdir(tmp_path)) == ["inner", "m.tar"]


def test_zip_stays_inside(tmp_path):
  link = zipfile.ZipInfo("link")
  link.external_attr = 0o120777 << 16
  path = zipped(tmp_path / "m.zip", [zipfile.ZipInfo("../evil"), link])
  found = extract.extract(path, tmp_path / "out", max_bytes=10_000)
  assert found["outside the folder"] == ["../evil"]
  assert found["link or device"] == ["link"]
  assert contents(tmp_path / "out") == FILES


def test_link_that_is_there_leads_nowhere(tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (tmp_path / "else").mkdir()
  (out / "a").symlink_to(tmp_path / "else")
  found = extract.extract(tarred(tmp_path / "m.tgz"), out, max_bytes=10_000)
  assert found["outside the folder"] == ["a/-x.mp4"]
  assert not any((tmp_path / "else").iterdir())


@pytest.mark.parametrize("name", [".", "a/..", "a/../."])
def test_folder_itself_is_no_file(name, tmp_path):
  out = tmp_path / "inner" / "out"
  path = tarred(tmp_path / "m.tar", "w", [member(name)])
  found = extract.extract(path, out, max_bytes=10_000)
  assert found["outside the folder"] == [name]
  path = zipped(tmp_path / "m.zip", [zipfile.ZipInfo(name)])
  found = extract.extract(path, out, max_bytes=10_000)
  assert found["outside the folder"] == [name]
  assert os.listdir(tmp_path / "inner") == ["out"]
  assert contents(out) == FILES


def test_temporary_name_is_nobody_elses(tmp_path):
  """Neither a link that is there nor a member called alike is written to."""
  out = tmp_path / "out"
  (out / "a").mkdir(parents=True)
  (tmp_path / "mine").write_bytes(b"mine")
  (out / "b.txt.tmp").symlink_to(tmp_path / "mine")
  more = [member("c.mp4.tmp"), member("c.mp4")]
  extract.extract(tarred(tmp_path / "m.tar", "w", more), out, max_bytes=10_000)
  assert (tmp_path / "mine").read_bytes() == b"mine"
  assert (out / "b.txt").read_bytes() == FILES["b.txt"]
  assert (out / "c.mp4.tmp").read_bytes() == b"evil"
  assert len(os.listdir(out)) == 5  # no other is left


def test_nothing_is_left_of_a_member_that_fails(tmp_path):
  whole = tarred(tmp_path / "m.tar", "w").read_bytes()
  (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 4])
  with pytest.raises(InputError, match="cut.tar"):
    extract.extract(tmp_path / "cut.tar", tmp_path / "out", max_bytes=10_000)
  assert list(contents(tmp_path / "out")) == ["a/-x.mp4"]


def test_bad_archives_are_named(tmp_path):
  whole = tarred(tmp_path / "m.tar", "w").read_bytes()
  (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 4])
  (tmp_path / "text.zip").write_text("no archive")
  for name in ("cut.tar", "text.zip", "gone.tar"):
    with pytest.raises(InputError, match=f"{name} cannot be unpacked"):
      extract.extract(tmp_path / name, tmp_path / "out", max_bytes=10_000)
  assert "b.txt" not in contents(tmp_path / "out")
  with pytest.raises(InputError, match="more than 1e-06 GB.*--max_gb"):
    extract.extract(tmp_path / "m.tar", tmp_path / "out", max_bytes=1_000)


def damaged(path, position):
  """The file with one bit of one byte turned."""
  data = bytearray(path.read_bytes())
  data[position] ^= 4
  path.write_bytes(data)
  return path


@pytest.mark.parametrize("mode", ["", "gz", "xz"])
@pytest.mark.parametrize("fault", ["header", "boundary", "empty"])
def test_tar_without_its_end_is_damaged(mode, fault, tmp_path):
  """TarFile itself takes a bad header, or none, for the end."""
  plain = tarred(tmp_path / "m.tar", "w")
  # a/-x.mp4: header, content; b.txt: header at 1,024.
  if fault == "header":
    damaged(plain, 1_024 + 150)
  else:
    size = {"boundary": 1_024, "empty": 1_024 + 512 + 5_120}[fault]
    plain.write_bytes(plain.read_bytes()[:size])
  opener = {"": open, "gz": gzip.open, "xz": lzma.open}[mode]
  path = tmp_path / f"bad.tar.{mode}"
  with opener(path, "wb") as file:
    file.write(plain.read_bytes())
  count = 2 if fault == "empty" else 1
  words = f"bad.tar.* is damaged or cut short after {count} members"
  with pytest.raises(InputError, match=words):
    extract.extract(path, tmp_path / "out", max_bytes=10_000)


@pytest.mark.parametrize("mode", ["gz", "xz"])
@pytest.mark.parametrize("behind", [False, True])
def test_checksums_of_compressed_tars_are_verified(mode, behind, tmp_path):
  """Wrong bytes in a member, or only in what follows the last one."""
  content = np.random.default_rng(0).bytes(300_000)  # does not compress
  info = tarfile.TarInfo("x.mp4")
  info.size = len(content)
  path = tmp_path / f"m.tar.{mode}"
  with tarfile.open(path, f"w:{mode}") as file:
    file.addfile(info, io.BytesIO(content))
  whole = path.read_bytes()
  extract.extract(path, tmp_path / "out", max_bytes=10**6)
  # The checksum of gzip is in the last 8 bytes, that of xz in its last block.
  damaged(path, (-6 if mode == "gz" else -20) if behind else len(whole) // 2)
  with pytest.raises(InputError, match=f"m.tar.{mode} "):
    extract.extract(path, tmp_path / "new", max_bytes=10**6)
  # Else the sound archive would find it there already.
  assert contents(tmp_path / "new") == {}
  path.write_bytes(whole)
  found = extract.extract(path, tmp_path / "new", max_bytes=10**6)
  assert found == {"written": ["x.mp4"]}


def test_compressed_tar_that_is_cut_keeps_what_came_whole(tmp_path):
  content = np.random.default_rng(0).bytes(300_000)
  path = tmp_path / "m.tgz"
  more = tarfile.TarInfo("x.mp4")
  more.size = len(content)
  with tarfile.open(path, "w:gz") as file:
    for name in ("x.mp4", "y.mp4"):
      more.name = name
      file.addfile(more, io.BytesIO(content))
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) * 3 // 4])
  with pytest.raises(InputError, match="m.tgz cannot be unpacked: .* ended"):
    extract.extract(path, tmp_path / "out", max_bytes=10**6)
  assert contents(tmp_path / "out") == {"x.mp4": content}


def test_command(tmp_path):
  bad = tarred(tmp_path / "m.tar", "w", [member("../evil")])
  call = [sys.executable, "-m", "data_prep.extract", "--output", tmp_path / "o"]
  done = subprocess.run(
    [*call, bad], cwd=runs.ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "2 written, 1 outside the folder" in done.stderr
  assert "outside the folder: '../evil'" in done.stderr
  done = subprocess.run(call, cwd=runs.ROOT, capture_output=True, check=False)
  assert done.returncode == 2
