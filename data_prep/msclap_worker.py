"""Embeddings of Microsoft's CLAP, computed in an environment of its own.

PYTHON msclap_worker.py WEIGHTS cpu|cuda [GPT2]

`data_prep.object_labels` runs this file with the Python of an environment that
holds requirements-msclap.txt: msclap wants an older NumPy and an older
transformers than the rest. It imports nothing of this repository.

Arrays go through stdin and stdout one after the other, each as a .npy file:

- at the start, out: int64 [2], the sampling rate and the samples of a window;
  uint8 [n], the library and its version as UTF-8;
- in: uint8 [n], texts as UTF-8 with a newline between two; or float32
  [n, samples], windows of sound in -1..1; out: float32 [n, d], their
  embeddings, of any length;
- the end of stdin ends the program. An error ends it with a traceback.

WEIGHTS is CLAP_weights_2023.pth. GPT2 is a folder with the text model and its
tokenizer; without it msclap takes `gpt2` from the cache of the Hugging Face
hub, or from the hub.
"""

import atexit
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import types

import numpy as np


def main(argv):
  """Answers until stdin ends."""
  weights, device, *gpt2 = argv
  # What libraries print must not get among the arrays.
  out = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)
  serve(Clap(weights, device, *gpt2), sys.stdin.buffer, out)


def serve(model, source, sink):
  """Answers the arrays of one file in another until the first ends.

  Args:
    model: `rate`, `size`, `version`, `text(texts)` and `sound(windows)`.
    source: binary file to read.
    sink: binary file to write.
  """
  send(sink, np.array([model.rate, model.size], np.int64))
  send(sink, np.frombuffer(model.version.encode(), np.uint8))
  while True:
    array = receive(source)
    if array is None:
      return
    if array.dtype == np.uint8:
      found = model.text(array.tobytes().decode().split("\n"))
    else:
      found = model.sound(array)
    send(sink, np.ascontiguousarray(found, np.float32))


def send(sink, array):
  """Writes an array as a .npy file."""
  packed = io.BytesIO()  # NumPy cannot write to a pipe
  np.lib.format.write_array(packed, array, allow_pickle=False)
  sink.write(packed.getbuffer())
  sink.flush()


def receive(source):
  """Reads an array; None at the end."""
  first = source.read(1)
  if not first:
    return None
  return np.lib.format.read_array(_Rest(first, source), allow_pickle=False)


class _Rest:
  """A file of which something was read already."""

  def __init__(self, first, source):
    self._first, self._source = first, source

  def read(self, size):
    first, self._first = self._first, b""
    return first + self._source.read(size - len(first))


class Clap:
  """msclap's model of 2023 for arrays: its own interface takes paths only."""

  def __init__(self, weights, device, gpt2=""):
    if importlib.util.find_spec("msclap") is None:
      raise ModuleNotFoundError(f"{sys.executable} has no module msclap")
    import torch

    _without_torchaudio()
    if gpt2:
      _name_gpt2(gpt2)
    from msclap import CLAP

    cuda = device == "cuda"
    self._torch, self._device = torch, device
    self._clap = CLAP(model_fp=weights, version="2023", use_cuda=cuda)
    self._check(weights)
    self.rate = int(self._clap.args.sampling_rate)
    self.size = int(self._clap.args.duration * self.rate)
    self.version = "msclap " + importlib.metadata.version("msclap")

  def _check(self, weights):
    """msclap loads what it finds: another file would leave random weights."""
    stored = self._torch.load(weights, map_location="cpu", weights_only=True)
    encoders = ("audio_encoder.", "caption_encoder.")
    names = [name for name, _ in self._clap.clap.named_parameters()]
    names = [name for name in names if name.startswith(encoders)]
    lacking = [name for name in names if name not in stored["model"]]
    if lacking:
      raise ValueError(
        f"{weights} lacks {len(lacking)} of {len(names)} weights, such as "
        f"{lacking[0]}"
      )

  def text(self, texts):
    """Embeddings of texts [n, d]."""
    return self._clap.get_text_embeddings(texts).float().cpu().numpy()

  def sound(self, windows):
    """Embeddings of windows [n, samples] as [n, d]."""
    wave = self._torch.tensor(windows).to(self._device)
    with self._torch.no_grad():
      found = self._clap.clap.audio_encoder(wave)[0]
    return found.float().cpu().numpy()


def _without_torchaudio():
  """A torchaudio that cannot be imported is replaced by nothing: msclap
  imports it to read files, and there are none here."""
  try:
    import torchaudio  # noqa: F401
  except (ImportError, OSError, RuntimeError):
    for name in [n for n in sys.modules if n.split(".")[0] == "torchaudio"]:
      del sys.modules[name]
    sys.modules["torchaudio"] = None  # what is not there
    import transformers  # noqa: F401 - it looks once

    empty = types.ModuleType("torchaudio")
    empty.transforms = types.ModuleType("torchaudio.transforms")
    sys.modules["torchaudio"] = empty
    sys.modules["torchaudio.transforms"] = empty.transforms


def _name_gpt2(folder):
  """msclap asks for `gpt2`, which is a folder's name before it is a hub's."""
  if not os.path.isfile(os.path.join(folder, "config.json")):
    raise ValueError(f"{folder} holds no config.json of GPT-2")
  os.environ["HF_HUB_OFFLINE"] = "1"
  place = tempfile.mkdtemp(prefix="msclap-")
  atexit.register(shutil.rmtree, place, ignore_errors=True)
  os.symlink(os.path.abspath(folder), os.path.join(place, "gpt2"))
  os.chdir(place)


if __name__ == "__main__":
  main(sys.argv[1:])
