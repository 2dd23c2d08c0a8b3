"""UAVM's audio feature extractor: ConvNeXt-Base trained on VGGSound's sounds.

https://arxiv.org/abs/2208.00061, §2.1. UAVM is trained on features whose sounds
are the last map of this model. From `convnext_base-6075fbad.pth` of torchvision
(ImageNet) where the program runs; `pretrain=scratch` is ours:

  python -m avjax.main --config=configs/uavm_extractor_vgg.py

`python -m data_prep.features` makes features with it, on which
configs/uavm_vgg.py trains.

`modality=v` trains it on pictures instead, for data that ImageNet's weights do
not fit, or without them; the paper takes those as they are.

No score is published (UAVM hears 56.5 top-1 of its features, table 1). All but
architecture, start and log-mel is the public code's; stochastic depth of 0.5 is
torchvision's. After each epoch the test split is judged; the best epoch stays.

Differences from the public code: partners of mixup are neighbours of a balanced
batch instead of any clip, and the warm-up ends at the full rate. The public one
sets the rate to 0, 0.3, 0.6 and 0.9 of it at steps 0, 25, 50 and 75 and never
to more: --config.schedule.base_lr=9e-5 is what it trains with from there on.
Public: half precision (--config.dtype=bfloat16 here), four GPUs.

Cost, by arithmetic: 235 GFLOP per clip, 36 minutes on one H100 at half its peak
with --config.dtype=bfloat16; parameters, gradients and moments 1.4 GB.
"""

import math

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import convnext

PAPER = {"modality": "a", "pretrain": "imagenet", "epochs": 25}
DEMO = {"pretrain": "scratch", "epochs": 10}
SOURCES = {"imagenet": "convnext_base-6075fbad.pth", "scratch": ""}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = parse(arg, PAPER)
  config = extractor(args, base_lr=1e-4, start=15)
  config.data.name = "vggsound"
  config.data.fbank.update(mean=-5.081, std=4.4849)
  config.checkpoint.best = "test/top1"
  return shrink(config) if args.demo else config


def parse(arg: str | None, paper: dict[str, object]) -> ConfigDict:
  """Arguments; `:demo` starts from nothing."""
  demo = config_lib.parse_arg(arg, **paper).demo
  return config_lib.parse_arg(arg, **{**paper, **(DEMO if demo else {})})


def extractor(args: ConfigDict, *, base_lr: float, start: int) -> ConfigDict:
  """Supervised training; the rate is halved after `start` epochs and each."""
  config = config_lib.base_config()
  config.method = "convnext"
  config.total_epochs = float(args.epochs)
  config.batch_size = 120
  # Ours: `scan` compiles 36 blocks in seconds.
  options = {"drop_path": 0.5, "label_smoothing": 0.1, "scan": True}
  config.model = convnext.default_model("B", **options)
  config.init_from = config_lib.choose(SOURCES, args.pretrain, "pretrain")
  media = {"a": set_sound, "v": set_pictures}
  config_lib.choose(media, args.modality, "modality")(config.data)
  config.optimizer.update(name="adam_l2", b1=0.95, b2=0.999, weight_decay=5e-7)
  config.schedule.update(name="step", base_lr=base_lr, step_factor=0.5)
  config.schedule.step_epochs = tuple(range(start, math.ceil(args.epochs)))
  config.schedule.warmup_steps = 83  # 1,000 clips of 12 each, as counted there
  config.evals.test = config_lib.eval_section(
    "classification", every_epochs=1.0
  )
  return config


def set_sound(data: ConfigDict) -> None:
  """The whole sound as log-mel, and what is done to it."""
  data.modality, data.sampling = "a", "balanced"
  data.files.channels = "first"
  data.audio.seconds = 10.015  # whole clips: 1,000 frames hold no more
  data.fbank.update(window="hanning", edges="snip", frames=1_000)
  data.fbank.remove_mean = True
  augment = data.augment
  augment.update(freq_masks=1, freq_size=48, time_masks=1, time_size=192)
  augment.update(mixup=10.0, mixup_probability=0.5, mixup_waveform=True)
  augment.update(noise=0.1, roll=10, mask_value="raw", random_crop=False)


def set_pictures(data: ConfigDict) -> None:
  """One frame, as torchvision's weights had theirs."""
  data.modality, data.sampling = "v", "balanced"
  data.video.update(num_frames=1, stride=1)
  data.video.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  data.augment.update(flip=0.5, mixup=10.0, mixup_probability=0.5)


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config.model.update(width=16, depths=(1, 1, 2, 1), scan=False)
  config.batch_size = 24
  config.log_every = 10
  config.data.update(name="av_demo", split="train")
  config.data.video.update(resize=112, size=112)
  # Ours: best after 400 steps of sound, 1,200 of pictures from random weights.
  config.model.drop_path = config.data.augment.mixup = 0.0
  if config.data.modality == "a":
    # Clips of 3 s: 298 frames of log-mel.
    config.data.audio.seconds, config.data.fbank.frames = 3.0, 288
    config.data.augment.update(freq_size=24, time_size=48)
  config.schedule.update(base_lr=2e-3, warmup_steps=0, step_epochs=(6, 8))
  if config.data.modality == "v":
    config.total_epochs *= 3
    config.schedule.step_epochs = (20, 26)
  config.checkpoint.every_epochs = config.total_epochs / 2
  for section in config.evals.values():
    section.update(split="test", every_epochs=config.total_epochs / 2)
  return config
