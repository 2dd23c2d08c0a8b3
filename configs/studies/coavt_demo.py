"""CoAVT's pairs, queries and masks; zero-shot, fine-tuned, re-ranked. av_demo.

python -m avjax.sweep --study=configs/studies/coavt_demo.py --output=DIR

All rows start from the CAV-MAE of configs/studies/cavmae_demo.py; text begins
from random weights. Captions of 3,840 clips, 640 steps; then 160 more without
masks (fine-tuned). Five captions of each of the 240 test clips ask, 10 clips of
each of 24 classes: by chance a clip is among the first ten for 4 % of them.
Sixteen candidates are re-ranked. `coavt_longer` goes on from `coavt` with
masks for 1,280 steps: matching and captions take longer than contrast.

`coavt` learns all three pairs of text and clip, `vanilla` that with both
modalities alone, `baseline` that by contrast of means. Tables I, V, VI, VII;
for table IV CAV-MAE's scores are in the start's study.
"""

import dataclasses
from collections.abc import Sequence

from avjax.sweep import Row, Study
from configs.studies import cavmae_demo

PRETRAIN = "configs/coavt_audioset.py:demo"
FINETUNE = "configs/coavt_audiocaps_finetune.py:demo"
START = "contrast_and_reconstruction"
CLIPS = ("data.demo.clips_per_class=160",)
LONGER = (*CLIPS, "total_epochs=5.34", "schedule.warmup_epochs=0.5")
SHORT = (*CLIPS, "total_epochs=1.34", "schedule.warmup_epochs=0.2")
# Row -> argument of the pretraining.
PRETRAINED = {
  "coavt": "",
  "without_pictures_and_text": ",variant=without_v",
  "vanilla": ",variant=vanilla",
  "baseline": ",variant=baseline",
  "vanilla_4_queries": ",variant=vanilla,queries=4",
  "vanilla_16_queries": ",variant=vanilla,queries=16",
  "without_masks": ",mask_audio=0,mask_video=0",
  "masks_75_75": ",mask_video=0.75",
  "masks_50_75": ",mask_audio=0.5,mask_video=0.75",
}
FINETUNED = ("coavt", "vanilla", "baseline")


def get_study() -> Study:
  """Rows of the README's comparison."""
  rows = [start()]
  rows += [
    Row(name, PRETRAIN + argument, overrides(name, LONGER), start=START)
    for name, argument in PRETRAINED.items()
  ]
  rows += [
    Row(
      f"{name}_finetuned",
      FINETUNE + PRETRAINED[name],
      overrides(name, SHORT),
      start=name,
    )
    for name in FINETUNED
  ]
  longer = overrides("coavt", (*CLIPS, "total_epochs=10.67"))
  longer += ("model.mask_audio=0.75", "model.mask_video=0.5")
  rows.append(Row("coavt_longer", FINETUNE, longer, start="coavt"))
  return Study(
    title="CoAVT on av_demo: R@10 of the test captions among 240 clips",
    rows=tuple(rows),
    metrics=(
      "text/t2a_R10",
      "text/t2v_R10",
      "text/t2av_R10",
      "text/reranked_t2av_R10",
      "retrieval/a2v_R10",
    ),
    chance=10 / 240,
    headings=(
      "text to sound",
      "text to picture",
      "text to both",
      "to both, re-ranked",
      "sound to picture",
    ),
  )


def start() -> Row:
  """The CAV-MAE that all rows start from."""
  rows = {row.name: row for row in cavmae_demo.get_study().rows}
  return dataclasses.replace(rows[START], shown=False)


def overrides(name: str, values: Sequence[str]) -> tuple[str, ...]:
  """The row's, evaluated once, at the end; two rows are re-ranked."""
  once = ("evals.text.every_epochs=0.0", "evals.retrieval.every_epochs=0.0")
  rerank = 16 if name in ("coavt", "vanilla") else 0
  return (*values, *once, f"evals.text.rerank={rerank}")
