"""CoAVT fine-tuned to find sounds by text on Clotho, which has no pictures.

https://arxiv.org/abs/2401.12264, table III. After
--config=configs/coavt_audioset.py has pre-trained:

  python -m avjax.main --config=configs/coavt_clotho_finetune.py

Text to sound as published, of 1,045 evaluation clips with five captions each,
all of which ask, in percent:

| argument             | R@1  | R@5  | R@10 |
|----------------------|------|------|------|
| (none)               | 13.7 | 33.8 | 44.9 |
| pretrain=audiocaps   | 16.4 | 37.9 | 50.0 |
| epochs=0             | 4.7  | 13.8 | 20.3 |

The paper has 2,893 clips to train on and 1,045 to test: version 1 of Clotho.
`pretrain=audiocaps` starts from runs/coavt_audiocaps_finetune. Clips are of 15
to 30 s: 10.2 s at random in training, the middle in the test (ours).

All else is as in configs/coavt_audiocaps_finetune.py.

Cost, by arithmetic: a minute or two on one H100.
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import coavt_audiocaps_finetune as audiocaps
from configs import coavt_audioset

PAPER = {**audiocaps.PAPER, "modality": "a"}
VARIANTS = {v: {**PAPER, "variant": v} for v in coavt_audioset.MODELS}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, audiocaps.DEMO)
  config = audiocaps.finetuning(args, "clotho")
  if args.demo:
    config = coavt_audioset.shrink(config)
  return audiocaps.end(config, args)
