"""CAV-MAE (ICLR 2023) on AudioSet: pre-training.

https://arxiv.org/abs/2210.07839; as https://arxiv.org/abs/2409.11729, §II,
describes it. Contrast and masked reconstruction on all of AudioSet (1.8M clips,
no labels), from an image MAE:

  python -m avjax.main --config=configs/cavmae_audioset.py

`variant` is the batch, with the rate and the negatives that go with it:

| argument         | batch | rate | negatives | AS-20K | AS-2M | VGGSound |
|------------------|-------|------|-----------|--------|-------|----------|
| variant=base     | 48    | 5e-5 | 12        |        |       |          |
| (none: scale+)   | 108   | 1e-4 | 27        | 42.0   | 51.2  | 65.5     |
| variant=scale++  | 256   | 2e-4 | 64        | 42.2   | 51.05 | 65.8     |

The scores (mAP, mAP, top-1) are those of fine-tuning afterwards, of the paper
and for scale++ of the public training logs: configs/cavmae_as20k_finetune.py,
configs/cavmae_as2m_finetune.py, configs/cavmae_vgg_finetune.py. `negatives` is
model.group_size: the public loss saw one of four GPUs' share of the batch, so
--config.model.group_size=0, the whole batch, is another objective.

Zero-shot retrieval, R@1 / 5 / 10 of 1,725 AudioSet and 1,545 VGGSound clips as
published (CoAVT, table IV); `base` R@1 alone (AVSiam, table 2):

|        | sound to picture: AS | VGG         | picture to sound: AS | VGG   |
|--------|----------------------|-------------|----------------------|-------|
| scale+ | 15.1/34.0/43.0 | 12.8/30.4/40.3 | 18.8/39.5/50.1 | 14.8/34.2/44.0 |
| base   | 13.5           | 12.1           | 16.1           | 14.7           |

They belong to lists of five clips a class:
--config.evals.retrieval.subset=FILE.csv. Without it the whole split is asked.
A finished run is asked by

  python -m avjax.evaluate --workdir=DIR --set=evals.retrieval.subset=FILE.csv

The public code hears the first channel of a clip: data sets are the same when
they are built with `--channels=first`, as one's own files then are read.

Numbers are the public recipe's; its betas, decay, schedule and statistics hold
in all CAV-MAE's configs. It starts from `mae_pretrain_vit_base_full.pth`
(`pretrain=mae`, looked for where the program runs); `pretrain=scratch` is ours.

Cost, by arithmetic: 237 GFLOP per clip, 6.2 hours on one H100 at half its peak
with --config.dtype=bfloat16 (the public code's base run took 22.4 days on four
GPUs of 12 GB); parameters, gradients and moments 3.1 GB.
"""

import math

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import cavmae

PAPER = {"variant": "scale+", "pretrain": "mae", "epochs": 25}
SCALES = {
  "base": {"batch_size": 48, "base_lr": 5e-5, "group_size": 12},
  # The paper's; the public script has 120 and 30.
  "scale+": {"batch_size": 108, "base_lr": 1e-4, "group_size": 27},
  "scale++": {"batch_size": 256, "base_lr": 2e-4, "group_size": 64},
}
VARIANTS = {v: {**PAPER, "variant": v} for v in ("scale+", "base", "scale++")}
SOURCES = {"mae": "mae_pretrain_vit_base_full.pth", "scratch": ""}
DEMO = {"pretrain": "scratch"}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, DEMO)
  config = pretraining(args.epochs, **SCALES[args.variant])
  config.init_from = config_lib.choose(SOURCES, args.pretrain, "pretrain")
  config.data.update(name="audioset", split="train_2m")
  for section in config.evals.values():
    section.split = "eval"
  return shrink(config) if args.demo else config


def pretraining(
  epochs: int, batch_size: int, base_lr: float, group_size: int
) -> ConfigDict:
  """Self-supervised pre-training."""
  config = config_lib.base_config()
  config.method = "cavmae"
  config.total_epochs = float(epochs)
  config.batch_size = batch_size
  config.model = cavmae.default_model("B", group_size=group_size)
  config.data.heads = ()
  set_clips(config)
  set_optimizer(config, base_lr, start=10, step=5)
  config.evals.retrieval = config_lib.eval_section(
    "retrieval", every_epochs=5.0, pictures=4
  )
  config.evals.reconstruction = config_lib.eval_section(
    "reconstruction", every_epochs=5.0, limit=1_024
  )
  return config


def set_clips(config: ConfigDict) -> None:
  """Which image and sound of a clip are seen, and what is done to them."""
  data = config.data
  data.variant = "frames10"  # one frame of ten, at random
  data.video.update(num_frames=1, stride=1, resize=224, size=224)
  data.video.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
  data.files.channels = "first"
  data.audio.seconds = 10.255  # whole clips: 1,024 frames hold no more
  data.fbank.update(window="hanning", edges="snip", frames=1_024)
  data.fbank.update(remove_mean=True, mean=-5.081, std=4.4849)
  data.augment.update(random_crop=False, noise=0.1, roll=1_024)
  data.augment.mask_value = "raw"


def set_optimizer(
  config: ConfigDict, base_lr: float, *, start: int, step: int
) -> None:
  """Adam; the rate is halved after `start` epochs and each `step` more."""
  config.optimizer.update(name="adam_l2", b1=0.95, b2=0.999, weight_decay=5e-7)
  epochs = math.ceil(config.total_epochs)
  config.schedule.update(name="step", base_lr=base_lr, step_factor=0.5)
  config.schedule.step_epochs = tuple(range(start, epochs, step))


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config.model.update(width=128, depth=3, heads=4, mlp=256)
  config.model.update(patch_audio=(16, 32), patch_video=(1, 8, 8))
  config.batch_size, config.log_every = 48, 10
  # Clips of 3 s (298 frames of log-mel) and 112 pixels.
  config.data.update(name="av_demo", split="train")
  config.data.video.update(resize=64, size=64)
  config.data.audio.seconds = 3.0
  config.data.fbank.frames = 288
  config.data.augment.roll = 288
  for section in config.evals.values():
    section.update(split="test", every_epochs=config.total_epochs / 2)
  if config.method == "cavmae":
    config.model.update(decoder_width=64, decoder_depth=1)
    config.model.update(decoder_heads=4, decoder_mlp=128, group_size=0)
    # Ours: what hundreds of steps from random weights learn most with.
    config.model.update(mask_audio=0.5, mask_video=0.5, contrast_weight=1.0)
    config.batch_size = 64
    config.schedule.update(base_lr=1.5e-3, warmup_epochs=3.0)
    config.checkpoint.every_epochs = config.total_epochs / 4
  return config
