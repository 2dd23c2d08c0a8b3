"""Two modalities against one, fine-tuned from CAV-MAE. On av_demo.

python -m avjax.sweep --study=configs/studies/cavmae_finetune.py --output=DIR

The same recipe and number of steps in all rows; ten frames, probabilities
averaged. The pretraining is that of configs/studies/cavmae_demo.py.
"""

import dataclasses

from avjax.sweep import Row, Study
from configs.studies import cavmae_demo

PRETRAINING = "contrast_and_reconstruction"
FINETUNE = "configs/cavmae_vgg_finetune.py:demo"
ONE_MODE = ("evals.test.modes=('av',)",)


def get_study() -> Study:
  """Rows of the README's comparison."""
  (pretraining,) = (
    row for row in cavmae_demo.get_study().rows if row.name == PRETRAINING
  )
  rows = {
    "pretrained_audiovisual": ("", PRETRAINING),
    "scratch_audiovisual": ("", ""),
    "pretrained_audio": (",modality=a", PRETRAINING),
    "pretrained_video": (",modality=v", PRETRAINING),
  }
  return Study(
    title="CAV-MAE fine-tuned on av_demo: top-1 accuracy on the test clips",
    rows=(
      dataclasses.replace(pretraining, shown=False),
      *(
        Row(name, FINETUNE + argument, overrides=ONE_MODE, start=start)
        for name, (argument, start) in rows.items()
      ),
    ),
    metrics=("test/top1",),
    chance=1 / 24,
    headings=("top-1",),
  )
