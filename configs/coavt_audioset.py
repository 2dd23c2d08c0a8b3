"""CoAVT (arXiv:2401.12264) on AudioSet: pre-training.

https://arxiv.org/abs/2401.12264, §IV-B. Contrast, matching and language
modelling of label texts with both modalities, with sound and with pictures, on
1.45M clips; from CAV-MAE (configs/cavmae_audioset.py) and BERT-base:

  python -m avjax.main --config=configs/coavt_audioset.py

Zero-shot scores on AudioCaps, by argument: configs/coavt_audiocaps_finetune.py.
AudioCaps' clips are of AudioSet's unbalanced part, on which this trains; the
paper excludes none. --config.data.exclude=FILE leaves out what a file lists.

Open in the paper: one run of BLIP-2's objectives with its smoothing, projection
and first temperature (avjax/methods/coavt_config.py); texts are labels joined
by ", " and at most 32 pieces long; "the minimum learning rate at the second
stage" ends the only stage; CAV-MAE's noise and turned sound are not used.

Cost: 0.52 TFLOP of products per clip and step (vanilla 0.28, baseline 0.13), by
arithmetic two hours on one H100 at half its peak with --config.dtype=bfloat16,
where 512 clips need --config.optimizer.accumulate, which makes the negatives
fewer.
"""

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.data import text
from avjax.methods import coavt
from configs import cavmae_audioset

PAPER = {
  "variant": "coavt",
  "pretrain": "cavmae_bert",
  "queries": 16,
  "mask_audio": 0.75,
  "mask_video": 0.5,
  "epochs": 5,
}
MODELS = {
  "coavt": {},
  "without_v": {"modes": ("av", "a")},
  "vanilla": {"modes": ("av",)},
  "baseline": {
    "modes": ("av",), "query_encoder": False, "objectives": ("contrast",),
  },
}  # fmt: skip
VARIANTS = {v: {**PAPER, "variant": v} for v in MODELS}
BERT = "bert-base-uncased"  # folder with model.safetensors and vocab.txt
SOURCES = {
  "cavmae_bert": f"av:runs/cavmae_audioset,text:{BERT}/model.safetensors",
  "cavmae": "runs/cavmae_audioset",
  "scratch": "",
}
DEMO = {"pretrain": "scratch", "queries": 8, "epochs": 24}


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, DEMO)
  config = pretraining(args)
  config.init_from = config_lib.choose(SOURCES, args.pretrain, "pretrain")
  if args.demo:
    return shrink(config)
  return config


def pretraining(args: ConfigDict) -> ConfigDict:
  """Pre-training on label texts."""
  config = config_lib.base_config()
  config.method = "coavt"
  config.total_epochs = float(args.epochs)
  config.batch_size = 512
  names = ("queries", "mask_audio", "mask_video")
  config.model = coavt.default_model(
    "B", **MODELS[args.variant], **{name: args[name] for name in names}
  )
  set_clips(config)
  config.data.update(name="audioset", split="train_2m", heads=())
  config.data.text.source = "labels"
  set_optimizer(config, base_lr=1e-4)
  config.schedule.warmup_steps = 2_000
  config.evals.retrieval = config_lib.eval_section(
    "retrieval", split="eval", every_epochs=1.0, pictures=4
  )
  config.evals.text = config_lib.eval_section(
    "text_retrieval", split="eval", every_epochs=1.0
  )
  config.evals.text.update(captions=1, limit=1_000, rerank=0)
  return config


def set_clips(config: ConfigDict) -> None:
  """CAV-MAE's clips without its noise; text for BERT's vocabulary."""
  cavmae_audioset.set_clips(config)
  config.data.augment.update(noise=0.0, roll=0)
  config.data.text.vocabulary = f"{BERT}/vocab.txt"


def set_optimizer(config: ConfigDict, base_lr: float) -> None:
  """AdamW; a cosine to 1e-6."""
  config.optimizer.update(name="adam", b1=0.9, b2=0.98, weight_decay=0.05)
  config.schedule.update(name="cosine", base_lr=base_lr, end_lr=1e-6)


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config = cavmae_audioset.shrink(config)
  config.data.augment.roll = 0
  config.model.update(text_width=128, text_depth=2, text_heads=4, text_mlp=256)
  config.model.update(dropout=0.0)
  config.batch_size = 32
  # Ours: what hundreds of steps from random weights learn most with.
  config.schedule.update(base_lr=1e-3, warmup_steps=0, warmup_epochs=2.0)
  config.checkpoint.every_epochs = config.total_epochs / 4
  if config.method == "coavt":
    config.data.text.update(vocabulary="av_demo", source="captions", length=48)
    config.model.update(vocabulary=text.size(config), projection=64)
    config.evals.text.update(captions=5, limit=0)
    config.evals.text.rerank = min(config.evals.text.rerank, 16)
  return config
