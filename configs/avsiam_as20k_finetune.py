"""AVSiam fine-tuned on AudioSet's balanced 20k (AS-20K) with mixed inputs.

https://arxiv.org/abs/2403.19638. After --config=configs/avsiam_audioset.py has
pre-trained:

  python -m avjax.main --config=configs/avsiam_as20k_finetune.py

mAP on the evaluation clips as published; all three of one model:

| argument             | a    | v    | av   |                      |
|----------------------|------|------|------|----------------------|
| (none: variant=base) | 36.5 | 23.7 | 41.6 | tables 1 and 6       |
| variant=base+        |      |      | 43.0 | table 1              |
| variant=large        |      |      | 44.1 | table 1              |
| variant=huge         |      |      | 45.0 | table 1              |
| pretrain=in21k       |      |      | 39.9 | table 8              |
| (from AST)           | 37.5 | 9.6  | 38.1 | table 6              |

Tables 4 and 6 are this config after other pre-training: --config.init_from=DIR,
for table 6 runs/avsiam_audioset-pretrain_ast. `pretrain=ast` is AST itself.

All is as in configs/avsiam_vgg_finetune.py but for what follows.

Cost, by arithmetic: 4 minutes on one H100 at half its peak with
--config.dtype=bfloat16 (large 12, huge 30).
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import avsiam_audioset
from configs import avsiam_vgg_finetune as finetune

BASE = {"batch_size": 32, "base_lr": 1e-4, "head": 100.0, "start": 2}
BASE["factor"] = 0.75
RATES = {
  "base": BASE,
  "large": {**BASE, "base_lr": 5e-5},
  "huge": {**BASE, "base_lr": 1e-5, "start": 5, "factor": 0.5},
}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, finetune.VARIANTS, avsiam_audioset.DEMO)
  config = finetune.finetuning(args, RATES)
  config.data.update(name="audioset", split="train_20k", multilabel=True)
  for section in config.evals.values():
    section.split = "eval"
  return finetune.shrink(config) if args.demo else config
