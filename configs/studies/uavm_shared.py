"""How many of six layers can both modalities share? UAVM's Figures 2, 4, 5.

python -m avjax.sweep --study=configs/studies/uavm_shared.py --output=DIR

From 0 (independent models) to 6, once as wide as the layers before them and
once an eighth of that. Every run's folder holds pictures of its layers.
"""

from avjax.sweep import Row, Study
from configs.studies import uavm_demo, uavm_width

WIDTHS = (1024, 128)
LAYERS = (1, 3, 6)
ATTENTION = {"layers/last/attention": "difference of the last attention maps"}


def get_study() -> Study:
  """A curve for each width, which share the point without shared layers."""
  curves = {width: f"S_dim {width // 8}" for width in WIDTHS}
  rows = [row(0, WIDTHS[0], ", ".join(curves.values()))]
  rows += [
    row(shared, width, curve)
    for width, curve in curves.items()
    for shared in LAYERS
  ]
  base = uavm_width.get_study()
  return Study(
    title="UAVM on av_demo by the number of shared layers",
    rows=tuple(rows),
    metrics=(*base.metrics, *ATTENTION),
    chance=(*base.chances, 0.0),
    headings=(*base.headings, *ATTENTION.values()),
    axis="shared layers of 6",
  )


def row(shared: int, width: int, curve: str) -> Row:
  """A point."""
  argument = f",shared_layers={shared},shared_width={width}"
  return Row(
    f"shared_{shared}_{width}", uavm_demo.CONFIG + argument,
    curve=curve, x=shared,
  )  # fmt: skip
