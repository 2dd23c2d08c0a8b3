"""Files of weights: PyTorch, safetensors, npz, Flax msgpack and our own.

No code of a file ever runs: PyTorch files are read with `weights_only=True`,
npz files without pickle, and the other formats hold arrays alone.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from avjax import trees
from avjax.errors import InputError, lookup
from avjax.weights import scenic
from avjax.workdir import replacing

Arrays = dict[str, np.ndarray]
Path = str | os.PathLike[str]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Where training programs keep the parameters beside epoch, optimiser, ….
WRAPPERS = ("model", "state_dict", "model_state_dict")
_METADATA = "__metadata__"  # entry of an npz file


def read(path: Path) -> Arrays:
  """Every array of a file under the file's own names.

  Formats: `.pth`, `.pt`, `.bin` (PyTorch; `model` or `state_dict` unwrapped,
  a `module.` before all names taken off), `.safetensors`, `.npz`, Flax msgpack
  (`.msgpack`, `.flax` or no known suffix; parameters alone, '/'-joined), a run
  or checkpoint of ours (a folder; averaged parameters where it keeps some).

  Returns:
    Arrays in the dtype of the file, bfloat16 too. Those of a PyTorch file may
    be views of the file itself: do not write to them.

  Raises:
    InputError: no such file; it is damaged, of another format, or holds
      objects that only pickle could read. Names the file.
  """
  file = pathlib.Path(path).expanduser()
  if file.is_dir():
    from avjax import initialise  # which reads files through this module

    return _plain(trees.flatten(initialise.read(file).params), file)
  if not file.is_file():
    raise InputError(f"no weights file {file}")
  arrays = _reader(file)(file)
  if not arrays:
    raise InputError(f"{file} holds no arrays")
  return _plain(arrays, file)


def metadata(path: Path) -> dict[str, str]:
  """What `write` was given beside the arrays; {} for other files."""
  file = pathlib.Path(path).expanduser()
  if file.suffix == ".safetensors":
    with _in_words(file), safetensors.safe_open(file, "numpy") as opened:
      return dict(opened.metadata() or {})
  if file.suffix == ".npz":
    with _in_words(file), np.load(file, allow_pickle=False) as opened:
      if _METADATA in opened.files:
        return dict(json.loads(str(opened[_METADATA])))
  return {}


def write(
  path: Path,
  arrays: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes `.safetensors`, `.npz`, or `.pth` (no metadata there).

  The file appears under its name once it is complete; what stood there before
  stays whole until then.

  Raises:
    InputError: another suffix, or `.pth` without PyTorch.
  """
  file = pathlib.Path(path).expanduser()
  write_to = lookup(WRITERS, file.suffix, "suffix of a weights file to write")
  file.parent.mkdir(parents=True, exist_ok=True)
  tidy = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
  # `ascontiguousarray` makes a scalar one of rank 1.
  tidy = {name: x.reshape(np.shape(arrays[name])) for name, x in tidy.items()}
  with replacing(file) as unfinished:
    write_to(unfinished, tidy, dict(metadata or {}))


def torch_library() -> Any:
  """The module `torch`.

  Raises:
    InputError: it is not installed; names the extra.
  """
  try:
    return importlib.import_module("torch")
  except ImportError as error:
    raise InputError(
      "PyTorch files need the extra `torch`: pip install -e '.[torch]'"
    ) from error


# --- Reading -----------------------------------------------------------------


def _reader(file: pathlib.Path) -> Callable[[pathlib.Path], Arrays]:
  """By suffix; by the first bytes where the suffix says nothing."""
  if file.suffix in READERS:
    return READERS[file.suffix]
  if zipfile.is_zipfile(file):
    with _in_words(file), zipfile.ZipFile(file) as archive:
      torch = any(name.endswith("/data.pkl") for name in archive.namelist())
    return _read_torch if torch else _read_npz
  return _read_msgpack


def _read_torch(file: pathlib.Path) -> Arrays:
  torch = torch_library()
  zipped = zipfile.is_zipfile(file)
  with _in_words(file):
    if zipped:
      with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()  # PyTorch itself checks no checksum.
        if bad:
          raise zipfile.BadZipFile(f"the checksum of {bad} differs")
    tree = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(tree, Mapping):
      raise InputError(f"{file} holds {_kind(tree)}, not named tensors")
    return {
      name: _from_torch(torch, file, name, tensor)
      for name, tensor in _unwrap(tree).items()
    }


def _unwrap(tree: Mapping[str, Any]) -> dict[str, Any]:
  for key in WRAPPERS:
    if isinstance(tree.get(key), Mapping):
      tree = tree[key]
  names = [str(name) for name in tree]
  if names and all(name.startswith("module.") for name in names):
    return {str(n).removeprefix("module."): x for n, x in tree.items()}
  return {str(name): x for name, x in tree.items()}


def _from_torch(torch, file, name, tensor) -> np.ndarray:
  if not isinstance(tensor, torch.Tensor):
    raise InputError(
      f"{file}: {name!r} is of type {_kind(tensor)}, not a tensor; expected "
      f"named tensors, or these under one of {', '.join(WRAPPERS)}"
    )
  if tensor.layout != torch.strided or tensor.is_quantized:
    raise InputError(f"{file}: {name!r} is sparse or quantised")
  tensor = tensor.detach().resolve_conj().resolve_neg()
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
  return tensor.numpy()


def _read_safetensors(file: pathlib.Path) -> Arrays:
  with _in_words(file):
    return dict(safetensors.numpy.load_file(file))


def _read_npz(file: pathlib.Path) -> Arrays:
  with _in_words(file):
    if not zipfile.is_zipfile(file):
      raise zipfile.BadZipFile("it is not a zip archive, or cut short")
    with np.load(file, allow_pickle=False) as archive:
      names = [name for name in archive.files if name != _METADATA]
      arrays = {name: archive[name] for name in names}
  # npz has no bfloat16 and keeps it as two nameless bytes.
  return {
    name: x.view(BFLOAT16) if x.dtype == np.dtype("V2") else x
    for name, x in arrays.items()
  }


def _read_msgpack(file: pathlib.Path) -> Arrays:
  with _in_words(file):
    return trees.flatten(scenic.read_msgpack(file))


READERS = {
  **dict.fromkeys((".pth", ".pt", ".bin"), _read_torch),
  ".safetensors": _read_safetensors,
  ".npz": _read_npz,
  **dict.fromkeys((".msgpack", ".flax"), _read_msgpack),
}


@contextlib.contextmanager
def _in_words(file: pathlib.Path) -> Iterator[None]:
  """Whatever a reader chokes on, as one InputError that names the file."""
  try:
    yield
  except (InputError, MemoryError, KeyboardInterrupt):
    raise
  except Exception as error:
    # Damage ends in any of a dozen types, by format and by byte.
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)", text)
    name = next(filter(None, found.groups()), "") if found else ""
    if name or "Unsupported operand" in text or "allow_pickle" in text:
      raise InputError(
        f"{file} holds {name or 'objects'} beside arrays, which only pickle "
        "could read and pickle can run code; save the tensors alone, for "
        "example as .safetensors"
      ) from error
    first = text.strip().partition("\n")[0].partition(". ")[0]
    raise InputError(
      f"{file} is damaged or not a {file.suffix or 'weights'} file: "
      f"{first or type(error).__name__}"
    ) from error


def _plain(arrays: Mapping[str, Any], file: pathlib.Path) -> Arrays:
  """The values as numpy arrays of numbers."""
  plain = {name: np.asarray(x) for name, x in arrays.items()}
  for name, x in plain.items():
    if x.dtype.kind not in "biufcV" or x.dtype.hasobject:
      raise InputError(f"{file}: {name!r} is {x.dtype}, not numbers")
  return plain


def _kind(value: Any) -> str:
  return type(value).__name__


# --- Writing -----------------------------------------------------------------


def _write_safetensors(file, arrays, words) -> None:
  safetensors.numpy.save_file(arrays, file, metadata=words)


def _write_npz(file, arrays, words) -> None:
  if _METADATA in arrays:
    raise InputError(f"{_METADATA!r} is no name for an array")
  with file.open("wb") as opened:  # Given a name, numpy would add a suffix.
    np.savez(opened, **arrays, **{_METADATA: np.asarray(json.dumps(words))})


def _write_torch(file, arrays, words) -> None:
  del words
  torch = torch_library()

  def tensor(x: np.ndarray) -> Any:
    if x.dtype == BFLOAT16:
      return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())

  torch.save({name: tensor(x) for name, x in arrays.items()}, file)


WRITERS = {
  ".safetensors": _write_safetensors,
  ".npz": _write_npz,
  ".pth": _write_torch,
}
