"""What AVSiam's tables ask, on av_demo.

python -m avjax.sweep --study=configs/studies/avsiam_demo.py --output=DIR

| rows | table of arXiv:2403.19638 |
|---|---|
| contrast (many ratios), fixed_25, fixed_50, unmasked | 4 |
| contrast, separate (AVSep) | 5 |
| both, cavmae | 7: one model, a modality missing in the test |
| none, contrast, both | 8 |

All but CAV-MAE start from the same encoder, which `pictures` trained on
labelled pictures: from random weights the contrast learns nothing in this time.
Pretraining: 3,840 clips, 640 steps, the loss in both directions. Fine-tuning of
each: 300 steps on 960 clips, AVSiam with mixed inputs, CAV-MAE with both, each
its own recipe. Only `both` reconstructs (table 4's rows do not, either): its
gradient ends before the encoder, which therefore becomes the same.
`results.csv` holds the seconds.
"""

import dataclasses

from avjax.sweep import Row, Study
from configs.studies import cavmae_demo

PRETRAIN = "configs/avsiam_audioset.py:demo"
FINETUNE = "configs/avsiam_vgg_finetune.py:demo"
CAVMAE = "configs/cavmae_vgg_finetune.py:demo"
CLIPS = "data.demo.clips_per_class=160"
# In place of ImageNet's weights.
PICTURES = (CLIPS, "total_epochs=10.0")
LONGER = (
  CLIPS,
  "total_epochs=8.0",
  "schedule.warmup_epochs=1.0",
  "schedule.base_lr=7e-4",
  "schedule.step_epochs=(6,7)",
  "model.contrast_two_way=True",
)
ALONE = "model.mae_weight=0.0"
PRETRAININGS = {
  "both": (PRETRAIN, ()),
  "contrast": (PRETRAIN, (ALONE,)),
  "fixed_25": (PRETRAIN, (ALONE, "model.ratios=(0.25,)")),
  "fixed_50": (PRETRAIN, (ALONE, "model.ratios=(0.5,)")),
  "unmasked": (PRETRAIN, (ALONE, "model.ratios=(0.0,)")),
  "separate": (f"{PRETRAIN},encoder=separate", (ALONE,)),
}


def get_study() -> Study:
  """Pretrainings and what is fine-tuned from them."""
  rows = [Row("pictures", f"{FINETUNE},modality=v", PICTURES, shown=False)]
  for name, (config, more) in PRETRAININGS.items():
    settings = (*LONGER, *more)
    own = f"{name}_pretraining"
    rows.append(Row(own, config, settings, start="pictures", shown=False))
  (cavmae,) = (
    row
    for row in cavmae_demo.get_study().rows
    if row.name == "contrast_and_reconstruction"
  )
  rows.append(dataclasses.replace(cavmae, shown=False))
  rows.append(Row("none", FINETUNE, start="pictures"))
  for name, (config, _) in PRETRAININGS.items():
    argument = config.removeprefix(PRETRAIN)
    start = f"{name}_pretraining"
    rows.append(Row(name, FINETUNE + argument, start=start))
  modes = ("evals.test.modes=('a','v','av')",)
  rows.append(Row("cavmae", CAVMAE, modes, start=cavmae.name))
  return Study(
    title="AVSiam on av_demo: top-1 on the test clips",
    rows=tuple(rows),
    metrics=("test/av/top1", "test/a/top1", "test/v/top1"),
    chance=1 / 24,
    headings=("both", "sound alone", "pictures alone"),
  )
