"""AVSiam fine-tuned on VGGSound with mixed inputs.

https://arxiv.org/abs/2403.19638. Every step trains sound, pictures or both.
After --config=configs/avsiam_audioset.py has pre-trained:

  python -m avjax.main --config=configs/avsiam_vgg_finetune.py

Top-1 on the test clips as published; all three of one model:

| argument             | a    | v    | av   |                       |
|----------------------|------|------|------|-----------------------|
| (none: variant=base) | 55.7 | 46.0 | 64.9 | tables 1 and 7        |
| variant=base+        |      |      | 66.7 | table 1               |
| variant=large        |      |      | 67.1 | table 1               |
| variant=huge         |      |      | 68.0 | table 1               |
| pretrain=in21k       |      |      | 61.2 | table 8               |
| (from AST: below)    | 61.3 | 30.4 | 62.5 | table 6               |

`modality=av`, `a` or `v` trains one of the three alone. `pretrain=audioset`
stands for a run's default folder with the same `variant` and `encoder` (given
in this order); another, such as those of tables 4, 6 and 8, is
--config.init_from=DIR (6: runs/avsiam_audioset-pretrain_ast; `pretrain=ast`
goes without it, from AST itself). `test` is the published score: probabilities
averaged over ten frames; `frame` looks at one after each epoch.

Numbers are tables 9 to 11's; mixup's strength, SpecAugment, label smoothing and
noise the public code's. There the multimodal layers learn as fast as the
classifiers on AudioSet (--config.optimizer.multipliers.multimodal=100.0), sound
and picture are mixed by unrelated weights and with any clip, ours with a
neighbour in the batch, and pictures are squashed. Cost, by arithmetic: 335
GFLOP per clip (sound 295, picture 105, both 471), 29 minutes on one H100 at
half its peak in bfloat16 (large 95, huge 254).
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import avsiam_finetune
from configs import avsiam_audioset, cavmae_audioset, cavmae_vgg_finetune

PAPER = {"variant": "base", "encoder": "shared", "modality": "mixed"}
PAPER |= {"pretrain": "audioset", "epochs": 15}
VARIANTS = {v: {**PAPER, "variant": v} for v in avsiam_audioset.VARIANTS}
# Of sound, pictures and both.
SHARES = {"mixed": (0.25, 0.25, 0.5), "av": (0.0, 0.0, 1.0)}
SHARES |= {"a": (1.0, 0.0, 0.0), "v": (0.0, 1.0, 0.0)}
BASE = {"batch_size": 128, "base_lr": 5e-5, "head": 10.0, "start": 2}
LARGE = {**BASE, "base_lr": 5e-6, "head": 50.0, "factor": 0.5}
HUGE = {**LARGE, "batch_size": 32}
RATES = {"base": {**BASE, "factor": 0.75}, "large": LARGE, "huge": HUGE}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, avsiam_audioset.DEMO)
  config = finetuning(args, RATES)
  config.data.name, config.data.sampling = "vggsound", "balanced"
  return shrink(config) if args.demo else config


def finetuning(args: ConfigDict, rates: Mapping[str, Any]) -> ConfigDict:
  """Supervised fine-tuning; `head` multiplies the classifiers' rate."""
  rate = rates[args.variant.removesuffix("+")]
  config = config_lib.base_config()
  config.method = "avsiam_finetune"
  config.total_epochs = float(args.epochs)
  config.batch_size = rate["batch_size"]
  config.model = avsiam_finetune.default_model(
    **avsiam_audioset.MODELS[args.variant],
    encoder=args.encoder,
    shares=config_lib.choose(SHARES, args.modality, "modality"),
  )
  config.init_from = source(args, config.model.size)
  config.data.modality = "av" if args.modality == "mixed" else args.modality
  avsiam_audioset.set_clips(config)
  cavmae_vgg_finetune.set_augment(config)
  set_rate(config, rate)
  modes = avsiam_finetune.modes(config.model)
  groups = {avsiam_finetune.HEADS[mode]: rate["head"] for mode in modes}
  groups |= {"multimodal": 1.0} if "av" in modes else {}
  config.optimizer.multipliers = groups
  cavmae_vgg_finetune.set_evals(config, modes)
  return config


def set_rate(config: ConfigDict, rate: Mapping[str, Any]) -> None:
  """Adam, and a rate that falls from epoch to epoch."""
  first, start = rate["base_lr"], rate["start"]
  cavmae_audioset.set_optimizer(config, first, start=start, step=1)
  config.schedule.step_factor = rate["factor"]


def source(args: ConfigDict, size: str) -> str:
  """`init_from` of the argument `pretrain`."""
  run = "runs/avsiam_audioset"
  for key in ("variant", "encoder"):
    if args[key] != PAPER[key]:
      run += f"-{key}_{args[key]}"
  known = {"audioset": run, **avsiam_audioset.SOURCES[size], "scratch": ""}
  return config_lib.choose(known, args.pretrain, "pretrain")


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config = avsiam_audioset.shrink(config)
  config.data.augment.update(freq_size=24, time_size=48)
  # Ours: what 300 steps on 960 clips learn most with.
  config.data.augment.mixup = 0.0
  config.schedule.update(base_lr=1e-3, warmup_epochs=2.0, step_epochs=(11, 13))
  groups = config.optimizer.multipliers
  config.optimizer.multipliers = dict.fromkeys(groups, 1.0)
  config.evals.test.every_epochs = 0.0
  return config
