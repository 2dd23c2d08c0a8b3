"""The texts of clips, in batches: `text` and `text_mask`."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from avjax.data import text
from avjax.errors import InputError, lookup

SOURCES = {
  "captions": "of the records",
  "labels": 'names of all classes of the head `label`, joined by ", "',
}
# Texts whose ids are kept, about 400 bytes each.
KEPT = 1 << 17
LOOKED_AT = 16  # records of a split, any of which must have a caption


class Captions:
  """Fills `text` and `text_mask`; may go to other processes.

  A text becomes ids once; what comes again is copied.

  Args:
    data: `config.data`.
    split: records.Split or mixture.Mixture.

  Raises:
    InputError: the vocabulary or the source is unknown, the split has no such
      texts, or captions are to be read beside stored features.
  """

  def __init__(self, data: Any, split: Any):
    section = data["text"]
    lookup(SOURCES, section["source"], "data.text.source")
    text.check_length(section["length"])
    self._tokens, self._length = text.tokenizer(data), section["length"]
    self._classes: Sequence[str] | None = None
    self._split = split
    if section["source"] == "labels":
      classes = split.metadata.get("classes", {})
      self._classes = lookup(classes, "label", f"head of {split.folder}")
    elif data["features"]:
      raise InputError(
        f"data.features={data['features']!r} has no captions; set "
        "data.text.source to 'labels'"
      )
    else:
      _need_captions(split)
    self._made: dict[str, np.ndarray] = {}

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_made": {}}

  def fill(
    self,
    number: int,
    captions: Sequence[str],
    batch: Mapping[str, np.ndarray],
    row: int,
    rng: Callable[[], np.random.Generator | None],
  ) -> None:
    """Fills one row; without a text the mask is all false.

    Args:
      number: of the clip in the split.
      captions: of its record.
      batch: arrays; `text` [b l] gets one text, drawn if there are several,
        `text` [b c l] all of them.
      row: which example.
      rng: makes the generator of the draw.

    Raises:
      InputError: a clip has more texts than c.
    """
    if self._classes is not None:
      captions = self._names(number)
    texts = [caption for caption in captions if caption.strip()]
    ids, mask = batch["text"][row], batch["text_mask"][row]
    ids[:], mask[:] = self._tokens.pad, False
    if ids.ndim == 1:
      if len(texts) > 1:
        texts = [texts[rng().integers(len(texts))]]
      ids, mask = ids[None], mask[None]
    if len(texts) > len(ids):
      name = self._split.column("id")[number]
      raise InputError(
        f"clip {str(name)!r} of {self._split.folder} has {len(texts)} captions;"
        f" captions={len(ids)} of the evaluation would lose some"
      )
    for k, caption in enumerate(texts):
      found = self._ids(caption)
      ids[k, : len(found)], mask[k, : len(found)] = found, True

  def _names(self, number: int) -> list[str]:
    numbers = self._split.labels_of(number)
    return [", ".join(self._classes[k] for k in numbers if k >= 0)]

  def _ids(self, caption: str) -> np.ndarray:
    found = self._made.get(caption)
    if found is None:
      found = self._tokens.ids(caption, self._length)
      if len(self._made) < KEPT:
        self._made[caption] = found
    return found


def _need_captions(split: Any) -> None:
  for number in np.linspace(0, len(split) - 1, LOOKED_AT).astype(int):
    # A broken record has its turn later.
    with contextlib.suppress(ValueError, IndexError, OSError, RuntimeError):
      if split[int(number)].blobs("captions"):
        return
  raise InputError(
    f"{split.folder} has no captions (data.text.source='captions'); 'labels' "
    "makes texts of the names of its classes"
  )
