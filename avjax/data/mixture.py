"""Several built data sets as one training set, drawn in given proportions."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from avjax.data import records
from avjax.errors import InputError


def parse(entries: Sequence[str]) -> list[tuple[str, str, float]]:
  """`config.data.mixture` -> (data set, split, weight) of each entry.

  Args:
    entries: 'name:split:weight' or 'name:split', whose weight is 1.

  Raises:
    InputError: an entry has another form, or its weight is not positive.
  """
  result = []
  for entry in entries:
    name, _, rest = entry.partition(":")
    split, _, text = rest.partition(":")
    try:
      weight = float(text or 1)
    except ValueError:
      weight = 0.0
    if not split or not 0 < weight < float("inf"):
      raise InputError(
        f"data.mixture has the entry {entry!r}; expected name:split:weight "
        "with a positive weight"
      )
    result.append((name, split, weight))
  return result


class Mixture:
  """Records of several splits; one numbering goes through all of them.

  A batch holds each data set in proportion to its weight, at any point of the
  run; within a data set every clip comes once before one comes again. Small
  sets are repeated: an epoch is as many clips as all sets hold.

  Args:
    data: `config.data`; `mixture` names splits of data sets under `data.dir`.

  Raises:
    InputError: one of them is not built, sampling is balanced, `limit` is set,
      or the sets have other classes or another audio rate than the first.
  """

  def __init__(self, data: Any):
    parts = parse(data["mixture"])
    if data["sampling"] != "shuffle":
      raise InputError(
        f"data.sampling is {data['sampling']!r}; a mixture goes with 'shuffle'"
      )
    if data["limit"]:
      raise InputError(
        f"data.limit is {data['limit']}; a mixture goes with 0, all clips"
      )
    place = {"variant": data["variant"], "dir": data["dir"]}
    self.splits = [
      records.Split({**place, "name": name}, split, exclude=data["exclude"])
      for name, split, _ in parts
    ]
    self.weights = [weight for _, _, weight in parts]
    self.ends = np.cumsum([len(split) for split in self.splits])
    self.folder = self.splits[0].folder
    self.metadata = self.splits[0].metadata
    of_text = data["text"]["vocabulary"] and data["text"]["source"] == "labels"
    self._check([*data["heads"], *(["label"] if of_text else [])])

  def _check(self, heads: Sequence[str]) -> None:
    first = self.splits[0]
    for other in self.splits[1:]:
      pairs = {
        "audio rate": [s.metadata.get("audio_rate") for s in (first, other)]
      }
      for head in heads:
        pairs[f"classes of {head}"] = [
          s.metadata.get("classes", {}).get(head) for s in (first, other)
        ]
      for what, (a, b) in pairs.items():
        if a != b:
          raise InputError(
            f"{what} differ between {first.folder} and {other.folder} of "
            "data.mixture"
          )

  def __len__(self) -> int:
    return int(self.ends[-1])

  @property
  def excluded(self) -> str:
    """In words, how many clips are left out; see `records.Split`."""
    return "\n".join(split.excluded for split in self.splits).strip()

  def _place(self, number: int) -> tuple[Any, int]:
    which = int(np.searchsorted(self.ends, number, side="right"))
    split = self.splits[which]
    return split, int(number - self.ends[which] + len(split))

  def __getitem__(self, number: int) -> records.Record:
    split, inner = self._place(number)
    return split[inner]

  def labels_of(self, number: int) -> np.ndarray:
    """The class numbers of one clip; see `records.Split.labels_of`."""
    split, inner = self._place(number)
    return split.labels_of(inner)

  def column(self, name: str) -> np.ndarray:
    """One value of every clip; see `records.Split.column`."""
    return np.concatenate([split.column(name) for split in self.splits])

  def order(self, seed: int) -> Any:
    """Position in the run -> number of a clip."""
    # Odd steps of 2^32: seeds that differ between the sets and are far apart.
    streams = [
      grain.MapDataset.range(int(end) - len(split), int(end))
      .seed((seed + 0x9E3779B9 * k) % (1 << 32))
      .shuffle()
      .repeat()
      for k, (split, end) in enumerate(zip(self.splits, self.ends, strict=True))
    ]
    return grain.MapDataset.mix(streams, self.weights)
