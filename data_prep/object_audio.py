"""How much a clip sounds like each label: cosines of CLAP.

Similarities are plain cosines between the embeddings of a sound and of the
prompt, without the learned scale: DETECLAP (arXiv:2409.11729, §III-B) compares
them with a threshold in [0, 1]. A clip longer than the model's window is
several windows of it; their cosines are averaged. The models' own code takes
one window at random instead.
"""

import contextlib
import importlib
import importlib.metadata
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import librosa
import numpy as np
from jaxtyping import Float, Float32, Int16

from avjax.errors import InputError

PROMPT = "this is sound of {label}"
# Seconds at a clip's end for which no window is added: containers round.
REST = 0.1
EXTRA = "object scores need the extra `labels`: pip install -e '.[labels]'"
WINDOWS = "as few as cover the clip, spread evenly; mean of the cosines"
_TEXTS = 64  # prompts at a time


class Model(Protocol):
  """A model of sound and text.

  Attributes:
    rate: samples a second.
    size: samples of a window.
    source: what it is, for the files of the scores.
  """

  rate: int
  size: int
  source: dict[str, Any]

  def text(self, prompts: Sequence[str]) -> Float[np.ndarray, "k d"]:
    """Embeddings of texts, of any length."""
    ...

  def sound(self, windows: Float32[np.ndarray, "n s"]) -> np.ndarray:
    """Embeddings [n, d] of windows, of any length."""
    ...

  def fill(self, wave: Float32[np.ndarray, "s"]) -> np.ndarray:
    """A sound shorter than a window, as one [size]."""
    ...

  def close(self) -> None:
    """Ends what the model runs."""
    ...


def windows(
  sound: Int16[np.ndarray, "s"], rate: int, model: Model
) -> Float32[np.ndarray, "n size"]:
  """A clip's windows at the model's rate, in -1..1.

  The first begins with the clip, the last ends with it, those between are
  spread evenly, and they are as few as cover it but for `REST`. A shorter clip
  is repeated whole as often as it fits, then padded with zeros or cut, as the
  model's own code does.

  Args:
    sound: not empty.
    rate: of it.
    model: whose `rate`, `size` and `fill` are used.
  """
  wave = sound.astype(np.float32) / 32_768
  if rate != model.rate:
    wave = librosa.resample(
      wave, orig_sr=rate, target_sr=model.rate, res_type="soxr_hq"
    )
  length, size = len(wave), model.size
  if length < size:
    return model.fill(wave)[None]
  count = max(-(-(length - round(REST * model.rate)) // size), 1)
  last = length - size if count > 1 else 0
  starts = np.rint(np.linspace(0, last, count)).astype(int)
  return np.stack([wave[start : start + size] for start in starts])


def unit(rows: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
  """Rows of length 1; a row of zeros stays."""
  rows = np.asarray(rows, np.float64)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return (rows / np.maximum(norms, 1e-12)).astype(np.float32)


class Scorer:
  """Cosines of clips with a list of labels.

  Args:
    model: of sound and text.
    labels: names, put into `PROMPT` as they are.
    batch_size: windows computed at a time.
  """

  def __init__(self, model: Model, labels: Sequence[str], batch_size: int):
    self.model, self._batch_size = model, batch_size
    prompts = [PROMPT.format(label=label) for label in labels]
    parts = [
      model.text(prompts[k : k + _TEXTS])
      for k in range(0, len(prompts), _TEXTS)
    ]
    self._texts = unit(np.concatenate(parts))

  def scores(
    self, clips: Sequence[Float32[np.ndarray, "_ s"]]
  ) -> Float32[np.ndarray, "b k"]:
    """The mean cosine over each clip's windows."""
    stacked = np.concatenate(clips)
    step = self._batch_size
    found = np.concatenate(
      [
        self.model.sound(stacked[k : k + step])
        for k in range(0, len(stacked), step)
      ]
    )
    cosines = unit(found) @ self._texts.T
    ends = np.cumsum([len(clip) for clip in clips])
    return np.stack(
      [part.mean(axis=0) for part in np.split(cosines, ends[:-1])]
    )


# ------------------------------------------------------- LAION's CLAP


class Clap:
  """CLAP in the layout of transformers, from a folder on this machine.

  Its log-mel spectra are computed by PyTorch on the device: those of
  `ClapFeatureExtractor`, which is many times slower. Every window counts as
  not longer than the model's; the extractor marks one of a batch at random.

  Args:
    folder: holds config.json, the weights (safetensors, or a state_dict of
      PyTorch), the tokenizer's files and preprocessor_config.json.
    device: of PyTorch.

  Raises:
    InputError: the extra is missing, or it is no such folder.
  """

  def __init__(self, folder: str | os.PathLike, device: str = "cpu"):
    path = pathlib.Path(folder).expanduser()
    if not (path / "config.json").is_file():
      raise InputError(
        f"--audio_model={folder} is not a folder with CLAP's config.json: name "
        "one of `transformers` (such as a copy of laion/clap-htsat-unfused), "
        "or msclap, or none"
      )
    with whole_torchvision():
      self._torch, transformers = libraries("torch", "transformers")
      with _in_words(path), _quiet(transformers):
        self._load(transformers, path)
    self._model.float().eval().to(device)
    self._device = device
    extractor = self._extractor
    self.rate = int(extractor.sampling_rate)
    self.size = int(extractor.nb_max_samples)
    fused = extractor.truncation == "fusion"
    filters = extractor.mel_filters if fused else extractor.mel_filters_slaney
    self._mels = 4 if self._model.config.audio_config.enable_fusion else 1
    self._filters = self._torch.tensor(
      filters.T, dtype=self._torch.float32, device=device
    )
    self._hann = self._torch.hann_window(
      extractor.fft_window_size, device=device
    )
    self.source = {
      "model": path.resolve().name,
      "checksum": checksum(self._model),
      "library": f"transformers {transformers.__version__}",
      "prompt": PROMPT,
      "rate": self.rate,
      "window": self.size / self.rate,
      "windows": WINDOWS,
    }

  def _load(self, transformers: Any, path: pathlib.Path) -> None:
    options = {"local_files_only": True, "trust_remote_code": False}
    processor = transformers.ClapProcessor.from_pretrained(path, **options)
    self._extractor = processor.feature_extractor
    self._tokenizer = processor.tokenizer
    self._model, report = transformers.ClapModel.from_pretrained(
      path,
      output_loading_info=True,
      weights_only=True,
      local_files_only=True,
    )
    lacking = sorted(report["missing_keys"])
    if lacking:
      raise InputError(
        f"{path} lacks {len(lacking)} weights of CLAP, such as {lacking[0]}"
      )

  def text(self, prompts: Sequence[str]) -> Float[np.ndarray, "k d"]:
    """See Model."""
    most = self._model.config.text_config.max_position_embeddings - 2
    tokens = self._tokenizer(
      list(prompts),
      padding=True,
      truncation=True,
      max_length=most,
      return_tensors="pt",
    )
    known = ("input_ids", "attention_mask")
    with self._torch.inference_mode():
      found = self._model.get_text_features(
        **{key: tokens[key].to(self._device) for key in known}
      )
    return _array(found)

  def sound(self, windows: Float32[np.ndarray, "n s"]) -> np.ndarray:
    """See Model."""
    with self._torch.inference_mode():
      mels = self.log_mel(windows)
      mels = mels.expand(-1, self._mels, -1, -1)
      longer = self._torch.zeros(
        (len(windows), 1), dtype=self._torch.bool, device=self._device
      )
      found = self._model.get_audio_features(
        input_features=mels, is_longer=longer
      )
    return _array(found)

  def log_mel(self, windows: Float32[np.ndarray, "n s"]) -> Any:
    """Tensor [n, 1, frames, mels] in decibels, as `ClapFeatureExtractor`."""
    extractor = self._extractor
    wave = self._torch.from_numpy(np.ascontiguousarray(windows))
    spectrum = self._torch.stft(
      wave.to(self._device),
      n_fft=extractor.fft_window_size,
      hop_length=extractor.hop_length,
      window=self._hann,
      center=True,
      pad_mode="reflect",
      return_complex=True,
    )
    mel = self._filters @ spectrum.abs().square()
    decibels = 10 * mel.clamp_min(1e-10).log10()
    return decibels.transpose(1, 2)[:, None]

  def fill(self, wave: Float32[np.ndarray, "s"]) -> np.ndarray:
    """A short sound to the window's length [size]."""
    padding = self._extractor.padding
    if padding == "repeat":
      wave = np.tile(wave, self.size // len(wave) + 1)[: self.size]
    elif padding == "repeatpad":
      wave = np.tile(wave, self.size // len(wave))
    return np.pad(wave, (0, self.size - len(wave)))

  def close(self) -> None:
    """Nothing runs."""


def _array(found: Any) -> Float[np.ndarray, "n d"]:
  """Embeddings as transformers 4 and 5 return them."""
  return getattr(found, "pooler_output", found).float().cpu().numpy()


# ------------------------------------------------------------- libraries


def libraries(*names: str) -> list[Any]:
  """Imported modules.

  Raises:
    InputError: one cannot be imported; names the extra.
  """
  try:
    return [importlib.import_module(name) for name in names]
  except ImportError as error:
    raise InputError(f"{EXTRA} ({error})") from error


def checksum(model: Any) -> str:
  """Of all weights of a PyTorch module on the host, and their names."""
  total = 0
  for name, tensor in model.state_dict().items():
    total = zlib.crc32(name.encode(), total)
    total = zlib.crc32(np.ascontiguousarray(tensor.cpu().numpy()), total)
  return f"{total:08x}"


@contextlib.contextmanager
def whole_torchvision() -> Iterator[None]:
  """Within, a torchvision that cannot be imported counts as not installed.

  PyPI's torchvision is made for CUDA and cannot be imported beside PyTorch's
  wheel for CPUs. Neither model needs it, but transformers imports it where it
  is installed.
  """
  try:
    importlib.import_module("torchvision")
  except (ImportError, RuntimeError, OSError):
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
      del sys.modules[name]
    sys.modules["torchvision"] = None
    try:
      yield
    finally:
      sys.modules.pop("torchvision", None)
    return
  yield


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
  """Without its progress bars and warnings: what matters is checked."""
  logs = transformers.utils.logging
  level, shown = logs.get_verbosity(), logs.is_progress_bar_enabled()
  logs.set_verbosity_error()
  logs.disable_progress_bar()
  try:
    yield
  finally:
    logs.set_verbosity(level)
    if shown:
      logs.enable_progress_bar()


@contextlib.contextmanager
def _in_words(path: pathlib.Path) -> Iterator[None]:
  """Whatever the library says of the files, with their folder."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # safetensors, tokenizers, pickle: kinds of all
    text = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: {text}") from error
