"""python -m data_prep.features --output=FEATURES
    --dataset=NAME --split=SPLIT[,SPLIT] [--data_dir=DIR --variant=video]
    --audio_model=RUN|FILE|none --video_model=FILE|none
    [--tokens=30 --dtype=float16 --limit=N --retry …]
python -m data_prep.features --output=FEATURES
    [--import_audio=DIR --import_video=DIR --made_by=TEXT …]

Frozen features of clips, which UAVM learns from: FEATURES is a folder that
`config.data.features` names, see avjax/data/features.py. The first form makes
them of a built data set, see data_prep/feature_nets.py: --audio_model is a run
of configs/uavm_extractor_*.py or a public file of one, --video_model
torchvision's ConvNeXt. The second takes files <id>.npy, [n, 1024] each, as the
authors of UAVM publish them for VGGSound; they are rounded to float16 unless
--dtype=float32.

Clips that have features are not computed again: a run that was stopped goes on,
and clips that are new are added. A clip or file that cannot be read is noted
with the reason; --retry asks for it again.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from avjax import commands
from avjax.data import features
from avjax.errors import InputError
from data_prep import clip_jobs, feature_nets

_FILES = 64  # imported at a time


class Files:
  """Files `<id>.npy` of a folder, an array [n, d] each.

  Attributes:
    ids: in order.
    width: d of the first file that is such an array; others are refused.
    origin: what the ids are names in.

  Raises:
    InputError: none of the files is such an array.
  """

  origin = "files, one .npy a clip"

  def __init__(self, folder: str, limit: int = 0):
    self._folder, self.width = pathlib.Path(folder).expanduser(), 0
    try:
      names = sorted(os.listdir(self._folder))
    except OSError as error:
      raise InputError(f"{folder}: {error}") from error
    ids = [name[:-4] for name in names if name.endswith(".npy")]
    self.ids = ids[: limit or None]
    reason = "there is no .npy file"
    for name in self.ids:
      try:
        self.width = self.read(name, "").shape[1]
        return
      except (ValueError, OSError) as error:
        reason = str(error)
    raise InputError(
      f"none of {len(self.ids)} files in {folder} holds features: {reason}"
    )

  def read(self, name: str, tracks: str) -> np.ndarray:
    """The features of a clip, as they are stored.

    Raises:
      ValueError: the file is no array [n, d] of floating point.
      OSError: it cannot be read.
    """
    del tracks
    try:  # maps, which never unpickles
      values = np.lib.format.open_memmap(self._folder / f"{name}.npy", mode="r")
    except (EOFError, OverflowError, TypeError) as error:
      raise ValueError(str(error) or type(error).__name__) from error
    width = self.width or (values.shape[-1] if values.ndim else 0)
    if values.ndim != 2 or not values.size or values.shape[1] != width:
      raise ValueError(
        f"an array of shape {values.shape}; expected [n, {width or 'd'}]"
      )
    if values.dtype.kind != "f":
      raise ValueError(f"an array of {values.dtype}; expected float16 or 32")
    return np.array(values)


def run(values: Any) -> list[str]:
  """What the command does.

  Args:
    values: the flags, as attributes.

  Returns:
    The report's lines.

  Raises:
    InputError: what a flag names cannot be used, or no clip has features.
  """
  imported = {
    m: folder
    for m in features.MODALITIES
    if (folder := getattr(values, f"import_{m}"))
  }
  if bool(imported) == (values.dataset is not None):
    raise InputError(
      "give --dataset and --split, or --import_audio or --import_video"
    )
  lines = list((_import if imported else _extract)(values, imported))
  return [*lines, str(pathlib.Path(values.output).expanduser())]


def _import(values: Any, folders: Mapping[str, str]) -> Iterator[str]:
  """One modality after the other: each has its own files."""
  for modality, folder in folders.items():
    files = Files(folder, values.limit)
    dtype = features.DTYPES[values.dtype]

    def compute(arrays: Sequence[np.ndarray], dtype: Any = dtype) -> Any:
      with np.errstate(over="ignore"):  # infinite: noted as failed
        return [array[: values.tokens].astype(dtype) for array in arrays]

    with contextlib.ExitStack() as stack:
      source = {"model": values.made_by, "clips": files.origin}
      writer = _writer(values, modality, files.width, source, files.ids, stack)
      job = clip_jobs.Job(writer, np.asarray, compute, lambda _: 1, _FILES)
      yield from _work(values, files, {modality: job})


def _extract(values: Any, _: Any) -> Iterator[str]:
  names = clip_jobs.models(values, features.MODALITIES)
  if not values.split:
    raise InputError(f"--dataset={values.dataset} needs --split")
  clips = feature_nets.Clips(
    values.dataset,
    values.split,
    tokens=values.tokens,
    data_dir=values.data_dir,
    variant=values.variant,
    limit=values.limit,
  )
  makers = {
    "audio": (feature_nets.Sound, values.audio_batch, lambda _: 1),
    "video": (feature_nets.Pictures, values.video_batch, len),
  }
  with contextlib.ExitStack() as stack:
    jobs = {}
    for modality in names:
      make, batch, size = makers[modality]
      net = make(names[modality], batch)
      net.check(clips)
      source = {**net.source, "clips": clips.origin}
      writer = _writer(values, modality, net.width, source, clips.ids, stack)
      jobs[modality] = clip_jobs.Job(
        writer, net.prepare, net.features, size, batch
      )
    yield from _work(values, clips, jobs)


def _writer(
  values: Any,
  modality: str,
  width: int,
  source: Mapping[str, Any],
  ids: Sequence[str],
  stack: contextlib.ExitStack,
) -> features.Writer:
  writer = features.Writer(
    values.output,
    modality,
    tokens=values.tokens,
    width=width,
    dtype=values.dtype,
    source=source,
    clips=ids,
  )
  stack.callback(writer.close)
  if values.retry:
    writer.retry()
  return writer


def _work(
  values: Any, clips: Any, jobs: Mapping[str, clip_jobs.Job]
) -> list[str]:
  return clip_jobs.carry_out(
    values, clips, dict(jobs), "features", done="stored"
  )


def main(argv: list[str]) -> None:
  """Prints the report."""
  del argv
  clip_jobs.tell(run)


def define_flags() -> None:
  """The command's flags."""
  clip_jobs.define_flags("features", variant="video")
  flags.DEFINE_string("audio_model", "", "An extractor's run or file, or none.")
  flags.DEFINE_string("video_model", "", "ConvNeXt of images, or none.")
  flags.DEFINE_string("import_audio", "", "A folder of <id>.npy files.")
  flags.DEFINE_string("import_video", "", "A folder of <id>.npy files.")
  flags.DEFINE_string(
    "made_by", "not said", "What made the files, for the record."
  )
  flags.DEFINE_integer("tokens", 30, "Of a clip; the rest is cut off.", 1)
  flags.DEFINE_enum(
    "dtype", "float16", list(features.DTYPES), "Of what is stored."
  )
  flags.DEFINE_integer("audio_batch", 16, "Clips at a time.", 1)
  flags.DEFINE_integer("video_batch", 64, "Pictures at a time.", 1)


if __name__ == "__main__":
  define_flags()
  commands.run(main, required=("output",))
