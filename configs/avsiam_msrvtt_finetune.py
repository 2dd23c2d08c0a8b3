"""AVSiam fine-tuned for retrieval on MSR-VTT: sound asks, videos answer.

https://arxiv.org/abs/2403.19638, §5.2 and table 3a. After
--config=configs/avsiam_audioset.py has pre-trained:

  python -m avjax.main --config=configs/avsiam_msrvtt_finetune.py

R@1 among the 2,990 test videos as published, in percent:

| argument             | a2v_R1 | v2a_R1 |                    |
|----------------------|--------|--------|--------------------|
| (none: variant=base) | 24.3   |        | table 3a           |
| epochs=0             | 16.1   | 9.3    | table 2: zero-shot |

`epochs=0` is one step at rate 0. Zero-shot on VGGSound (20.4, 19.0; table 2):
--config.data.name=vggsound --config.evals.retrieval.subset=FILE.csv with it.

The paper says no more than that the model was fine-tuned, and nothing of it is
public. Ours: the contrast of pre-training without masks and reconstruction, on
the training videos that have sound; batch, rate, its fall and the epochs are
VGGSound's (table 9), noise and turned sound as in pre-training; one frame at
random, in the test the middle one; videos without sound neither ask nor answer.

All else is as in configs/avsiam_audioset.py.

Cost, by arithmetic: a minute or two on one H100.
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import avsiam_audioset, avsiam_vgg_finetune

PAPER = {
  "variant": "base",
  "encoder": "shared",
  "pretrain": "audioset",
  "epochs": 15,
}
VARIANTS = {v: {**PAPER, "variant": v} for v in avsiam_audioset.VARIANTS}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, avsiam_audioset.DEMO)
  config = avsiam_audioset.pretraining(
    ConfigDict({**args, "pretrain": "scratch"})
  )
  config.init_from = avsiam_vgg_finetune.source(args, config.model.size)
  config.model.update(ratios=(0.0,), mae_weight=0.0)
  rate = avsiam_vgg_finetune.RATES[args.variant.removesuffix("+")]
  config.batch_size = rate["batch_size"]
  avsiam_vgg_finetune.set_rate(config, rate)
  config.data.update(name="msrvtt", split="train")
  del config.evals.reconstruction
  config.evals.retrieval.update(split="test", every_epochs=1.0)
  if args.demo:
    config = avsiam_audioset.shrink(config)
  if not args.epochs:
    config.total_steps = 1
    config.schedule.update(base_lr=0.0, warmup_epochs=0.0)
  return config
