"""AVSiam (Lin and Bertasius, 2024) on AudioSet: pre-training.

https://arxiv.org/abs/2403.19638. One vision transformer sees pictures and
spectrograms: contrast between them at many masking ratios, and reconstruction,
on 1.7M clips, from ImageNet-21k's weights:

  python -m avjax.main --config=configs/avsiam_audioset.py

| argument                       | AS-20K | AS-2M | VGG  | V100 hours |
|--------------------------------|--------|-------|------|------------|
| (none: variant=base)           | 41.6   | 50.1  | 64.9 | 177        |
| variant=base+                  | 43.0   | 51.4  | 66.7 | 450        |
| variant=large                  | 44.1   | 52.1  | 67.1 | 310        |
| variant=huge                   | 45.0   | 54.1  | 68.0 | 800        |
| variant=large,encoder=separate |        | 52.0  |      |            |
| pretrain=ast                   | 38.1   |       | 62.5 |            |

Scores: mAP, mAP, top-1 of configs/avsiam_{as20k,as2m,vgg}_finetune.py (tables
1, 5, 6). `base+` adds VGGSound and ACAV, every clip as often as any other;
`encoder=separate` is AVSep. Zero-shot R@1 of base, picture to sound and back,
is 19.7, 17.6 on AudioSet (table 2) of five clips a class:
evals.retrieval.subset=FILE.csv, for a finished run by avjax.evaluate --set. For
other data see configs/avsiam_msrvtt_finetune.py.

AS-20K of table 4, without reconstruction (--config.model.mae_weight=0.0): all
ratios 41.3; --config.model.ratios="(0.25,)", one for all, 40.8; "(0.0,)", no
masks, 40.4.

Numbers are tables 9 to 11's; noise, how far sound is turned, ImageNet's mean
and deviation (the weights were trained with 0.5) are the public code's. It
squashes pictures to a square, we cut them. `pretrain=in21k` is ViT-B_16.npz
(L_16, H_14) where the program runs, `ast` is audioset_10_10_0.4593.pth, trained
on AudioSet's labels with fbank.mean=-4.268 and std=9.138; `scratch` is ours.
Every device's share of the batch must hold each ratio as often.

Cost, by arithmetic: 454 GFLOP per clip, 9.5 hours on one H100 at half its peak
with --config.dtype=bfloat16 (large 25, huge 64).
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import avsiam
from configs import cavmae_audioset

PAPER = {"variant": "base", "encoder": "shared"}
PAPER |= {"pretrain": "in21k", "epochs": 20}
# Ours: `scan` compiles in seconds, `remat` saves memory.
DEEP = {"scan": True, "remat": "dots_no_batch"}
MODELS = {
  "base": {"size": "B"},
  "base+": {"size": "B"},
  "large": {"size": "L", **DEEP},
  "huge": {
    "size": "H",
    "patch_audio": (14, 14),
    "patch_video": (1, 14, 14),
    **DEEP,
  },
}
VARIANTS = {v: {**PAPER, "variant": v} for v in MODELS}
SOURCES = {
  "B": {"in21k": "ViT-B_16.npz", "ast": "audioset_10_10_0.4593.pth"},
  "L": {"in21k": "ViT-L_16.npz"},
  "H": {"in21k": "ViT-H_14.npz"},
}
# In proportion to the clips in millions: an epoch has each of them once.
MIXTURE = ("audioset:train_2m:1.7", "vggsound:train:0.2", "acav:train:2.4")
EVALS = {"retrieval": {"pictures": 4}, "reconstruction": {"limit": 1_024}}
DEMO = {"pretrain": "scratch"}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, DEMO)
  config = pretraining(args)
  if args.variant == "base+":
    config.data.mixture = MIXTURE
  return shrink(config) if args.demo else config


def pretraining(args: ConfigDict) -> ConfigDict:
  """Self-supervised pre-training."""
  config = config_lib.base_config()
  config.method = "avsiam"
  config.total_epochs = float(args.epochs)
  config.batch_size = 1_536  # 16 x 96, 32 x 48, 64 x 24
  config.model = avsiam.default_model(
    **MODELS[args.variant], encoder=args.encoder
  )
  sources = {**SOURCES[config.model.size], "scratch": ""}
  config.init_from = config_lib.choose(sources, args.pretrain, "pretrain")
  config.data.update(name="audioset", split="train_2m", heads=())
  set_clips(config)
  cavmae_audioset.set_optimizer(config, 1e-4, start=10, step=5)
  for kind, more in EVALS.items():
    config.evals[kind] = config_lib.eval_section(
      kind, split="eval", every_epochs=5.0, **more
    )
  return config


def set_clips(config: ConfigDict) -> None:
  """As CAV-MAE's, but all channels of one's own files."""
  cavmae_audioset.set_clips(config)
  config.data.files.channels = "mean"


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config = cavmae_audioset.shrink(config)
  config.data.mixture = ()
  if config.method == "avsiam":
    config.model.update(decoder_width=64, decoder_depth=1)
    config.model.update(decoder_heads=4, decoder_mlp=128)
    # Ours: what hundreds of steps from random weights learn most with.
    config.schedule.update(base_lr=1.5e-3, warmup_epochs=3.0)
    config.checkpoint.every_epochs = config.total_epochs / 4
  return config
