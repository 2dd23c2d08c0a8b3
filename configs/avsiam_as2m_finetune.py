"""AVSiam fine-tuned on all of AudioSet (AS-2M) with mixed inputs.

https://arxiv.org/abs/2403.19638. After --config=configs/avsiam_audioset.py has
pre-trained:

  python -m avjax.main --config=configs/avsiam_as2m_finetune.py

mAP on the evaluation clips as published; all three of one model:

| argument                       | a    | v    | av   |                |
|--------------------------------|------|------|------|----------------|
| (none: variant=base)           | 45.2 | 30.8 | 50.1 | tables 1 and 7 |
| variant=base+                  |      |      | 51.4 | table 1        |
| variant=large                  | 47.8 | 30.1 | 52.1 | tables 1 and 5 |
| variant=large,encoder=separate | 48.0 | 29.8 | 52.0 | table 5: AVSep |
| variant=huge                   |      |      | 54.1 | table 1        |

All is as in configs/avsiam_vgg_finetune.py but for what follows. The public
script of base has twice the rate, 100 times it for the classifiers, and .9 of
it from epoch to epoch.

Cost, by arithmetic: 5.2 hours on one H100 at half its peak with
--config.dtype=bfloat16 (large 17, huge 46).
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import avsiam_audioset
from configs import avsiam_vgg_finetune as finetune

BASE = {"batch_size": 128, "base_lr": 5e-6, "head": 50.0}
LARGE = {**BASE, "start": 2, "factor": 0.5}
RATES = {
  "base": {**BASE, "start": 5, "factor": 0.75},
  "large": LARGE,
  "huge": {**LARGE, "batch_size": 32},
}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, finetune.VARIANTS, avsiam_audioset.DEMO)
  config = finetune.finetuning(args, RATES)
  config.data.update(name="audioset", split="train_2m", multilabel=True)
  config.data.sampling = "balanced"
  for section in config.evals.values():
    section.split = "eval"
  return finetune.shrink(config) if args.demo else config
