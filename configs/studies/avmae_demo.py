"""Does pretraining help, and do two modalities beat one? On av_demo.

python -m avjax.sweep --study=configs/studies/avmae_demo.py --output=DIR

The fine-tuning recipe and its number of steps are the same in all rows: the
audiovisual model from the pretrained audiovisual MAE, from random weights, and
the pretrained weights fine-tuned on one modality alone. The learning rate was
chosen with pretrained weights, so random ones have a row with a quarter of it.
"""

from avjax.sweep import Row, Study

PRETRAIN = "configs/avmae_vgg.py:demo"
FINETUNE = "configs/avmae_vgg_finetune.py:demo"


def get_study() -> Study:
  """Rows of the README's demonstration."""
  pretrained = "pretraining/pretrain"
  return Study(
    title="Audiovisual MAE on av_demo: top-1 accuracy on the test clips",
    rows=(
      Row(
        "pretraining",
        PRETRAIN,
        overrides=("stages=('pretrain',)",),
        stages=("pretrain",),
        shown=False,
      ),
      Row("pretrained_audiovisual", FINETUNE, start=pretrained),
      Row("scratch_audiovisual", FINETUNE),
      Row(
        "scratch_audiovisual_quarter_lr",
        FINETUNE,
        overrides=("schedule.base_lr=2e-3",),
      ),
      Row("pretrained_audio", f"{FINETUNE},modality=a", start=pretrained),
      Row("pretrained_video", f"{FINETUNE},modality=v", start=pretrained),
    ),
    metrics=("test/top1",),
    chance=1 / 24,
    headings=("top-1",),
  )
