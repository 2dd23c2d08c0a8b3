"""CAV-MAE fine-tuned on VGGSound.

https://arxiv.org/abs/2210.07839. After --config=configs/cavmae_audioset.py has
pre-trained (or configs/cavmae_vgg.py, with `pretrain=vgg`):

  python -m avjax.main --config=configs/cavmae_vgg_finetune.py

Top-1 on the test clips (15,446 then) as published:

| argument             | a    | v    | av   |                      |
|----------------------|------|------|------|----------------------|
| (none: scale+)       | 59.5 | 47.0 | 65.5 | paper                |
| pretrain=scale++     |      |      | 65.8 | public training log  |
| pretrain=audioset_vgg| 59.8 |      | 65.9 | public README, log   |
| pretrain=vgg         |      |      | 64.8 | public training log  |

for modality=a, v and (default) av. A model of both with one missing at test
time (AVSiam, table 7): 51.8 from sound (`missing_v`), 27.3 from images
(`missing_a`).

`pretrain` stands for a run's default folder, see SOURCES; another is
--config.init_from=DIR. `test` is the published score: the mean of the weights
at the ends of epochs 3 to 10, probabilities averaged over ten frames with the
same sound. `frame` looks at frame 5 after each epoch, from epoch 3 on with the
mean so far (the public logs: with that epoch's weights).

Differences from the public code: partners of mixup are neighbours of a
balanced batch instead of any clip.

Cost, by arithmetic: 402 GFLOP per clip, 23 minutes on one H100 at half its peak
with --config.dtype=bfloat16 (the public code: 5.7 hours on four GPUs);
parameters, gradients and moments 2.6 GB.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import cavmae_finetune
from configs import cavmae_audioset

PAPER = {"modality": "av", "pretrain": "scale+", "epochs": 10}
DEMO = {"pretrain": "scratch"}
SOURCES = {
  "base": "runs/cavmae_audioset-variant_base",
  "scale+": "runs/cavmae_audioset",
  "scale++": "runs/cavmae_audioset-variant_scale++",
  "vgg": "runs/cavmae_vgg/pretrain",
  "audioset_vgg": "runs/cavmae_vgg-pretrain_audioset/pretrain",
  "deteclap": "runs/deteclap_vgg/pretrain",
  "scratch": "",
}
MODES = {"av": ("av", "missing_a", "missing_v"), "a": (), "v": ()}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = parse(arg, PAPER)
  config = finetuning(args, batch_size=48, base_lr=1e-4, head=10.0, start=2)
  config.data.sampling = "balanced"
  config.optimizer.average_from = 3
  return shrink(config) if args.demo else config


def parse(arg: str | None, paper: Mapping[str, Any]) -> ConfigDict:
  """Arguments; `:demo` starts from nothing."""
  demo = config_lib.parse_arg(arg, **paper).demo
  return config_lib.parse_arg(arg, **{**paper, **(DEMO if demo else {})})


def finetuning(
  args: ConfigDict, *, batch_size: int, base_lr: float, head: float, start: int
) -> ConfigDict:
  """Supervised fine-tuning; `head` multiplies the classifier's rate."""
  config = config_lib.base_config()
  config.method = "cavmae_finetune"
  config.total_epochs = float(args.epochs)
  config.batch_size = batch_size
  modes = config_lib.choose(MODES, args.modality, "modality")
  config.model = cavmae_finetune.default_model("B", modality=args.modality)
  config.init_from = config_lib.choose(SOURCES, args.pretrain, "pretrain")
  config.data.name = "vggsound"
  config.data.modality = args.modality
  cavmae_audioset.set_clips(config)
  set_augment(config)
  cavmae_audioset.set_optimizer(config, base_lr, start=start, step=1)
  config.optimizer.update(average="epochs", multipliers={"head": head})
  set_evals(config, modes)
  return config


def set_augment(config: ConfigDict) -> None:
  """Mixup, and masks over the spectrogram."""
  augment = config.data.augment
  augment.update(freq_masks=1, freq_size=48, time_masks=1, time_size=192)
  augment.update(mixup=10.0, mixup_probability=0.5, mixup_waveform=True)


def set_evals(config: ConfigDict, modes: tuple[str, ...]) -> None:
  """One frame after each epoch; ten at the end, in all `modes`."""
  config.evals.frame = config_lib.eval_section(
    "classification", every_epochs=1.0
  )
  config.evals.test = config_lib.eval_section(
    "classification", views=10, average="probabilities", modes=modes
  )


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config = cavmae_audioset.shrink(config)
  config.data.augment.update(freq_size=24, time_size=48)
  # Ours: what 200 steps on 960 clips learn most with.
  config.data.augment.mixup = 0.0
  config.schedule.update(base_lr=1.5e-3, step_epochs=(6, 8))
  config.optimizer.update(multipliers={"head": 1.0}, average_from=8)
  config.evals.test.every_epochs = 0.0
  return config
