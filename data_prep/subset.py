"""python -m data_prep.subset --dataset=NAME --split=SPLIT --output=FILE
    [--per_class=5 --classes=N --seed=0 | --list=THEIR_FILE]

Writes ids of a built split, one a line, for `config.evals.retrieval.subset`.

Retrieval is scored on a few clips of each class: CAV-MAE and its successors
take 5 of each of VGGSound's 309 classes, 1,545 clips, and 1,725 of AudioSet's
evaluation clips. With the authors' list (--list: JSON with `video_id`, CSV
with ids first, or ids alone) their ids are looked up; those whose clip is not
built are named. Without it the rule is `select`'s: for VGGSound

  python -m data_prep.subset --dataset=vggsound --split=test --output=vgg.txt

and for AudioSet, whose 345 classes nobody has published, its most frequent:

  python -m data_prep.subset --dataset=audioset --split=eval --classes=345
      --output=audioset.txt
"""

import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from avjax import commands
from avjax.data import id_list, records
from avjax.errors import InputError
from avjax.workdir import write_text
from data_prep import stats, tables

_LISTED = 5  # ids without a clip that are printed


def select(
  labels: Sequence[Sequence[int]],
  *,
  per_class: int,
  classes: int = 0,
  seed: int = 0,
) -> list[int]:
  """Chooses as many clips of every class, none twice.

  The clips are shuffled. The classes take turns, those with fewest clips
  first, each taking its first `per_class` clips that are not taken yet; a
  class with fewer gives what it has.

  Args:
    labels: class numbers of each clip.
    per_class: clips of a class.
    classes: the most frequent ones alone; 0 = all. Of equally frequent ones
      those with the lower number.
    seed: of the shuffling (numpy's PCG64).

  Returns:
    Numbers of the clips, ascending.
  """
  clips: dict[int, list[int]] = {}
  for number in np.random.default_rng(seed).permutation(len(labels)).tolist():
    for k in labels[number]:
      clips.setdefault(k, []).append(number)
  order = sorted(clips, key=lambda k: (-len(clips[k]), k))[: classes or None]
  chosen: set[int] = set()
  for k in reversed(order):
    free = [number for number in clips[k] if number not in chosen]
    chosen.update(free[:per_class])
  return sorted(chosen)


def read_list(path: pathlib.Path) -> list[str]:
  """Ids of somebody's list, in its order.

  Args:
    path: JSON, a list of texts or of objects with `video_id` (or `id`), also
      under `data`; or a table whose first column are ids, or videos if the
      second one is a whole number, the start in seconds (a header and lines
      that begin with '#' are passed over).

  Raises:
    InputError: the file is neither, or empty.
  """
  text = tables.read_text(path)
  if text.lstrip()[:1] in ("{", "["):
    ids = _json_ids(path, tables.parse_json(text, path))
  else:
    found = map(id_list.clip_id, id_list.rows(text.splitlines()))
    ids = [name for name in found if name]
    if ids[:1] and ids[0].casefold() in id_list.IDS:
      del ids[0]
  if not ids:
    raise InputError(f"{path} holds no id")
  return ids


def _json_ids(path: pathlib.Path, content: Any) -> list[str]:
  entries = content.get("data") if isinstance(content, Mapping) else content
  if not isinstance(entries, list):
    raise InputError(f"{path}: expected a list of clips, or one under 'data'")
  ids = []
  for entry in entries:
    if isinstance(entry, Mapping):
      entry = entry.get("video_id", entry.get("id"))
    if not isinstance(entry, str):
      raise InputError(f"{path}: a clip without video_id: {entry!r}")
    ids.append(entry)
  return ids


def look_up(wanted: Iterable[str], built: Iterable[str]) -> dict[str, str]:
  """Their id -> the built clip's id.

  An id fits as it is, with another number of digits in its start time, as the
  name of a file (VIDEO_START.mp4), as a video of which one clip is built, or
  without its start where built ids are videos (AudioSet).
  """
  exact = {name: name for name in built}
  timed = {id_list.key(name): name for name in exact}
  videos: dict[str, list[str]] = {}
  for name in exact:
    videos.setdefault(id_list.key(name)[0], []).append(name)
  found = {}
  for name in wanted:
    own, stem = (id_list.key(n) for n in (name, os.path.splitext(name)[0]))
    alone = videos.get(name, ())
    match = exact.get(name) or timed.get(own) or timed.get(stem)
    match = match or exact.get(own[0]) or exact.get(stem[0])
    if match or len(alone) == 1:
      found[name] = match or alone[0]
  return found


def usable(split: records.Split) -> tuple[list[str], list[list[int]]]:
  """Ids and labels of the clips that have sound and pictures."""
  both = split.column("has_audio") & split.column("has_video")
  labels = split.labels()
  numbers = np.flatnonzero(both[: len(split)]).tolist()
  ids = split.column("id")[numbers].tolist()
  return ids, [labels[number].tolist() for number in numbers]


def main(argv: list[str]) -> None:
  """Writes the file and says what is in it."""
  del argv
  flag = flags.FLAGS
  _, split = stats.open_split(
    flag.dataset, flag.split, data_dir=flag.data_dir, variant=flag.variant
  )
  ids, labels = usable(split)
  if flag.list:
    wanted = read_list(pathlib.Path(flag.list).expanduser())
    found = look_up(wanted, ids)
    chosen = list(dict.fromkeys(found.values()))
    missing = [name for name in wanted if name not in found]
    some = ", ".join(map(repr, missing[:_LISTED]))
    words = f"{len(missing)} of {len(wanted)} ids have no built clip"
    print(f"{words}{f': {some}' if missing else ''}", file=sys.stderr)
  else:
    numbers = select(
      labels,
      per_class=flag.per_class,
      classes=flag.classes,
      seed=flag.seed,
    )
    chosen = [ids[number] for number in numbers]
  if not chosen:
    raise InputError(f"no clip of split {flag.split!r} was chosen")
  output = pathlib.Path(flag.output).expanduser()
  output.parent.mkdir(parents=True, exist_ok=True)
  write_text(output, "".join(f"{name}\n" for name in chosen))
  print(f"{output}: {len(chosen)} of {len(ids)} clips")


if __name__ == "__main__":
  stats.define_split_flags()
  flags.DEFINE_string("output", None, "File to write.")
  flags.DEFINE_string("list", "", "Somebody's list to look up.")
  flags.DEFINE_integer("per_class", 5, "Clips of a class.", lower_bound=1)
  flags.DEFINE_integer(
    "classes", 0, "The most frequent classes only; 0 = all.", lower_bound=0
  )
  flags.DEFINE_integer("seed", 0, "Of the choice.")
  commands.run(main, required=("dataset", "split", "output"))
