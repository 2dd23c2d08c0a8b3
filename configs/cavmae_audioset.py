"""CAV-MAE (ICLR 2023) on AudioSet: pre-training.

https://arxiv.org/abs/2210.07839; as https://arxiv.org/abs/2409.11729, §II, has
it: contrast and masked reconstruction on 1.8M clips, from an image MAE:

  python -m avjax.main --config=configs/cavmae_audioset.py

| variant  | batch | rate | negatives | AS-20K | AS-2M | VGG  | R@1 AS, VGG |
|----------|-------|------|-----------|--------|-------|------|-------------|
| base     | 48    | 5e-5 | 12        |        |       |      | 13.5, 12.1  |
| (scale+) | 108   | 1e-4 | 27        | 42.0   | 51.2  | 65.5 | 15.1, 12.8  |
| scale++  | 256   | 2e-4 | 64        | 42.2   | 51.05 | 65.8 |             |

Scores: mAP, mAP, top-1 of configs/cavmae_{as20k,as2m,vgg}_finetune.py, of the
paper and for scale++ of the public logs; R@1 is zero-shot, sound to picture
(CoAVT, table IV; AVSiam, table 2; the other way 16.1, 14.7 and 18.8, 14.8) of
five clips a class: evals.retrieval.subset=FILE.csv, for a finished run by
avjax.evaluate --set. `negatives`: model.group_size, one of four GPUs' share of
the batch in the public code; 0, the whole batch, is another objective.

Numbers are the public recipe's, also for the other configs. `pretrain=mae` is
`mae_pretrain_vit_base_full.pth` where the program runs, `scratch` is ours. The
public code hears the first channel: build with `--channels=first`.

Cost, by arithmetic: 237 GFLOP per clip, 6.2 hours on one H100 at half its peak
with --config.dtype=bfloat16; parameters, gradients and moments 3.1 GB.
"""

import math

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import cavmae

PAPER = {"variant": "scale+", "pretrain": "mae", "epochs": 25}
SCALES = {
  "base": {"batch_size": 48, "base_lr": 5e-5, "group_size": 12},
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
  options = {"retrieval": {"pictures": 4}, "reconstruction": {"limit": 1_024}}
  for kind, more in options.items():
    section = config_lib.eval_section(kind, every_epochs=5.0, **more)
    config.evals[kind] = section
  return config


def set_clips(config: ConfigDict) -> None:
  """One frame of ten, at random, the whole sound, and what is done to them."""
  data = config.data
  data.variant, data.files.channels = "frames10", "first"
  data.video.update(num_frames=1, stride=1, resize=224, size=224)
  data.video.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
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
  config.batch_size = {"cavmae": 64}.get(config.method, 48)
  # Clips of 3 s (298 frames of log-mel) and 112 pixels.
  config.data.update(name="av_demo", split="train")
  config.log_every = 10
  config.data.video.update(resize=64, size=64)
  config.data.audio.seconds = 3.0
  config.data.fbank.frames = config.data.augment.roll = 288
  for section in config.evals.values():
    section.update(split="test", every_epochs=config.total_epochs / 2)
  if config.method == "cavmae":
    config.model.update(decoder_width=64, decoder_depth=1)
    config.model.update(decoder_heads=4, decoder_mlp=128, group_size=0)
    # Ours: what hundreds of steps from random weights learn most with.
    config.model.update(mask_audio=0.5, mask_video=0.5, contrast_weight=1.0)
    config.schedule.update(base_lr=1.5e-3, warmup_epochs=3.0)
    config.checkpoint.every_epochs = config.total_epochs / 4
  return config
