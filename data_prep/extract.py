"""python -m data_prep.extract --output=DIR ARCHIVE.tar.gz …

Unpacks .tar (.gz, .bz2, .xz) and .zip files of media into a folder, which is
what `data_prep.build --media` reads. Nothing is written outside the folder:
members with such a path, links and devices are passed over and listed. What is
there with its full size is not written again, so a stopped run goes on.
"""

import collections
import contextlib
import dataclasses
import lzma
import os
import pathlib
import shutil
import sys
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from absl import app, flags

from avjax import commands
from avjax.errors import InputError
from data_prep import progress, recorder

GIGABYTE = 10**9
# How gzip, bzip2, xz and LZMA files begin.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"]\0\0")
_UNREADABLE = (
  tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error,
  lzma.LZMAError, NotImplementedError, RuntimeError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Member:
  """One entry of an archive.

  Attributes:
    name: path in the archive.
    size: bytes of its content.
    problem: why it is not written; '' = it is a file.
    content: the archive's own handle of it.
  """

  name: str
  size: int
  problem: str
  content: Any


def extract(
  archive: pathlib.Path, folder: pathlib.Path, *, max_bytes: int
) -> dict[str, list[str]]:
  """Unpacks an archive.

  Args:
    archive: a tar or zip file.
    folder: where to; made if it is not there.
    max_bytes: of all members together, as the archive states them.

  Returns:
    Names by outcome: 'written', 'there already', 'outside the folder',
    'link or device'.

  Raises:
    InputError: the archive cannot be read to its end, a checksum of it is
      wrong, or it holds more than `max_bytes`. Files that may be wrong are
      removed: all those written by this call from a compressed tar, unless it
      is merely cut short.
  """
  outcomes: dict[str, list[str]] = collections.defaultdict(list)
  folder.mkdir(parents=True, exist_ok=True)
  total = 0
  try:
    with _open(archive) as (members, read):
      for member in members:
        total += member.size
        if total > max_bytes:
          raise InputError(
            f"{archive} holds more than {max_bytes / GIGABYTE:g} GB; allow it "
            "with --max_gb"
          )
        outcomes[_place(member, folder, read)].append(member.name)
  except _UNREADABLE as error:
    words = f"cannot be unpacked: {error}"
    if isinstance(error, _DamagedTar):
      count = sum(map(len, outcomes.values()))
      words = f"is damaged or cut short after {count} members"
    if _doubtful(archive, error):
      words += f"; {len(outcomes['written'])} files of it are removed again"
      for name in outcomes["written"]:
        recorder.inside(folder, name, "member").unlink(missing_ok=True)
    raise InputError(f"{archive} {words}") from error
  return dict(outcomes)


def _doubtful(archive: pathlib.Path, error: BaseException) -> bool:
  """Whether files that were written before the error may be wrong, too.

  A compressed tar has checksums of large blocks or of the whole alone. Where
  it is merely cut, or the disk is full (an error with a number), they are as
  good as those of a run that was stopped.
  """
  if isinstance(error, EOFError) or getattr(error, "errno", None):
    return False
  with archive.open("rb") as file:
    return file.read(8).startswith(_COMPRESSED)


def _place(member: Member, folder: pathlib.Path, read: Any) -> str:
  """Writes a member; what became of it."""
  if member.problem:
    return member.problem
  try:
    target = recorder.inside(folder, member.name, "member")
    # A link that was there before may lead out of the folder, too; and a name
    # such as `a/..` is the folder itself.
    if folder.resolve() not in target.resolve().parents:
      return "outside the folder"
  except (InputError, ValueError):
    return "outside the folder"
  if target.is_file() and target.stat().st_size == member.size:
    return "there already"
  target.parent.mkdir(parents=True, exist_ok=True)
  with _temporary(folder) as (temporary, copy):
    with read(member) as source:
      shutil.copyfileobj(source, copy, 1 << 20)
    copy.close()
    size = temporary.stat().st_size
    if size != member.size:
      raise EOFError(f"{member.name} has {size} of {member.size} bytes")
    temporary.replace(target)
  return "written"


@contextlib.contextmanager
def _temporary(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, Any]]:
  """A new file in the folder, open for writing; gone if it is not moved.

  No member can have guessed its name, and no link of that name is followed.
  """
  path = folder / f".{uuid.uuid4().hex}.tmp"
  exclusive = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
  try:
    with os.fdopen(os.open(path, exclusive, 0o666), "wb") as file:
      yield path, file
  finally:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _open(archive: pathlib.Path) -> Iterator[tuple[Iterator[Member], Any]]:
  """The members, and what reads one."""
  if zipfile.is_zipfile(archive):
    with zipfile.ZipFile(archive) as file:

      def open_zipped(member: Member) -> IO[bytes]:
        return file.open(member.content)

      yield _zipped(file), open_zipped
    return
  # In the order of its bytes.
  with tarfile.open(archive, tarinfo=_Header) as file:

    def open_tarred(member: Member) -> IO[bytes]:
      content = file.extractfile(member.content)
      if content is None:
        raise tarfile.ReadError(f"{member.name} has no content")
      return content

    yield _tarred(file), open_tarred


class _DamagedTar(tarfile.ReadError):
  """Neither a header nor the zeros that end a tar file."""


class _Header(tarfile.TarInfo):
  """A tar's header; TarFile takes a bad one behind the first for the end."""

  @classmethod
  def fromtarfile(cls, file: Any) -> tarfile.TarInfo:
    try:
      return super().fromtarfile(file)
    except tarfile.EOFHeaderError:  # zeros
      raise
    except tarfile.HeaderError as error:
      raise _DamagedTar(str(error)) from error


def _tarred(file: tarfile.TarFile) -> Iterator[Member]:
  for info in file:
    if not info.isdir():
      problem = "" if info.isreg() else "link or device"
      yield Member(info.name, info.size, problem, info)
  # Checksums of compressed files are verified at their ends.
  while file.fileobj.read(1 << 20):
    pass


def _zipped(file: zipfile.ZipFile) -> Iterator[Member]:
  for info in file.infolist():
    if not info.is_dir():
      # The upper half of the attributes is the Unix mode: 0o12 is a link.
      link = info.external_attr >> 28 == 0o12
      problem = "link or device" if link else ""
      yield Member(info.filename, info.file_size, problem, info)


def main(argv: Sequence[str]) -> None:
  """Unpacks the archives one after the other."""
  folder = pathlib.Path(flags.FLAGS.output).expanduser()
  archives = [pathlib.Path(name).expanduser() for name in argv[1:]]
  if not archives:
    raise InputError("name at least one archive")
  limit = round(flags.FLAGS.max_gb * GIGABYTE)
  for archive in progress.track(archives, len(archives), "archives"):
    outcomes = extract(archive, folder, max_bytes=limit)
    counts = [f"{len(names)} {word}" for word, names in outcomes.items()]
    print(f"{archive}: {', '.join(counts) or 'empty'}", file=sys.stderr)
    for word in ("outside the folder", "link or device"):
      for name in outcomes.get(word, ()):
        print(f"  {word}: {name!r}", file=sys.stderr)


def run(argv: list[str]) -> None:
  """`main`; bad input is one line and exit status 2."""
  try:
    main(argv)
  except InputError as error:
    commands.refuse(error)


if __name__ == "__main__":
  flags.DEFINE_string("output", None, "Folder to unpack into.")
  flags.DEFINE_float("max_gb", 4_000.0, "Largest content of an archive.")
  flags.mark_flag_as_required("output")
  app.run(run, flags_parser=commands.parse_flags)
