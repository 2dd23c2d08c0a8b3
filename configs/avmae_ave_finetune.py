"""MBT fine-tuned on AVE event localisation, from a masked autoencoder.

https://arxiv.org/abs/2212.05922 reports audiovisual event localisation (AVE,
Tian et al., ECCV 2018: 28 events or none for each second of 10 s) in its
supplement alone, so neither its score nor its recipe is known here. After
--config=configs/avmae_vgg.py has pre-trained:

  python -m avjax.main --config=configs/avmae_ave_finetune.py

Metric: top-1 of the 10 segments of each of the 402 test clips.

All is as in configs/avmae_vgg_finetune.py but for what follows (ours): the
whole clip, two frames a second, so that a tubelet spans a segment; a segment's
logits come from the mean of its tokens.
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
  config.data.update(name="ave", heads=("segment",))
  if args.demo:
    config = avmae_vgg_finetune.shrink(config)
  seconds = 3 if args.demo else 10
  config.data.video.update(num_frames=2 * seconds, rate=2.0, stride=1)
  config.data.audio.seconds = float(seconds)
  config.data.audio.start = "aligned"
  config.evals.test.views = 1
  config.checkpoint.best = "test/segment_accuracy"
  return config
