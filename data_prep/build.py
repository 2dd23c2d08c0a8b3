"""python -m data_prep.build --dataset=NAME --data_dir=OUT
    [--media=DIR --annotations=FILE]

Builds a data set from local media files into OUT/NAME/VARIANT/VERSION. For
av_demo no media are needed: they are made.
"""

import importlib
import pathlib
import signal
import sys

from absl import app, flags

from avjax import commands, config
from avjax.data import media
from avjax.data.datasets import VARIANTS
from avjax.errors import InputError, lookup

# Data set -> the class that builds it. Modules are imported when needed.
BUILDERS = {
  "acav": "data_prep.acav:Acav",
  "audiocaps": "data_prep.audiocaps:AudioCaps",
  "audioset": "data_prep.audioset:AudioSet",
  "av_demo": "data_prep.av_demo:AvDemo",
  "ave": "data_prep.ave:Ave",
  "clotho": "data_prep.clotho:Clotho",
  "epic_kitchens": "data_prep.epic_kitchens:EpicKitchens",
  "folder": "data_prep.folder:Folder",
  "msrvtt": "data_prep.msrvtt:MsrVtt",
  "vggsound": "data_prep.vggsound:VggSound",
}

DATASET = flags.DEFINE_string("dataset", None, "What to build.")
DATA_DIR = flags.DEFINE_string(
  "data_dir", "", "Where to; default $AVJAX_DATA or ~/avjax_data."
)
MEDIA = flags.DEFINE_string(
  "media", "", "Folder of the media files; av_demo makes its own without it."
)
ANNOTATIONS = flags.DEFINE_string(
  "annotations", "", "File of the clips' labels; default in --media."
)
VARIANT = flags.DEFINE_enum(
  "variant", "video", list(VARIANTS), "Frames that are stored of a clip."
)
WORKERS = flags.DEFINE_integer(
  "workers", -1, "Decoding processes; 0 = none, -1 = one a core."
)
REFUSE = flags.DEFINE_list(
  "refuse", [], "Clips to leave out: 'no audio', 'no video', 'damaged'."
)
FRAME_RATE = flags.DEFINE_float(
  "frame_rate", media.VIDEO_RATE, "Frames/s stored, or chosen from."
)
SHORT_SIDE = flags.DEFINE_integer(
  "short_side", 256, "Shorter side of stored frames at most, pixels."
)
QUALITY = flags.DEFINE_integer("quality", 85, "Of JPEG frames, 1..100.")
AUDIO_RATE = flags.DEFINE_integer("audio_rate", 16_000, "Samples/s stored.")
CHANNELS = flags.DEFINE_enum(
  "channels", "mean", list(media.CHANNELS), "One channel out of several."
)
MIN_SECONDS = flags.DEFINE_float(
  "min_seconds", 0.1, "Shorter clips are 'too short'."
)
MAX_SECONDS = flags.DEFINE_float(
  "max_seconds", media.Limits.seconds, "Longer clips are 'corrupt'."
)
MAX_PIXELS = flags.DEFINE_integer(
  "max_pixels", media.Limits.pixels, "Clips of larger pictures are 'corrupt'."
)
MAX_FRAMES = flags.DEFINE_integer(
  "max_frames", media.Limits.frames, "Clips of more frames are 'corrupt'."
)
MAX_GIGABYTES = flags.DEFINE_float(
  "max_gigabytes",
  media.Limits.gigabytes,
  "Clips of more decoded frames are 'corrupt'.",
)
BEAM = flags.DEFINE_list(
  "beam_pipeline_options",
  None,
  "Build by Apache Beam (extra `beam`): runner=DataflowRunner,project=…",
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier build.")


def main(argv: list[str]) -> None:
  """Builds what the flags say and prints its folder."""
  if len(argv) > 1:
    raise InputError(f"unexpected argument {argv[1]!r}")
  place = lookup(BUILDERS, DATASET.value, "data set to build")
  module, _, name = place.partition(":")
  section = config.data_section()
  section.name, section.variant = DATASET.value, VARIANT.value
  section.dir = DATA_DIR.value
  if DATASET.value == "av_demo" and not MEDIA.value:
    from data_prep import av_demo

    print(av_demo.ensure_demo(section))
    return
  print(build(getattr(importlib.import_module(module), name), section))


def build(builder_class: type, section: config.ConfigDict) -> pathlib.Path:
  """Builds from the files under --media; see `data_prep.builder.build`."""
  from avjax.data import datasets
  from data_prep import builder

  folder = pathlib.Path(MEDIA.value).expanduser()
  if not MEDIA.value or not folder.is_dir():
    raise InputError(f"--media={MEDIA.value} is not a folder")
  annotations = pathlib.Path(ANNOTATIONS.value).expanduser()
  if ANNOTATIONS.value and not annotations.exists():
    raise InputError(f"--annotations={ANNOTATIONS.value} does not exist")
  limits = media.Limits(
    seconds=MAX_SECONDS.value,
    pixels=MAX_PIXELS.value,
    frames=MAX_FRAMES.value,
    gigabytes=MAX_GIGABYTES.value,
  )
  options = builder.Options(
    media=folder,
    annotations=annotations if ANNOTATIONS.value else None,
    workers=WORKERS.value,
    refuse=tuple(REFUSE.value),
    frame_rate=FRAME_RATE.value,
    short_side=SHORT_SIDE.value,
    audio_rate=AUDIO_RATE.value,
    channels=CHANNELS.value,
    quality=QUALITY.value,
    min_seconds=MIN_SECONDS.value,
    limits=limits,
    beam=None if BEAM.value is None else tuple(BEAM.value),
  )
  return builder.build(
    builder_class,
    options,
    data_dir=datasets.data_dir(section),
    variant=VARIANT.value,
    overwrite=OVERWRITE.value,
  )


def run(argv: list[str]) -> None:
  """`main`; bad input is one line and exit status 2."""
  try:
    main(argv)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("stopped; the same command goes on from there", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
  flags.mark_flag_as_required("dataset")
  app.run(run, flags_parser=commands.parse_flags)
