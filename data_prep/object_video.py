"""How surely a detector sees each label in a clip's pictures: YOLOv8.

Ultralytics, its YOLOv8 and their weights are under AGPL-3.0. This module alone
imports them, only when pictures are scored, and nothing of avjax needs it.

The score of a label is the highest probability of a detection of it in any of
the pictures (DETECLAP, arXiv:2409.11729, §III-C): the highest over the boxes
whose best class it is. `predict` gives the same, for suppression keeps the best
box of each class, but cuts at a confidence of 0.25 unless told otherwise; the
scores here are not cut, and 0 where a label is no box's best.
"""

import atexit
import contextlib
import difflib
import importlib
import os
import pathlib
import pickle
import re
import shutil
import tempfile
import types
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from avjax.data import media
from avjax.errors import InputError
from data_prep.object_audio import checksum, libraries, whole_torchvision

SIZE = 640  # pixels of the longer side, as `predict` has it
_HOME: list[str] = []  # the folder that Ultralytics writes to

# What a checkpoint's pickle may name besides what PyTorch allows: layers, and
# values that do nothing. Layers are made without their constructors.
_LAYERS = re.compile(
  r"(ultralytics\.nn\.(tasks|modules(\.\w+)?)|torch\.nn\.modules(\.\w+)?)"
  r"\.([A-Za-z]\w*)"
)


def _scalar(kind: np.dtype, data: bytes) -> Any:
  """A number of NumPy's, as its own pickles say it."""
  return np.frombuffer(data, kind, 1)[0]  # refuses objects


_VALUES: dict[str, Any] = {
  "__builtin__.set": set,
  "builtins.set": set,
  "pathlib.PosixPath": pathlib.PurePosixPath,
  "pathlib.WindowsPath": pathlib.PurePosixPath,
  "pathlib._local.PosixPath": pathlib.PurePosixPath,
  "types.SimpleNamespace": types.SimpleNamespace,
  "ultralytics.utils.IterableSimpleNamespace": types.SimpleNamespace,
  "numpy.dtype": np.dtype,
  "numpy.core.multiarray.scalar": _scalar,
  "numpy._core.multiarray.scalar": _scalar,
}


class Detector:
  """A YOLO detector whose boxes have a probability for every class.

  Args:
    path: a .pt file of Ultralytics, such as yolov8x-oiv7.pt.
    labels: which of its classes are scored, in this order.
    device: of PyTorch.
    batch_size: pictures computed at a time.

  Raises:
    InputError: the extra is missing; the file is no such detector, or holds
      what might run code; it does not know a label.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    labels: Sequence[str],
    *,
    device: str = "cpu",
    batch_size: int = 32,
  ):
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
      raise InputError(
        f"--video_model={path} is not a file: name yolov8x-oiv7.pt of "
        "Ultralytics, or none"
      )
    self._torch, ultralytics = _ultralytics()
    self._model = load(file)
    self._columns = columns(file, self._model.names, labels)
    self._device, self._batch_size = device, batch_size
    self._prepare(file)
    augment = importlib.import_module("ultralytics.data.augment")
    stride = max(int(self._model.stride.max()), 32)
    self._letterbox = augment.LetterBox(SIZE, auto=True, stride=stride)
    self.source = {
      "model": file.name,
      "checksum": self._checksum,
      "library": f"ultralytics {ultralytics.__version__}",
      "size": SIZE,
      "pictures": media.SPREAD,
    }

  def _prepare(self, file: pathlib.Path) -> None:
    model = self._model.float().eval()
    self._checksum = checksum(model)
    for module in model.modules():
      # Older files lack what newer layers ask for.
      if isinstance(module, self._torch.nn.Upsample):
        module.recompute_scale_factor = None
    with _words_of(file):
      self._model = model.fuse(verbose=False).to(self._device)
      self._model.requires_grad_(False)
      side = int(self._model.stride.max()) * 2
      empty = np.zeros((1, side, side, 3), np.uint8)
      shape = tuple(self._forward(empty).shape)
    count = len(self._model.names)
    if len(shape) != 3 or shape[1] != 4 + count:
      raise InputError(
        f"{file}: its output has the shape {shape}, not [b, 4 + {count}, "
        "boxes]: a detector with a probability of each class is needed, such "
        "as YOLOv8's"
      )

  def prepare(
    self, frames: Sequence[UInt8[np.ndarray, "h w 3"]]
  ) -> list[UInt8[np.ndarray, "y x 3"]]:
    """Pictures at the size that the detector sees, grey at the edges."""
    return [self._letterbox(image=np.ascontiguousarray(f)) for f in frames]

  def scores(
    self, clips: Sequence[Sequence[UInt8[np.ndarray, "y x 3"]]]
  ) -> Float32[np.ndarray, "b k"]:
    """The highest probability of each label in each clip.

    Args:
      clips: what `prepare` returned for each, at least one picture.
    """
    best = np.zeros((len(clips), len(self._columns)), np.float32)
    by_shape: dict[Any, list[tuple[int, np.ndarray]]] = {}
    for row, frames in enumerate(clips):
      for frame in frames:
        by_shape.setdefault(frame.shape, []).append((row, frame))
    for pairs in by_shape.values():
      for k in range(0, len(pairs), self._batch_size):
        rows, frames = zip(*pairs[k : k + self._batch_size], strict=True)
        found = self._highest(np.stack(frames))
        np.maximum.at(best, list(rows), found[:, self._columns])
    return best

  def _highest(
    self, frames: UInt8[np.ndarray, "n y x 3"]
  ) -> Float32[np.ndarray, "n c"]:
    """The highest probability of each class among the boxes it is best of."""
    torch = self._torch
    with torch.inference_mode():
      classes = self._forward(frames)[:, 4:]
      values, which = classes.max(dim=1)
      empty = torch.zeros(classes.shape[:2], device=classes.device)
      found = empty.scatter_reduce(1, which, values, "amax")
    return found.float().cpu().numpy()

  def _forward(self, frames: np.ndarray) -> Any:
    torch = self._torch
    with torch.inference_mode():
      pictures = torch.from_numpy(frames).to(self._device)
      pictures = pictures.permute(0, 3, 1, 2).contiguous().float().div_(255)
      found = self._model(pictures)
    return found[0] if isinstance(found, (tuple, list)) else found


def columns(
  path: pathlib.Path, names: Mapping[int, str], labels: Sequence[str]
) -> list[int]:
  """The detector's class number of each label.

  Raises:
    InputError: it does not know one: names the nearest that it knows.
  """
  number = {str(name): int(k) for k, name in dict(names).items()}
  for label in labels:
    if label not in number:
      near = difflib.get_close_matches(label, number, n=1, cutoff=0.4)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise InputError(
        f"{path} knows {len(number)} classes, but not the label {label!r}."
        f"{hint} Leave it out of --labels, or give --video_model=none"
      )
  return [number[label] for label in labels]


# --------------------------------------------------------------- loading


def load(path: pathlib.Path) -> Any:
  """The detector of a .pt file, its averaged weights where there are two.

  Such files are pickles. Only what PyTorch allows, layers and harmless values
  are made of it; no constructor of a layer runs.

  Raises:
    InputError: it names anything else, or holds no detector.
  """
  torch, _ = _ultralytics()
  made: dict[type, type] = {}
  with _words_of(path):
    allowed = [(_allowed(path, n, made), n) for n in _named(torch, path)]
    # Kinds of numbers go by names that are not found in the file.
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLefd"]
    with torch.serialization.safe_globals([*allowed, *kinds]):
      stored = torch.load(path, map_location="cpu", weights_only=True)
  stored = stored if isinstance(stored, dict) else {}
  model = stored.get("ema") or stored.get("model")
  tasks = importlib.import_module("ultralytics.nn.tasks")
  if not isinstance(model, tasks.DetectionModel):
    raise InputError(f"{path} holds no detector of Ultralytics")
  for module in model.modules():
    module.__class__ = made.get(type(module), type(module))
  return model


def _named(torch: Any, path: pathlib.Path) -> list[str]:
  if not zipfile.is_zipfile(path):
    raise InputError(f"{path} is not a file of torch.save, or cut short")
  return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def _allowed(path: pathlib.Path, name: str, made: dict[type, type]) -> Any:
  """What stands for a name of the pickle."""
  if name in _VALUES:
    return _VALUES[name]
  found = _LAYERS.fullmatch(name)
  layer = None
  if found:
    module = importlib.import_module(name.rpartition(".")[0])
    layer = getattr(module, found.groups()[-1], None)
  torch = importlib.import_module("torch")
  if not isinstance(layer, type) or not issubclass(layer, torch.nn.Module):
    raise InputError(
      f"{path} names {name}, which is neither a layer nor a plain value: it "
      "might run code when it is loaded, and is refused"
    )
  stand_in = type(layer.__name__, (layer,), {"__init__": _refuse})
  made[stand_in] = layer
  return stand_in


def _refuse(self: Any, *_: Any, **__: Any) -> None:
  raise pickle.UnpicklingError(f"calls the constructor of {type(self)}")


@contextlib.contextmanager
def _words_of(path: pathlib.Path) -> Iterator[None]:
  """Errors of damaged or strange files as InputError."""
  try:
    yield
  except InputError:
    raise
  except (
    pickle.UnpicklingError, zipfile.BadZipFile, ImportError, RuntimeError,
    ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError,
    OSError,
  ) as error:  # fmt: skip
    text = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: {text[:500]}") from error


def _ultralytics() -> tuple[Any, Any]:
  """torch and ultralytics, which then asks no server, installs nothing and
  writes only to a temporary folder."""
  with whole_torchvision():
    (torch,) = libraries("torch")
    if not _HOME:
      home = tempfile.mkdtemp(prefix="ultralytics-")
      atexit.register(shutil.rmtree, home, ignore_errors=True)
      os.environ.update(
        YOLO_CONFIG_DIR=home,
        YOLO_OFFLINE="True",
        YOLO_AUTOINSTALL="False",
        YOLO_VERBOSE="False",
      )
      with _own_threads(torch), np.printoptions():
        libraries("ultralytics", "ultralytics.nn.tasks")
      _HOME.append(home)
    (ultralytics,) = libraries("ultralytics")
  ultralytics.settings.update(sync=False)  # no statistics of use
  return torch, ultralytics


@contextlib.contextmanager
def _own_threads(torch: Any) -> Iterator[None]:
  """Ultralytics asks for one thread where the environment says nothing."""
  known = "OMP_NUM_THREADS" in os.environ
  os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
  try:
    yield
  finally:
    if not known:
      del os.environ["OMP_NUM_THREADS"]
