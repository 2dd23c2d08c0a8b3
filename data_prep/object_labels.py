"""python -m data_prep.object_labels --output=SCORES
    (--dataset=NAME --split=SPLIT[,SPLIT] [--data_dir=DIR --variant=frames10]
     | --media=DIR)
    --audio_model=FOLDER|msclap|none --video_model=FILE.pt|none
    [--labels=FILE --device=auto --limit=N --retry …]

How sure models are of each label in each clip: CLAP hears its sound, YOLOv8
sees ten of its pictures. SCORES is a folder, see avjax/data/object_scores.py;
thresholds are chosen when it is used. Clips that have scores are not scored
again: a run that was stopped goes on, and clips that are new are added. A clip
that cannot be read is noted with the reason; --retry asks for it again.

| --audio_model | |
|---|---|
| a folder | CLAP for `transformers`, such as laion/clap-htsat-unfused |
| msclap | Microsoft's of 2023, the one of DETECLAP, in an environment of its own: --msclap_python, --msclap_weights and perhaps --msclap_gpt2; see data_prep/msclap_worker.py |

--labels is a list of names: a .txt file with one a line, or JSON; default the
601 of Open Images V7. The detector must know all of them. Needs the extra
`labels`; Ultralytics and its weights are under AGPL-3.0.
"""  # noqa: E501 - a table

import contextlib
import importlib.resources
import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from avjax import commands
from avjax.data import object_scores
from avjax.errors import InputError
from data_prep import (
  clip_jobs,
  object_audio,
  object_clips,
  object_msclap,
  object_video,
)
from data_prep.clip_jobs import Job
from data_prep.object_clips import Source

THRESHOLDS = (0.3, 0.4, 0.5)
_BLOCK = 1 << 14  # rows counted at a time


def read_labels(path: str = "") -> list[str]:
  """A list of labels.

  Args:
    path: text with one a line, or JSON: a list, or one under `names`; '' = the
      classes of Open Images V7.

  Raises:
    InputError: it is no such list, is empty or names a label twice.
  """
  file: Any = pathlib.Path(path).expanduser()
  if not path:
    file = importlib.resources.files("avjax.data") / "classes" / "oiv7.json"
  try:
    text = file.read_text(encoding="utf-8-sig")
    if str(file).lower().endswith(".json"):
      said = json.loads(text)
      names = said.get("names") if isinstance(said, dict) else said
    else:
      names = [line.strip() for line in text.splitlines() if line.strip()]
  except (OSError, ValueError) as error:
    raise InputError(f"--labels={path}: {error}") from error
  if not isinstance(names, list) or not all(
    isinstance(name, str) for name in names
  ):
    raise InputError(f"--labels={path} holds no list of names")
  object_scores.check_labels(names)
  return names


# ---------------------------------------------------------------- report


def label_counts(scores: Any, rows: np.ndarray) -> dict[str, str]:
  """How many labels the clips of these rows would get at each threshold."""
  found = {}
  over = np.zeros((len(THRESHOLDS), 2), np.int64)  # labels, clips with one
  for k in range(0, len(rows), _BLOCK):
    block = scores.values[np.sort(rows[k : k + _BLOCK])].astype(np.float32)
    for sums, threshold in zip(over, THRESHOLDS, strict=True):
      labels = (block > threshold).sum(axis=1)
      sums += labels.sum(), (labels > 0).sum()
  for (labels, clips), threshold in zip(over, THRESHOLDS, strict=True):
    count = max(len(rows), 1)
    found[f"labels a clip > {threshold}"] = f"{labels / count:.2f}"
    found[f"clips with any > {threshold}"] = f"{100 * clips / count:.1f}%"
  return found


# --------------------------------------------------------------- command


def make_source(values: Any) -> Source:
  """The clips that the flags name."""
  if (values.media is None) == (values.dataset is None):
    raise InputError("give --media, or --dataset and --split")
  if values.media is not None:
    return object_clips.Files(values.media, values.limit)
  if not values.split:
    raise InputError(f"--dataset={values.dataset} needs --split")
  return object_clips.Stored(
    values.dataset,
    values.split,
    data_dir=values.data_dir,
    variant=values.variant,
    limit=values.limit,
  )


def choose_device(name: str) -> str:
  """'cpu' or 'cuda'; 'auto' = the GPU if PyTorch has one.

  Raises:
    InputError: there is no such device.
  """
  with object_audio.whole_torchvision():
    (torch,) = object_audio.libraries("torch")
  if name == "auto":
    return "cuda" if torch.cuda.is_available() else "cpu"
  if name == "cuda" and not torch.cuda.is_available():
    raise InputError("--device=cuda: PyTorch finds no CUDA GPU")
  return name


def _audio_job(
  values: Any, labels: list[str], clips: Source, stack: Any
) -> Job:
  """Opens the files before the model computes the labels' embeddings."""
  device = choose_device(values.device)
  if values.audio_model == "msclap":
    model: Any = object_msclap.Msclap(
      values.msclap_python,
      values.msclap_weights,
      text_model=values.msclap_gpt2,
      device=device,
    )
  else:
    model = object_audio.Clap(values.audio_model, device)
  stack.callback(model.close)
  writer = _writer(values, "audio", labels, model.source, clips, stack)
  scorer = object_audio.Scorer(model, labels, values.audio_batch)

  def prepare(clip: object_clips.Clip) -> np.ndarray | None:
    if not len(clip.sound):
      return None
    return object_audio.windows(clip.sound, clip.rate, model)

  return Job(writer, prepare, scorer.scores, len, values.audio_batch)


def _video_job(
  values: Any, labels: list[str], clips: Source, stack: Any
) -> Job:
  detector = object_video.Detector(
    values.video_model,
    labels,
    device=choose_device(values.device),
    batch_size=values.video_batch,
  )
  writer = _writer(values, "video", labels, detector.source, clips, stack)

  def prepare(clip: object_clips.Clip) -> list[np.ndarray] | None:
    return detector.prepare(clip.frames) if len(clip.frames) else None

  return Job(writer, prepare, detector.scores, len, values.video_batch)


def _writer(
  values: Any,
  modality: str,
  labels: Any,
  source: Any,
  clips: Source,
  stack: Any,
) -> object_scores.Writer:
  # Other files may have the same names.
  source = {**source, "clips": clips.origin}
  writer = object_scores.Writer(
    values.output, modality, labels=labels, source=source, clips=clips.ids
  )
  stack.callback(writer.close)
  if values.retry:
    writer.retry()
  return writer


MAKE = {"audio": _audio_job, "video": _video_job}


def run(values: Any) -> list[str]:
  """What the command does.

  Args:
    values: the flags, as attributes.

  Returns:
    The report's lines.

  Raises:
    InputError: what a flag names cannot be used, or no clip has scores.
  """
  wanted = clip_jobs.models(values, tuple(MAKE))
  labels, source = read_labels(values.labels), make_source(values)
  with contextlib.ExitStack() as stack:
    jobs = {m: MAKE[m](values, labels, source, stack) for m in wanted}
    lines = clip_jobs.carry_out(
      values, source, jobs, "object scores", done="scored", more=label_counts
    )
  return [*lines, str(pathlib.Path(values.output).expanduser())]


def main(argv: list[str]) -> None:
  """Prints the report."""
  del argv
  clip_jobs.tell(run)


def define_flags() -> None:
  """The command's flags."""
  clip_jobs.define_flags("scores", variant="frames10")
  flags.DEFINE_string("media", None, "A folder of media files, or one file.")
  flags.DEFINE_string("labels", "", "A list of names; default Open Images V7.")
  flags.DEFINE_string("audio_model", "", "CLAP's folder, msclap or none.")
  flags.DEFINE_string("video_model", "", "A detector's .pt file, or none.")
  flags.DEFINE_string("msclap_python", "", "Python of msclap's environment.")
  flags.DEFINE_string("msclap_weights", "", "CLAP_weights_2023.pth.")
  flags.DEFINE_string("msclap_gpt2", "", "GPT-2's folder; default the hub's.")
  flags.DEFINE_integer("audio_batch", 32, "Windows of sound at a time.", 1)
  flags.DEFINE_integer("video_batch", 32, "Pictures at a time.", 1)
  flags.DEFINE_enum("device", "auto", ["auto", "cpu", "cuda"], "Of PyTorch.")


if __name__ == "__main__":
  define_flags()
  commands.run(main, required=("output",))
