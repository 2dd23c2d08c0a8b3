"""How much do DETECLAP's thresholds matter? On av_demo, like its Figure 3.

python -m avjax.sweep --study=configs/studies/deteclap_threshold.py --output=DIR

The threshold of one modality's scores varies, the other's stays at 0.5; sum R
is R@1, R@5 and R@10 of both directions (0 to 6). Labels are OR's, the recipe is
that of configs/studies/deteclap_demo.py. Scores of av_demo's own objects are
not those of CLAP and YOLOv8, whose best thresholds are theirs alone.
"""

from avjax.sweep import Row, Study
from configs.studies import deteclap_demo

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
CURVES = {"audio": "sound", "video": "pictures"}


def get_study() -> Study:
  """Points of two curves, which share one, and CAV-MAE across."""
  rows = [deteclap_demo.row("cavmae", "none", curve="CAV-MAE")]
  rows.append(point("both_0.5", 0.5, ", ".join(CURVES.values())))
  for m, curve in CURVES.items():
    rows += [point(f"{m}_{x}", x, curve, m) for x in THRESHOLDS if x != 0.5]
  return Study(
    title="DETECLAP on av_demo: retrieval among the 240 test clips",
    rows=tuple(rows),
    metrics=("retrieval/sum_R", "retrieval/within_sum_R"),
    chance=(2 * 16 / 240, 2 * (7 + 35 + 70) / 240),
    headings=("sum R", "sum R in the query's group"),
    axis="threshold",
  )


def point(name: str, x: float, curve: str, m: str = "") -> Row:
  """A pretraining with both thresholds at 0.5, but for that of m."""
  values = {**dict.fromkeys(CURVES, 0.5), **({m: x} if m else {})}
  changes = [f"model.threshold_{k}={value}" for k, value in values.items()]
  return deteclap_demo.row(name, "or", *changes, curve=curve, x=x)
