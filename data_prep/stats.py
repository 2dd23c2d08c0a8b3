"""python -m data_prep.stats --dataset=NAME --split=SPLIT
    [--data_dir=DIR --variant=video --limit=N --window=hamming …]

Mean and standard deviation of a built split's log-mel, its clips, seconds and
label counts: a short table, the two config overrides, and stats_<split>.json
beside the records. The flags of the front end are the keys of
`config.data.fbank`. av_demo is made where it is not built.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import numpy as np
import threadpoolctl
from absl import flags, logging

from avjax import commands, config
from avjax.data import audio, datasets, records
from avjax.errors import InputError, lookup
from avjax.report import duration
from data_prep.progress import track

# What a damaged record raises; avjax/data/pipeline.py skips the same.
UNREADABLE = (ValueError, IndexError, OSError, RuntimeError)
# Keys of `config.data.fbank` that say how values are made. `edges` and `frames`
# are not among them: only frames that lie in the sound wholly are counted.
_NOT_FRONT_END = ("mean", "std", "edges", "frames", "remove_mean")
FRONT_END = tuple(key for key in config.FBANK if key not in _NOT_FRONT_END)
_BLOCK = 256  # clips handed to the threads at a time
_LISTED = 5  # skipped clips that are printed; the file holds all


def open_split(
  name: str,
  split: str,
  *,
  data_dir: str = "",
  variant: str = "video",
  limit: int = 0,
) -> tuple[Any, records.Split]:
  """`config.data` with the rate of the stored sound, and the split.

  Args:
    name: of the data set; av_demo is made if it is not built.
    split: of the built data set.
    data_dir: '' = $AVJAX_DATA or ~/avjax_data.
    variant: of the data set.
    limit: first clips only; 0 = all.

  Raises:
    InputError: unknown data set, variant or split; not built.
  """
  lookup(datasets.DATASETS, name, "data set")
  lookup(datasets.VARIANTS, variant, "variant of a data set")
  section = config.data_section()
  section.name, section.variant, section.dir = name, variant, data_dir
  try:
    datasets.built_dir(section)
  except InputError:
    if name != "av_demo":
      raise
    from data_prep import av_demo

    section.dir = str(av_demo.ensure_demo(section))
  opened = records.Split(section, split, limit)
  if not len(opened):
    raise InputError(f"split {split!r} of {opened.folder} holds 0 clips")
  section.audio.rate = opened.metadata.get("audio_rate", section.audio.rate)
  return section, opened


@dataclasses.dataclass
class Moments:
  """Sums over log-mel values, in float64."""

  frames: int = 0
  values: int = 0
  total: float = 0.0
  squares: float = 0.0

  @property
  def mean(self) -> float | None:
    """None where there are no values."""
    return self.total / self.values if self.values else None

  @property
  def std(self) -> float | None:
    """Divided by the number of values, not by one less."""
    if not self.values:
      return None
    square = self.squares / self.values - self.mean**2
    return math.sqrt(max(square, 0.0))


def moments(
  split: records.Split, section: Any, *, threads: int = 1
) -> tuple[Moments, list[tuple[str, str]]]:
  """Sums over all bins and frames of the split's sound.

  Frames that reach beyond the end of a sound are left out. The result does not
  depend on the number of threads: sums are added in the clips' order.

  Returns:
    The sums; id and reason of each clip that could not be read.

  Raises:
    InputError: a parameter of `section.fbank` is out of range, or no clip can
      be read.
  """
  front, rate = {**section.fbank.to_dict(), "edges": "snip"}, section.audio.rate
  audio.num_frames(60 * rate, front, rate)  # wrong parameters end here

  def sums(number: int) -> Moments | str:
    try:
      blobs = split[number].blobs("waveform")
      sound = np.frombuffer(blobs[0] if blobs else b"", np.int16)
      if not len(sound):
        return Moments()
      mel = audio.fbank(sound, front, rate, np).astype(np.float64)
    except UNREADABLE as error:
      return str(error) or type(error).__name__
    return Moments(
      len(mel), mel.size, float(mel.sum()), float(np.vdot(mel, mel))
    )

  found, skipped = Moments(), []
  results = _in_order(sums, len(split), threads)
  shown = track(results, len(split), f"{section.name} {split.name}")
  for number, one in enumerate(shown):
    if isinstance(one, str):
      skipped.append((str(split.column("id")[number]), one))
      continue
    for field in dataclasses.fields(Moments):
      sum_ = getattr(found, field.name) + getattr(one, field.name)
      setattr(found, field.name, sum_)
  if len(skipped) == len(split):
    raise InputError(
      f"none of {len(split)} clips of {split.folder} can be read: "
      f"{skipped[0][0]}: {skipped[0][1]}"
    )
  return found, skipped


def _in_order(function: Any, count: int, threads: int) -> Iterator[Any]:
  """Results for 0…count-1; a block at a time, for a split holds millions."""
  # Threads of BLAS within ours: small products took six times as long.
  single = threadpoolctl.threadpool_limits(1, "blas")
  with single, futures.ThreadPoolExecutor(threads) as pool:
    for first in range(0, count, _BLOCK):
      yield from pool.map(function, range(first, min(first + _BLOCK, count)))


def inventory(split: records.Split) -> dict[str, Any]:
  """Clips, seconds and label counts as the index has them, nothing is read.

  `labels` is class -> clips that carry it, every class in its order; empty for
  a data set without the head `label`.
  """
  count = len(split)
  sound = int(split.column("has_audio")[:count].sum())
  pictures = int(split.column("has_video")[:count].sum())
  names = split.metadata.get("classes", {}).get("label", ())
  labels = split.column("label")[: split.column("label_ends")[count - 1]]
  numbers = np.bincount(labels, minlength=len(names)).tolist()
  return {
    "clips": count,
    "with_sound": sound,
    "without_sound": count - sound,
    "with_pictures": pictures,
    "without_pictures": count - pictures,
    "seconds": float(split.column("seconds")[:count].sum(dtype=np.float64)),
    "labels": dict(zip(names, numbers, strict=True)),
  }


def collect(
  section: Any, split: records.Split, *, threads: int = 1
) -> dict[str, Any]:
  """All that stats_<split>.json holds.

  Args:
    section: `config.data`.
    split: opened from it.
    threads: that compute log-mels.

  Raises:
    InputError: see `moments`.
  """
  found, skipped = moments(split, section, threads=threads)
  return {
    "dataset": section.name,
    "variant": section.variant,
    "version": split.folder.name,
    "split": split.name,
    **inventory(split),
    "audio_rate": section.audio.rate,
    "fbank": {key: section.fbank[key] for key in FRONT_END},
    "frames": found.frames,
    "mean": found.mean,
    "std": found.std,
    "skipped": [list(pair) for pair in skipped],
  }


def overrides(values: dict[str, Any]) -> str:
  """The statistics as flags of a config; '' where there is no such sound."""
  mean, std = values["mean"], values["std"]
  if not std or std < 1e-3:  # digital silence alone
    return ""
  return (
    f"--config.data.fbank.mean={mean:.4f} --config.data.fbank.std={std:.4f}"
  )


def table(values: dict[str, Any]) -> str:
  """The short form for people."""
  fbank, labels = values["fbank"], values["labels"]
  rows = [
    ("clips", f"{values['clips']:,}"),
    ("seconds", f"{values['seconds']:,.1f} ({duration(values['seconds'])})"),
  ]
  for what in ("sound", "pictures"):
    with_, without = values[f"with_{what}"], values[f"without_{what}"]
    rows.append((f"with {what}", f"{with_:,}, without {without:,}"))
  if labels:
    numbers = sorted(labels.values())
    rows.append(
      (
        "labels",
        f"{sum(numbers):,} of {len(labels)} classes, {numbers[0]:,} to "
        f"{numbers[-1]:,} a class",
      )
    )
  front = f"{fbank['window']}, {fbank['num_mels']} mels"
  rows.append(("log-mel", f"{front}, {values['audio_rate']} Hz"))
  rows.append(("frames", f"{values['frames']:,}"))
  if values["frames"]:
    rows.append(("mean", f"{values['mean']:.4f}"))
    rows.append(("std", f"{values['std']:.4f}"))
  rows.append(("skipped", f"{len(values['skipped']):,}"))
  lines = [f"{name:14}{text}" for name, text in rows]
  lines += [f"  {name}: {why}" for name, why in values["skipped"][:_LISTED]]
  if len(values["skipped"]) > _LISTED:
    lines.append(f"  and {len(values['skipped']) - _LISTED:,} more in the file")
  return "\n".join(lines)


def place(output: str, split: records.Split) -> pathlib.Path:
  """Where the numbers go.

  Args:
    output: a file, a folder, or '' = beside the records.
    split: whose numbers.

  Raises:
    InputError: nothing can be written there.
  """
  path = pathlib.Path(output).expanduser() if output else split.folder
  if path.is_dir():
    path = path / f"stats_{split.name}.json"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"--output={output}: {error}") from error
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise InputError(f"{path} cannot be written; name another with --output")
  return path


def main(argv: list[str]) -> None:
  """Prints the table, the overrides and the file's path."""
  del argv
  logging.set_verbosity(logging.WARNING)
  flag = flags.FLAGS
  section, split = open_split(
    flag.dataset,
    flag.split,
    data_dir=flag.data_dir,
    variant=flag.variant,
    limit=flag.limit,
  )
  section.fbank.update({key: flag[key].value for key in FRONT_END})
  path = place(flag.output, split)  # before hours of reading
  values = collect(section, split, threads=flag.threads or os.cpu_count() or 1)
  text = json.dumps(values, indent=1, ensure_ascii=False)
  path.write_text(f"{text}\n", encoding="utf-8")
  print(table(values))
  print(
    overrides(values) or "no overrides: the split holds no sound to measure"
  )
  print(path)


def define_split_flags() -> None:
  """The flags that `open_split` takes, but `limit`."""
  flags.DEFINE_string("dataset", None, "Which data set.")
  flags.DEFINE_string("split", None, "Which split of it.")
  flags.DEFINE_string(
    "data_dir", "", "Where it was built; default $AVJAX_DATA or ~/avjax_data."
  )
  flags.DEFINE_enum(
    "variant", "video", list(datasets.VARIANTS), "Frames stored of a clip."
  )


def _define_front_end() -> None:
  """A flag for each key of the front end, of its default's type."""
  kinds = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  for key in FRONT_END:
    default = config.FBANK[key]
    kinds[type(default)](key, default, f"config.data.fbank.{key}.")
  flags.register_validator("num_mels", lambda n: n > 0, "must be positive")


if __name__ == "__main__":
  define_split_flags()
  _define_front_end()
  flags.DEFINE_integer("limit", 0, "First clips only; 0 = all.", lower_bound=0)
  flags.DEFINE_integer("threads", 0, "0 = one a core.", lower_bound=0)
  flags.DEFINE_string(
    "output", "", "A file or folder; default stats_<split>.json at the records."
  )
  commands.run(main, required=("dataset", "split"))
