"""Microsoft's CLAP of 2023, the model of DETECLAP, run by another Python."""

import contextlib
import io
import os
import pathlib
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from avjax.errors import InputError
from data_prep.object_audio import PROMPT, WINDOWS


class Msclap:
  """A model (see `object_audio.Model`) in an environment of its own.

  See data_prep/msclap_worker.py and data_prep/requirements-msclap.txt.

  Args:
    python: the interpreter of an environment with msclap.
    weights: CLAP_weights_2023.pth.
    text_model: a folder with GPT-2 and its tokenizer; '' = msclap asks the
      Hugging Face hub's cache, or the hub.
    device: 'cpu' or 'cuda'.
    worker: the program that is run.

  Raises:
    InputError: the worker does not start: says its last words.
  """

  def __init__(
    self,
    python: str,
    weights: str,
    *,
    text_model: str = "",
    device: str = "cpu",
    worker: str | os.PathLike = "",
  ):
    if not python or not weights:
      raise InputError(
        "--audio_model=msclap needs --msclap_python, the interpreter of an "
        "environment with data_prep/requirements-msclap.txt, and "
        "--msclap_weights, the file CLAP_weights_2023.pth"
      )
    file = pathlib.Path(weights).expanduser().resolve()
    if not file.is_file():
      raise InputError(f"--msclap_weights={weights} is not a file")
    worker = worker or pathlib.Path(__file__).with_name("msclap_worker.py")
    program = pathlib.Path(python).expanduser()  # a venv's link: not resolved
    command = [str(program), str(worker), str(file), device]
    if text_model:
      command.append(str(pathlib.Path(text_model).expanduser().resolve()))
    self._start(command)
    try:
      self.rate, self.size = (int(n) for n in self._receive())
      version = bytes(self._receive()).decode()
    except BaseException:
      self.close()
      raise
    self.source = {
      "model": file.name,
      "checksum": _checksum(file),
      "library": version,
      "prompt": PROMPT,
      "rate": self.rate,
      "window": self.size / self.rate,
      "windows": WINDOWS,
    }

  def _start(self, command: list[str]) -> None:
    self._said = tempfile.TemporaryFile()  # noqa: SIM115 - until `close`
    # A session of its own: Ctrl-C is for this program, which ends the worker.
    try:
      self._process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._said,
        start_new_session=True,
      )
    except OSError as error:
      self._said.close()
      raise InputError(f"--msclap_python={command[0]}: {error}") from error

  def text(self, prompts: Sequence[str]) -> Float[np.ndarray, "k d"]:
    """See Model."""
    joined = "\n".join(" ".join(prompt.split()) for prompt in prompts)
    return self._ask(np.frombuffer(joined.encode(), np.uint8))

  def sound(self, windows: Float32[np.ndarray, "n s"]) -> np.ndarray:
    """See Model."""
    return self._ask(windows)

  def fill(self, wave: Float32[np.ndarray, "s"]) -> np.ndarray:
    """A short sound, repeated to the window's length [size]."""
    return np.tile(wave, -(-self.size // len(wave)))[: self.size]

  def close(self) -> None:
    """Ends the worker."""
    process = self._process
    with contextlib.suppress(OSError):
      process.stdin.close()
    try:
      process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    process.stdout.close()
    self._said.close()

  def _ask(self, array: np.ndarray) -> np.ndarray:
    packed = io.BytesIO()  # NumPy cannot write to a pipe
    np.lib.format.write_array(packed, array, allow_pickle=False)
    try:
      self._process.stdin.write(packed.getbuffer())
      self._process.stdin.flush()
    except OSError as error:
      raise self._ended() from error
    return self._receive()

  def _receive(self) -> np.ndarray:
    try:
      return np.lib.format.read_array(_Whole(self._process.stdout))
    except (ValueError, EOFError, OSError) as error:
      raise self._ended() from error

  def _ended(self) -> InputError:
    """What the worker said last: what follows a traceback's indented lines."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=5)
    self._said.seek(0)
    text = self._said.read().decode(errors="replace").strip()
    lines = [line for line in text.splitlines() if line.strip()]
    inner = [k for k, line in enumerate(lines[:-1]) if line[0] == " "]
    last = lines[inner[-1] + 1 :] if inner else lines
    tail = " ".join(last[-5:]) or "it said nothing"
    code = self._process.poll()
    state = "sent no array" if code is None else f"ended with status {code}"
    return InputError(f"the msclap worker {state}: {tail}")


def _checksum(file: pathlib.Path) -> str:
  total = 0
  with file.open("rb") as opened:
    while part := opened.read(1 << 20):
      total = zlib.crc32(part, total)
  return f"{total:08x}"


class _Whole(io.RawIOBase):
  """A pipe without `fileno`: NumPy would read past it with `fromfile`."""

  def __init__(self, pipe: Any):
    self._pipe = pipe

  def read(self, size: int = -1) -> bytes:
    return self._pipe.read(size)
