"""How wide has what both modalities share to be? UAVM's Figures 2 to 4.

python -m avjax.sweep --study=configs/studies/uavm_width.py --output=DIR

Three layers of each modality, then three of `shared_width` (S_dim): shared by
both (unified), of each (independent: variant=stacked), or for both at once
(cross-modal). What can be told of the modality from the last layer, and how
often a sound finds its picture there, tell whether the two lie in one space.
"""

from avjax.sweep import Row, Study
from configs.studies import uavm_demo

WIDTHS = (32, 128, 256, 1024)  # of 1024; the demo has an eighth
CURVES = {
  "unified": "unified",
  "stacked": "independent",
  "cross_modal": "cross-modal",
}
LAST = {
  "layers/last/modality": ("modality told from the last layer", 0.5),
  "layers/last/a2v_R10": ("sound to picture R@10, last layer", 10 / 240),
}


def get_study() -> Study:
  """A curve for each model."""
  rows = [
    Row(
      f"{variant}_{width}",
      f"{uavm_demo.CONFIG},variant={variant},shared_width={width}",
      curve=curve,
      x=width // 8,
      renamed=uavm_demo.RENAMED.get(variant, {}),
    )
    for variant, curve in CURVES.items()
    for width in WIDTHS
  ]
  chances = [uavm_demo.CHANCE] * len(uavm_demo.SCORES)
  return Study(
    title="UAVM on av_demo by the width of what is shared",
    rows=tuple(rows),
    metrics=(*uavm_demo.SCORES, *LAST),
    chance=(*chances, *(chance for _, chance in LAST.values())),
    headings=(
      *(f"top-1, {name}" for name in uavm_demo.SCORES.values()),
      *(heading for heading, _ in LAST.values()),
    ),
    axis="S_dim",
  )
