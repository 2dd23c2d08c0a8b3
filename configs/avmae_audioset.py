"""Audiovisual Masked Autoencoders (ICCV 2023) on AudioSet.

https://arxiv.org/abs/2212.05922, §4.1 and tables 4 and 7b: pre-training on all
of AudioSet (AS2M, 1.8M clips, no labels), then audiovisual fine-tuning on the
more even half million of AS500K (configs/avmae_audioset_finetune.py):

  python -m avjax.main --config=configs/avmae_audioset.py

mAP on the 18,589 evaluation clips as published:

| argument             | A    | V    | AV   |                        |
|----------------------|------|------|------|------------------------|
| (none)               | 46.6 | 31.1 | 51.8 | table 7b (table 4: 51.3) |
| modality=a           | 46.4 |      |      | the released AudioMAE  |

A and V come from fine-tuning on one modality afterwards:
configs/avmae_audioset_finetune.py:modality=a.

All is as in configs/avmae_vgg.py but for what follows. `variant=public` is the
released configuration where it differs: 120 epochs, 10 s of sound of which
70 % are masked. Which of the two made the released weights is not published.

Cost, by arithmetic: 74 hours on one H100 at half its peak (B: 28) with
--config.dtype=bfloat16.
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import avmae_audioset_finetune, avmae_vgg

PAPER = {**avmae_vgg.PAPER, "epochs": 80}  # as many steps as 800 of VGGSound
VARIANTS = {
  "paper": PAPER,
  "public": {**PAPER, "variant": "public", "epochs": 120},
}


def get_config(arg: str | None = None) -> ConfigDict:
  """Both stages."""
  args = config_lib.parse_variants(arg, VARIANTS, {"epochs": 20})
  pretrain = pretraining(args)
  return config_lib.staged(
    pretrain=avmae_vgg.shrink(pretrain) if args.demo else pretrain,
    finetune=avmae_audioset_finetune.get_config(avmae_vgg.next_stage(args)),
  )


def pretraining(args: ConfigDict) -> ConfigDict:
  """Self-supervised pre-training."""
  config = avmae_vgg.pretraining(args)
  config.data.update(name="audioset", split="train_2m")
  config.schedule.base_lr = 3e-4  # public
  config.evals.reconstruction.split = "eval"
  if args.variant == "public":
    config.model.mask_audio = 0.7
    config.data.audio.seconds = 10.0
  return config
