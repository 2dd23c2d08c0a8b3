"""CoAVT's pairs, queries and masks; zero-shot, fine-tuned, re-ranked. av_demo.

python -m avjax.sweep --study=configs/studies/coavt_demo.py --output=DIR

Captions of four times as many clips as `:demo` has, from random weights, 960
steps; then 320 more without masks. Five captions of each of the 240 test clips
ask, 10 clips of each of 24 classes: by chance a clip is among the first ten
for 4 % of them.

`coavt` learns all three pairs of text and clip, `vanilla` that with both
modalities alone, `baseline` that by contrast of means. Tables I, V, VI, VII.
"""

from collections.abc import Sequence

from avjax.sweep import Row, Study

PRETRAIN = "configs/coavt_audioset.py:demo"
FINETUNE = "configs/coavt_audiocaps_finetune.py:demo"
CLIPS = ("data.demo.clips_per_class=160",)
LONGER = (*CLIPS, "total_epochs=12.0", "schedule.warmup_epochs=1.0")
SHORT = (*CLIPS, "total_epochs=4.0", "schedule.warmup_epochs=0.5")
# Row -> argument of the pretraining.
PRETRAINED = {
  "coavt": "",
  "without_pictures_and_text": ",variant=without_v",
  "vanilla": ",variant=vanilla",
  "baseline": ",variant=baseline",
  "vanilla_8_queries": ",variant=vanilla,queries=8",
  "vanilla_32_queries": ",variant=vanilla,queries=32",
  "without_masks": ",mask_audio=0,mask_video=0",
  "masks_75_75": ",mask_video=0.75",
  "masks_50_75": ",mask_audio=0.5,mask_video=0.75",
}
FINETUNED = ("coavt", "vanilla", "baseline")


def get_study() -> Study:
  """Rows of the README's comparison."""
  rows = [
    Row(name, PRETRAIN + argument, overrides=overrides(name, LONGER))
    for name, argument in PRETRAINED.items()
  ]
  rows += [
    Row(
      f"{name}_finetuned",
      FINETUNE + PRETRAINED[name],
      overrides=overrides(name, SHORT),
      start=name,
    )
    for name in FINETUNED
  ]
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


def overrides(name: str, values: Sequence[str]) -> tuple[str, ...]:
  """The row's, evaluated once, at the end; Baseline cannot re-rank."""
  once = ("evals.text.every_epochs=0.0", "evals.retrieval.every_epochs=0.0")
  rerank = 0 if name == "baseline" else 128
  return (*values, *once, f"evals.text.rerank={rerank}")
