"""Frozen features of `av_demo`, by two small ConvNeXts of its own.

ImageNet's ConvNeXt is not at hand everywhere, so the one for pictures is
trained on av_demo's training clips, as the one for sounds is: see `:demo` of
configs/uavm_extractor_vgg.py. It takes a few minutes, once for each data set;
what was stopped goes on. Clips of 3 s give nine tokens of either.
"""

import pathlib
import types
from typing import Any

from absl import logging

from avjax import train
from configs import uavm_extractor_vgg
from data_prep import av_demo
from data_prep import features as extraction

EXTRACTORS = {"audio": "demo", "video": "demo,modality=v"}
SPLITS = ("train", "test")
DONE = "done"  # a file: every clip has been asked for its features


def ensure(
  data: Any, folder: pathlib.Path, steps: int | None = None
) -> pathlib.Path:
  """Trains the extractors and stores what they make, unless that is there.

  Args:
    data: `config.data`.
    folder: that holds the data set.
    steps: of each extractor's training; None = as its config says.

  Returns:
    The folder of the features.
  """
  out = folder / "features"
  models = {m: folder / f"extractor_{m}" for m in EXTRACTORS}
  with av_demo.lock(folder / ".lock_features"):
    for m, argument in EXTRACTORS.items():
      if (models[m] / "done.json").exists():
        continue
      logging.info("av_demo: training the extractor of %s", m)
      config = extractor(argument, data, folder, steps)
      train.train_and_evaluate(config, models[m])
    values = types.SimpleNamespace(
      output=str(out), dataset="av_demo", split=list(SPLITS),
      data_dir=str(folder), variant=data.variant, tokens=data.feature_frames,
      audio_model=str(models["audio"]), video_model=str(models["video"]),
      import_audio="", import_video="", made_by="", dtype="float16",
      audio_batch=16, video_batch=64, threads=0, limit=0, retry=False,
    )  # fmt: skip
    if not (out / DONE).exists():
      for line in extraction.run(values):
        logging.info("%s", line)
      (out / DONE).touch()
  return out


def extractor(
  argument: str, data: Any, folder: pathlib.Path, steps: int | None
) -> Any:
  """The config of an extractor's training on this data set."""
  config = uavm_extractor_vgg.get_config(argument)
  config.data.dir = str(folder)
  config.data.demo.update(data.demo)
  if steps:
    config.total_steps, config.total_epochs = steps, 0.0
  return config
