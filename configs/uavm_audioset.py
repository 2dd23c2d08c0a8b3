"""UAVM (Gong et al., 2022) on AudioSet: one model for sounds and for pictures.

https://arxiv.org/abs/2208.00061. After `python -m data_prep.features` has
filled features/audioset:

  python -m avjax.main --config=configs/uavm_audioset.py

mAP on the evaluation clips (table 1), three seeds:

| argument                | a    | v    | av   |
|-------------------------|------|------|------|
| (none: variant=unified) | 45.6 | 27.4 | 48.0 |
| variant=independent     | 45.5 | 26.8 | 48.1 |
| variant=cross_modal     |      |      | 50.4 |

All else is as in configs/uavm_vgg.py, but the rate and the loss; it has no
analysis of the layers, which the paper made of VGGSound alone. Public for the
balanced 20K clips (--config.data.split=train_20k): 50 epochs at 5e-5 (5e-4 the
cross-modal model), falling by plateau, sampled uniformly.

Cost, by arithmetic: 7 GFLOP per clip, an hour on one H100 if the features can
be read as fast.
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import uavm_vgg


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, uavm_vgg.VARIANTS, {})
  config = uavm_vgg.training(args, base_lr=1e-5)
  config.data.update(name="audioset", split="train_2m")
  config.data.features = "features/audioset"
  config.data.multilabel = True
  config.evals.test.split = "eval"
  return shrink(config) if args.demo else config


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config = uavm_vgg.shrink(config)
  config.evals.test.split = "test"
  return config
