"""UAVM (Gong et al., 2022) on VGGSound: one model for sounds and for pictures.

https://arxiv.org/abs/2208.00061. A transformer shared by both modalities sees
one of them at a time, as features that ConvNeXt made beforehand; every step
trains one. After `python -m data_prep.features` has filled features/vggsound:

  python -m avjax.main --config=configs/uavm_vgg.py

Top-1 on the test clips (table 1), three seeds:

| argument                 | a    | v    | av   |                             |
|--------------------------|------|------|------|-----------------------------|
| (none: variant=unified)  | 56.5 | 49.9 | 65.8 | 3 layers each, 3 shared     |
| variant=independent      | 56.5 | 49.7 | 65.7 | 6 each, none shared         |
| variant=cross_modal      |      |      | 62.9 | 3 each, 3 see both at once  |
| shared_layers=6          |      |      | 65.6 | all shared, §III-B          |

Figure 2: `shared_layers` of six (N_s; 0 is `independent`), `shared_width` of
theirs (S_dim, 16 to 1024), `lambda_audio`, how often the sound is trained
(λ_MT). Its independent model of another S_dim is variant=stacked: three layers
of 1024, then three of S_dim, of each modality.

Every step leaves the other modality's parameters as they are (algorithm 1);
the published runs, on several GPUs, moved them by momentum and weight decay:
--config.model.unused_params=zero_gradients. The rates, the fall by half after
each epoch and the batch are the paper's (§III-A); the rest is the public
code's. There the ablations fall by plateau, for 25 epochs, and partners of
mixup are any clips, where ours are neighbours in a balanced batch.

`layers` is evaluated at the end: what each layer tells of the modality, finds
in the other one and looks at (figures 3 to 5), on all test clips; retrieval
among 5 of each class.

Cost, by arithmetic: 7 GFLOP per clip; ten epochs are five minutes on one H100
if the features can be read as fast.
"""

import math

from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax.methods import uavm

PAPER = {
  "variant": "unified",
  "shared_layers": 3,
  "shared_width": 1024,
  "lambda_audio": 0.5,
  "epochs": 10,
}
MODELS = {
  "unified": {"variant": "unified"},
  "independent": {"variant": "unified"},
  "stacked": {"variant": "independent"},
  "cross_modal": {"variant": "cross_modal"},
}
VARIANTS = {v: {**PAPER, "variant": v} for v in MODELS}
VARIANTS["independent"]["shared_layers"] = 0
LAYERS = 6


def get_config(arg: str | None = None) -> ConfigDict:
  """One stage."""
  args = config_lib.parse_variants(arg, VARIANTS, {})
  config = training(args, base_lr=5e-5)
  config.data.name = "vggsound"
  config.data.features = "features/vggsound"
  config.evals.layers = config_lib.eval_section("layers", per_class=5, tsne=500)
  return shrink(config) if args.demo else config


def training(args: ConfigDict, *, base_lr: float) -> ConfigDict:
  """Supervised training on frozen features."""
  config = config_lib.base_config()
  config.method = "uavm"
  config.total_epochs = float(args.epochs)
  config.batch_size = 144
  config.model = uavm.default_model(
    **MODELS[args.variant],
    specific_layers=LAYERS - args.shared_layers,
    shared_layers=args.shared_layers,
    shared_width=args.shared_width,
    lambda_audio=args.lambda_audio,
  )
  data = config.data
  data.update(feature_frames=30, feature_width=1024, sampling="balanced")
  data.augment.update(random_crop=False, roll=15)
  data.augment.update(mixup=10.0, mixup_probability=0.5)
  config.optimizer.update(name="adam_l2", b1=0.95, b2=0.999, weight_decay=5e-7)
  config.schedule.update(name="step", base_lr=base_lr, step_factor=0.5)
  config.schedule.step_epochs = tuple(range(1, math.ceil(args.epochs)))
  modes = ("av",) if args.variant == "cross_modal" else ("a", "v", "av")
  config.evals.test = config_lib.eval_section(
    "classification", every_epochs=1.0, modes=modes
  )
  return config


def shrink(config: ConfigDict) -> ConfigDict:
  """`:demo`: other data, sizes and step counts."""
  config.data.update(name="av_demo", split="train", features="demo")
  # Of clips of 3 s: see data_prep/demo_features.py.
  config.data.update(feature_frames=9, feature_width=128)
  config.data.augment.update(roll=4, mixup=0.0)
  model = config.model
  model.update(width=128, tokens=9)
  model.shared_width = max(model.shared_width // 8, 4)
  config.batch_size, config.log_every = 48, 10
  # Ours: what 400 steps on 960 clips learn most with.
  config.total_epochs *= 2
  config.schedule.update(base_lr=1e-3, step_epochs=(10, 14, 17))
  for section in config.evals.values():
    section.every_epochs = config.total_epochs / 4
  if "layers" in config.evals:
    config.evals.layers.update(every_epochs=0.0, per_class=0, tsne=100)
  return config
