"""UAVM's audio feature extractor: ConvNeXt-Base trained on AudioSet's sounds.

https://arxiv.org/abs/2208.00061, §2.1. From `convnext_base-6075fbad.pth` of
torchvision (ImageNet) where the program runs; `pretrain=scratch` is ours:

  python -m avjax.main --config=configs/uavm_extractor_audioset.py

No score of it is published (UAVM hears 45.6 mAP of its features, table 1). From
epoch 16 on, the mean of the weights at the ends of epochs since then is judged.

All is as in configs/uavm_extractor_vgg.py but for what follows; the public
warm-up trains at --config.schedule.base_lr=4.5e-4.

Cost, by arithmetic: 7 hours on one H100 at half its peak with
--config.dtype=bfloat16.
"""

from ml_collections import ConfigDict

from configs import uavm_extractor_vgg

PAPER = {**uavm_extractor_vgg.PAPER, "epochs": 30}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = uavm_extractor_vgg.parse(arg, PAPER)
  config = uavm_extractor_vgg.extractor(args, base_lr=5e-4, start=10)
  config.data.update(name="audioset", split="train_2m", multilabel=True)
  config.data.fbank.update(mean=-4.2677, std=4.5690)
  config.optimizer.update(average="epochs", average_from=16)
  config.evals.test.split = "eval"
  if args.demo:
    config = uavm_extractor_vgg.shrink(config)
    config.optimizer.average_from = 8
  return config
