"""Is one model for both modalities as good as two? On av_demo.

python -m avjax.sweep --study=configs/studies/uavm_demo.py --output=DIR

UAVM's Table I: top-1 on the test clips of sound alone, pictures alone and
both, of frozen features (data_prep/demo_features.py makes them on first use).
All rows have the same steps and recipe.
"""

from avjax.sweep import Row, Study

CONFIG = "configs/uavm_vgg.py:demo"
VARIANTS = ("unified", "independent", "cross_modal")
SCORES = {
  "test/av/top1": "both",
  "test/a/top1": "sound",
  "test/v/top1": "pictures",
}
CHANCE = 1 / 24
# A model that always sees both has one score.
RENAMED = {"cross_modal": {"test/top1": "test/av/top1"}}


def get_study() -> Study:
  """Rows of the README's table."""
  return Study(
    title="UAVM on av_demo: top-1 on the test clips",
    rows=tuple(
      Row(v, f"{CONFIG},variant={v}", renamed=RENAMED.get(v, {}))
      for v in VARIANTS
    ),
    metrics=tuple(SCORES),
    chance=CHANCE,
    headings=tuple(SCORES.values()),
  )
