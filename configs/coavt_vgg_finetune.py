"""CoAVT fine-tuned on VGGSound.

https://arxiv.org/abs/2401.12264, §III-C2 and table II. After
--config=configs/coavt_audioset.py has pre-trained:

  python -m avjax.main --config=configs/coavt_vgg_finetune.py

Top-1 on 13,483 test clips as published:

| argument              | a    | v    | av   |
|-----------------------|------|------|------|
| (none: variant=coavt) | 60.7 | 48.1 | 66.4 |
| variant=vanilla       | 60.1 | 46.7 | 66.2 |

for modality=a, v and (default) av. `test` averages the probabilities over ten
frames with the same sound, `frame` looks at frame 5 after each epoch.

The paper's batch, rate and epochs; a linear layer on the mean of the queries,
which has the rate of all else. Of CAV-MAE's recipe it mentions the ten frames
alone, so nothing is mixed, masked or smoothed. The cosine's end and the
warm-up, an epoch here, are open.

Cost, by arithmetic: 45 minutes on one H100.
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import coavt_finetune
from configs import (
  cavmae_vgg_finetune,
  coavt_audiocaps_finetune,
  coavt_audioset,
)

PAPER = coavt_audiocaps_finetune.PAPER
VARIANTS = {
  v: {**PAPER, "variant": v} for v in ("coavt", "without_v", "vanilla")
}
DEMO = {"pretrain": "scratch", "queries": 8, "epochs": 10}
MODES = {"av": ("av", "a", "v"), "a": (), "v": ()}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, DEMO)
  config = finetuning(args)
  return shrink(config) if args.demo else config


def finetuning(args: ConfigDict) -> ConfigDict:
  """Supervised fine-tuning."""
  config = config_lib.base_config()
  config.method = "coavt_finetune"
  config.total_epochs = float(args.epochs)
  config.batch_size = 64
  modes = config_lib.choose(MODES, args.modality, "modality")
  config.model = coavt_finetune.default_model(
    "B", modality=args.modality, queries=args.queries
  )
  config.init_from = coavt_audiocaps_finetune.source(args)
  coavt_audioset.set_clips(config)
  config.data.text.vocabulary = ""
  config.data.update(name="vggsound", modality=args.modality)
  coavt_audioset.set_optimizer(config, base_lr=8e-5)
  config.schedule.warmup_epochs = 1.0
  cavmae_vgg_finetune.set_evals(config, modes)
  return config


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config = coavt_audioset.shrink(config)
  config.evals.test.every_epochs = 0.0
  return config
