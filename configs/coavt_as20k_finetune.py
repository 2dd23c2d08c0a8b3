"""CoAVT fine-tuned on AudioSet's balanced 20k (AS-20K).

https://arxiv.org/abs/2401.12264, §III-C2 and table II. After
--config=configs/coavt_audioset.py has pre-trained:

  python -m avjax.main --config=configs/coavt_as20k_finetune.py

mAP on 16,690 evaluation clips as published (§IV calls it accuracy once):

| argument              | a    | v    | av   |
|-----------------------|------|------|------|
| (none: variant=coavt) | 42.5 | 20.6 | 44.7 |
| variant=vanilla       | 38.9 | 18.0 | 45.0 |

for modality=a, v and (default) av; 18,063 clips were trained on. Binary
cross-entropy, as CAV-MAE has it.

All else is as in configs/coavt_vgg_finetune.py.

Cost, by arithmetic: 5 minutes on one H100.
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import coavt_vgg_finetune as vgg


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, vgg.VARIANTS, vgg.DEMO)
  config = vgg.finetuning(args)
  config.data.update(name="audioset", split="train_20k", multilabel=True)
  for section in config.evals.values():
    section.split = "eval"
  return vgg.shrink(config) if args.demo else config
