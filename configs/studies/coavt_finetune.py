"""CoAVT's classifier of sound, picture or both. On av_demo.

python -m avjax.sweep --study=configs/studies/coavt_finetune.py --output=DIR

The mean of the queries after the pretraining of configs/studies/coavt_demo.py,
300 steps, ten frames, probabilities averaged. Beside it, without text: the same
from the CAV-MAE that was its start (`coavt_classifier_of_cavmae`), and
CAV-MAE's own classifier from there (`cavmae_classifier`; see
configs/studies/cavmae_finetune.py).
Table II.
"""

import dataclasses

from avjax.sweep import Row, Study
from configs.studies import cavmae_finetune, coavt_demo

FINETUNE = "configs/coavt_vgg_finetune.py:demo"


def get_study() -> Study:
  """Rows of the README's comparison."""
  start = coavt_demo.start()
  pretraining = {row.name: row for row in coavt_demo.get_study().rows}
  cavmae = {row.name: row for row in cavmae_finetune.get_study().rows}
  return Study(
    title="CoAVT fine-tuned on av_demo: top-1 accuracy on the test clips",
    rows=(
      start,
      dataclasses.replace(pretraining["coavt"], shown=False),
      Row("coavt_classifier", FINETUNE, start="coavt"),
      Row("coavt_classifier_of_cavmae", FINETUNE, start=start.name),
      dataclasses.replace(
        cavmae["pretrained_audiovisual"],
        overrides=("evals.test.modes=('av','a','v')",),
        name="cavmae_classifier",
      ),
    ),
    metrics=("test/av/top1", "test/a/top1", "test/v/top1"),
    chance=1 / 24,
    headings=("both", "sound", "pictures"),
  )
