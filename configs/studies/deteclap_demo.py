"""Do object labels help CAV-MAE to find a sound's picture? On av_demo.

python -m avjax.sweep --study=configs/studies/deteclap_demo.py --output=DIR

The rows of DETECLAP's Tables I and III. The labels are those of av_demo's own
objects: heard ones miss the silent, seen ones the hidden. Of either, 30 % of
those present score below 0.5 and 0.5 % of those absent above; at 0.4, the
threshold of seen ones, that is 18 % and 1.5 %.
All rows have the same clips and steps, from random weights, and no
reconstruction, which in so few steps does not help and costs as much again.
'In its group': among the 20 or 40 test clips of the query's coarse group alone.
Probe: the class by logistic regression on frozen embeddings.
"""

from avjax.methods.deteclap import LABELS
from avjax.sweep import Row, Study

CONFIG = "configs/deteclap_vgg.py:demo,variant="
LONGER = (
  "data.demo.clips_per_class=160",
  "total_epochs=16.0",
  "schedule.warmup_epochs=1.5",
  "schedule.base_lr=1e-3",
  "model.contrast_two_way=True",
  "model.mask_audio=0.75",
  "model.mask_video=0.75",
  "model.mae_weight=0.0",
)
SCORES = {
  "retrieval/a2v_R1": ("sound to picture R@1", 1 / 240),
  "retrieval/a2v_R5": ("R@5", 5 / 240),
  "retrieval/a2v_R10": ("R@10", 10 / 240),
  "retrieval/v2a_R1": ("picture to sound R@1", 1 / 240),
  "retrieval/v2a_R5": ("R@5", 5 / 240),
  "retrieval/v2a_R10": ("R@10", 10 / 240),
  "retrieval/within_a2v_R5": ("in its group, R@5", 35 / 240),
  "retrieval/within_v2a_R5": ("in its group, R@5", 35 / 240),
  "probe/audio/top1": ("probe of sounds, top-1", 1 / 24),
  "probe/video/top1": ("probe of pictures, top-1", 1 / 24),
}


def row(name: str, argument: str, *overrides: str, **more: object) -> Row:
  """A pretraining of the study."""
  changes = [f"pretrain.{item}" for item in (*LONGER, *overrides)]
  return Row(
    name,
    CONFIG + argument,
    overrides=("stages=('pretrain',)", *changes),
    stages=("pretrain",),
    **more,
  )


def get_study() -> Study:
  """Rows of the README's comparison."""
  rows = {"cavmae": "none", **dict(zip(LABELS, LABELS, strict=True))}
  return Study(
    title="DETECLAP on av_demo: retrieval among the 240 test clips",
    rows=tuple(row(name, argument) for name, argument in rows.items()),
    metrics=tuple(SCORES),
    chance=tuple(chance for _, chance in SCORES.values()),
    headings=tuple(heading for heading, _ in SCORES.values()),
  )
