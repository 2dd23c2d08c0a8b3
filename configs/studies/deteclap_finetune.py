"""Do object labels in pretraining help to classify? On av_demo.

python -m avjax.sweep --study=configs/studies/deteclap_finetune.py --output=DIR

DETECLAP's Table II: the same fine-tuning, ten frames, probabilities averaged,
from the pretrainings of configs/studies/deteclap_demo.py.
"""

import dataclasses

from avjax.sweep import Row, Study
from configs.studies import deteclap_demo

FINETUNE = "configs/cavmae_vgg_finetune.py:demo"
ROWS = ("cavmae", "visual", "audio", "separate", "and", "or")


def get_study() -> Study:
  """Rows of the README's comparison."""
  pretraining = {row.name: row for row in deteclap_demo.get_study().rows}
  return Study(
    title="DETECLAP fine-tuned on av_demo: top-1 accuracy on the test clips",
    rows=(
      *(dataclasses.replace(pretraining[n], shown=False) for n in ROWS),
      *(
        Row(
          f"finetuned_{name}",
          FINETUNE,
          overrides=("evals.test.modes=('av',)",),
          start=f"{name}/pretrain",
        )
        for name in ROWS
      ),
    ),
    metrics=("test/top1",),
    chance=1 / 24,
    headings=("top-1",),
  )
