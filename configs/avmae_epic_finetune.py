"""MBT fine-tuned on Epic Kitchens-100 from Audiovisual Masked Autoencoders.

https://arxiv.org/abs/2212.05922, §4.1 and §4.3: one network with a noun and a
verb head of equal weight; the pair of both arg-maxes is the action. After
--config=configs/avmae_vgg.py has pre-trained:

  python -m avjax.main --config=configs/avmae_epic_finetune.py:modality=a

Top-1 of verb / noun / action on the 9,668 validation clips as published:

| argument             | verb | noun | action |                           |
|----------------------|------|------|--------|---------------------------|
| modality=a           | 52.7 | 27.2 | 19.7   | table 7c                  |
| modality=v           | 70.8 | 55.9 | 45.8   | table 7c                  |
| (none: L)            | 71.4 | 56.4 | 46.0   | table 7c                  |
| (none: L)            |      |      | 45.5   | table 4, 800 epochs       |
| pretrain=audioset    |      |      | 43.5   | table 4                   |

Table 5, from configs/avmae_vgg.py:epochs=200, 400, 800 and 1200 (set
--config.init_from to its folder): 41.8, 42.5, 45.5, 46.0.

The recipe of this data set is in the paper's supplement and no configuration
of it is public: this is that of configs/avmae_vgg_finetune.py (ours).
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import avmae_vgg_finetune


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(
    arg, avmae_vgg_finetune.VARIANTS, avmae_vgg_finetune.DEMO
  )
  config = avmae_vgg_finetune.finetuning(args)
  config.data.update(name="epic_kitchens", heads=("noun", "verb"))
  config.evals.test.split = "validation"
  config.checkpoint.best = "test/action_top1"
  return avmae_vgg_finetune.shrink(config) if args.demo else config
