"""A trained model in Python: load, embed, predict."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from avjax import batch as batch_lib
from avjax import config as config_lib
from avjax import experiment, generation, initialise, methods
from avjax.data import augment, pipeline, text
from avjax.errors import InputError
from avjax.evaluators import captioned
from avjax.methods.base import Method
from avjax.weights import class_lists, image
from avjax.workdir import workdir

Files = str | pathlib.Path | Sequence[str | pathlib.Path]

CHUNK = 32  # media files decoded and computed at a time


def load(path: str | pathlib.Path) -> "Model":
  """A model from a run's folder, a stage of it, a checkpoint or a weights file.

  Of a staged run the last stage is taken, of a run its newest intact
  checkpoint.

  Raises:
    InputError: there is no run, no intact checkpoint and no known weights file
      at `path`, or the weights are of no method.
  """
  source = initialise.read(path)
  if source.config["method"] == image.METHOD:
    raise InputError(
      f"{path} is an image model, which can only start another: name it in "
      "init_from, or give avjax.convert a --config"
    )
  config = config_lib.from_plain(source.config)
  classes = workdir(source.path).classes
  if classes.exists():
    names = json.loads(classes.read_text())
  else:
    # A folder without them was made of weights that do not say their order.
    file = source.path.is_file()
    names = class_lists.class_names(source.family, config) if file else {}
  if names and "classes" in config.model:
    # The data set need not be where the model is used.
    with config.unlocked():
      config.model.classes = {head: len(known) for head, known in names.items()}
  return Model(config, methods.make(config), source.params, source.step, names)


def padded(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
  """The batch with its last example repeated, `valid` false, up to a size."""
  batch = dict(batch)
  count = len(batch["index"])
  batch.setdefault("valid", np.ones(count, bool))
  for name, rows in batch.items():
    last = np.repeat(rows[-1:], size - count, axis=0)
    batch[name] = np.concatenate([rows, last])
  batch["valid"][count:] = False
  return batch


@dataclasses.dataclass(frozen=True)
class Model:
  """Parameters with the method and the preprocessing that belong to them.

  Attributes:
    config: the config it was trained with.
    method: the paper's model.
    params: float32 parameters under the house's names.
    step: the training step they come from.
    class_names: head -> names in the order of the logits; may be empty.
  """

  config: Any
  method: Method
  params: Any
  step: int
  class_names: Mapping[str, Sequence[str]]

  def embed(self, clips: Files | Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Pooled features by name, each [b, d]; see the method's `embed`.

    Args:
      clips: a media file, several, or a batch (avjax.batch.BATCH).
    """
    return self._each(clips, lambda batch: self._embed(self._live, batch))

  def predict(
    self, clips: Files | Mapping[str, Any], mode: str = "av"
  ) -> dict[str, np.ndarray]:
    """Logits by head, each [b, k].

    Args:
      clips: a media file, several, or a batch (avjax.batch.BATCH).
      mode: one of the method's modes, such as 'a', 'v' or 'av'.
    """
    if not self.method.modes:
      raise InputError(f"the method {self.config.method} has no predictions")
    if mode not in self.method.modes:
      raise InputError(
        f"mode {mode!r} is not one of {', '.join(self.method.modes)}"
      )
    return self._each(
      clips,
      lambda batch: self._predict(self._live, batch, mode),
      "" if mode == "av" else mode,
    )

  def classify(
    self, clips: Files, top: int = 5
  ) -> list[list[tuple[str, float]]]:
    """The `top` classes of every clip with their probabilities."""
    logits = self.predict(clips)["label"]
    if self.config.data.multilabel:
      scores = np.asarray(jax.nn.sigmoid(logits))
    else:
      scores = np.asarray(jax.nn.softmax(logits))
    names = self.class_names.get("label") or range(scores.shape[-1])
    order = np.argsort(-scores, axis=-1)[:, :top]
    return [
      [(str(names[k]), float(row[k])) for k in best]
      for row, best in zip(scores, order, strict=True)
    ]

  def caption(
    self, clips: Files | Mapping[str, Any], mode: str = "", *, beams: int = 3
  ) -> list[str]:
    """One caption of every clip.

    Args:
      clips: a media file, several, or a batch (avjax.batch.BATCH).
      mode: what is seen, one of the method's `retrieval_modes`; '' = all that
        its data have.
      beams: of the beam search; 1 = greedily.

    Raises:
      InputError: the method writes no captions or has no such mode; a clip
        lacks a track of it.
    """
    mode = self._text_mode("caption_start", mode)
    found = self._each(
      clips,
      lambda batch: {"ids": self._caption(self._live, batch, mode, beams)},
      mode,
    )
    decode = text.tokenizer(self.config.data).decode
    return [decode(row) for row in found["ids"]]

  def similarity(
    self,
    texts: str | Sequence[str],
    clips: Files | Mapping[str, Any],
    mode: str = "",
  ) -> np.ndarray:
    """How well texts and clips go together, -1 to 1: equation 1 of CoAVT.

    Args:
      texts: one or several.
      clips: a media file, several, or a batch (avjax.batch.BATCH).
      mode: see `caption`.

    Returns:
      [texts, clips].

    Raises:
      InputError: the method reads no text or has no such mode; a clip lacks a
        track of it.
    """
    mode = self._text_mode("encode_text", mode)
    data = self.config.data
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids, mask = text.tokenizer(data).encode(texts, data.text.length)
    told = jax.device_get(self._encode_text(self._live, ids, mask))
    media = self._each(
      clips,
      lambda batch: {"x": self._encode_media(self._live, batch, mode)},
      mode,
    )
    return np.einsum("bqp,tp->tbq", media["x"], told).max(axis=-1)

  def _text_mode(self, needed: str, mode: str) -> str:
    """The mode that is meant; a method without `needed` is refused."""
    name = self.config.method
    if not hasattr(self.method, needed):
      raise InputError(f"method {name!r} knows no text: it has no {needed}")
    modality = self.config.data.modality
    modes = (mode,) if mode else ()
    return max(captioned.chosen_modes(self.method, modality, modes), key=len)

  def _each(
    self,
    clips: Files | Mapping[str, Any],
    compute: Callable[[Any], Any],
    mode: str = "",
  ) -> dict[str, np.ndarray]:
    """Computes a batch at once and files in chunks of one size.

    Raises:
      InputError: a clip lacks a track that the mode, if there is one, sees.
    """
    if isinstance(clips, Mapping):
      batch = self.batch(clips)
      _need_tracks(batch, range(len(batch["index"])), mode)
      return jax.device_get(compute(batch))
    paths = pipeline.media_files(clips)
    parts = []
    for first in range(0, len(paths), CHUNK):
      some = paths[first : first + CHUNK]
      batch = self.batch(some)
      _need_tracks(batch, some, mode)
      if len(paths) > CHUNK:
        batch = padded(batch, CHUNK)
      found = jax.device_get(compute(batch))
      parts.append({name: rows[: len(some)] for name, rows in found.items()})
    return {
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }

  def batch(self, clips: Files | Mapping[str, Any]) -> dict[str, Any]:
    """Media files -> a batch, cut as in evaluation (centre of the clip)."""
    if isinstance(clips, Mapping):
      batch_lib.check(clips)
      return batch_lib.arrays(clips)
    host = pipeline.batch_of_files(clips, self.config.data)
    return batch_lib.arrays(host)

  @functools.cached_property
  def _live(self) -> Any:
    live = experiment.live(self.config, self.params)
    return experiment.cast(live, self.config.dtype)

  @functools.cached_property
  def _embed(self) -> Any:
    return jax.jit(lambda p, b: self.method.embed(p, self._inputs(b)))

  @functools.cached_property
  def _predict(self) -> Any:
    def predict(params: Any, batch: Any, mode: str) -> Any:
      return self.method.predict(params, self._inputs(batch), mode=mode)

    return jax.jit(predict, static_argnames="mode")

  @functools.cached_property
  def _encode_text(self) -> Any:
    return jax.jit(self.method.encode_text)

  @functools.cached_property
  def _encode_media(self) -> Any:
    def encode(params: Any, batch: Any, mode: str) -> Any:
      return self._media(params, batch, mode)["feature"]

    return jax.jit(encode, static_argnames="mode")

  @functools.cached_property
  def _caption(self) -> Any:
    data = self.config.data

    def write(params: Any, batch: Any, mode: str, beams: int) -> Any:
      # A text of `length` tokens is [DEC], which is given, and the others.
      length, method = data.text.length - 1, self.method
      media, words = self._media(params, batch, mode), text.tokenizer(data)
      return generation.captions(
        method, params, media, words, length=length, beams=beams
      )[0]

    return jax.jit(write, static_argnames=("mode", "beams"))

  def _media(self, params: Any, batch: Any, mode: str) -> dict[str, jax.Array]:
    inputs = captioned.only(self._inputs(batch), mode)
    return self.method.encode_media(params, inputs, mode)

  def _inputs(self, batch: Any) -> dict[str, jax.Array]:
    rng = jax.random.key(0)
    return augment.prepare(batch, self.config.data, rng, False)


def _need_tracks(
  batch: Mapping[str, Any], names: Sequence[Any], mode: str
) -> None:
  """Raises InputError where a clip lacks what the mode sees."""
  for modality in captioned.MODES.get(mode, ()):
    has = batch.get(f"has_{modality}")
    if has is not None and not has.all():
      own = " or ".join(
        repr(m) for m, seen in captioned.MODES.items() if modality not in seen
      )
      raise InputError(
        f"{names[int(has.argmin())]} has no {modality} for mode {mode!r}; "
        f"mode {own} needs none"
      )
