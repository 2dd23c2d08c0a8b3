"""How often should the sound be trained? UAVM's Figure 2, below.

python -m avjax.sweep --study=configs/studies/uavm_lambda.py --output=DIR
"""

from avjax.sweep import Row, Study
from configs.studies import uavm_demo

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


def get_study() -> Study:
  """One curve: the share of steps that see the sound."""
  return Study(
    title="UAVM on av_demo by how often a step trains the sound",
    rows=tuple(
      Row(
        f"lambda_{share}",
        f"{uavm_demo.CONFIG},lambda_audio={share}",
        curve="unified",
        x=share,
      )  # fmt: skip
      for share in SHARES
    ),
    metrics=tuple(uavm_demo.SCORES),
    chance=uavm_demo.CHANCE,
    headings=tuple(f"top-1, {name}" for name in uavm_demo.SCORES.values()),
    axis="share of steps with sound",
  )
