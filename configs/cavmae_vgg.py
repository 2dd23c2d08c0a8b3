"""CAV-MAE (ICLR 2023) on VGGSound alone.

https://arxiv.org/abs/2210.07839. Two stages, `pretrain` (184k clips, no labels,
from an image MAE) and `finetune` (configs/cavmae_vgg_finetune.py):

  python -m avjax.main --config=configs/cavmae_vgg.py

Top-1 on VGGSound's test clips (15,446 then) of the public training logs:

| argument                          | AV   |
|-----------------------------------|------|
| (none: pretrain=mae)              | 64.8 |
| pretrain=audioset                 | 65.9 |

`pretrain=audioset` starts from runs/cavmae_audioset-variant_scale++: 10 epochs
at half the rate. `variant` is as in configs/cavmae_audioset.py; on VGGSound
only scale+ (of the public script: batch 120, 30 negatives) is published.

Published curves of the default, epoch 25, training / test: loss_audio .572 /
.552, loss_video .339 / .333, loss_contrast .351 / 1.293, contrast_accuracy -
/ .636, where chance is ln 30 = 3.40 and .033.

At the end a linear probe tells what the frozen embeddings know of the classes:
`probe`, trained on 10,000 clips; ours, so there is nothing published beside it.

All else is as in configs/cavmae_audioset.py.

Cost, by arithmetic: 237 GFLOP per clip, 34 minutes on one H100 at half its peak
with --config.dtype=bfloat16 (the public code's run took 9.7 hours on four
A5000).
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from configs import cavmae_audioset, cavmae_vgg_finetune

SCALES = {
  **cavmae_audioset.SCALES,
  "scale+": {"batch_size": 120, "base_lr": 1e-4, "group_size": 30},
}
SOURCES = {
  **cavmae_audioset.SOURCES,
  "audioset": "runs/cavmae_audioset-variant_scale++",
}
# 0 = 25, from AudioSet 10.
VARIANTS = {
  v: {**row, "epochs": 0} for v, row in cavmae_audioset.VARIANTS.items()
}


def get_config(arg: str | None = None) -> ConfigDict:
  """Both stages."""
  args = config_lib.parse_variants(arg, VARIANTS, cavmae_audioset.DEMO)
  pretrain = pretraining(args)
  if args.demo:
    pretrain = cavmae_audioset.shrink(pretrain)
    pretrain.evals.probe.every_epochs = 0.0
  finetune = "pretrain=scratch" + (",demo" if args.demo else "")
  return config_lib.staged(
    pretrain=pretrain, finetune=cavmae_vgg_finetune.get_config(finetune)
  )


def pretraining(args: ConfigDict) -> ConfigDict:
  """Self-supervised pre-training."""
  scale = dict(SCALES[args.variant])
  again = args.pretrain == "audioset"
  if again:
    scale["base_lr"] /= 2
  epochs = args.epochs or (10 if again else 25)
  config = cavmae_audioset.pretraining(epochs, **scale)
  config.init_from = config_lib.choose(SOURCES, args.pretrain, "pretrain")
  config.data.name = "vggsound"
  # Minutes: the regressions cost as much as the embeddings.
  config.evals.probe = config_lib.eval_section(
    "linear_probe", train_limit=10_000
  )
  return config
