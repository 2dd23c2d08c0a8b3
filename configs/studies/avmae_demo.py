"""Does pretraining help, and do two modalities beat one? On av_demo.

python -m avjax.sweep --study=configs/studies/avmae_demo.py --output=DIR

Four rows, the fine-tuning recipe and its number of steps the same in all: the
audiovisual model from the pretrained audiovisual MAE, from random weights, and
the same pretrained weights fine-tuned on one modality alone.
"""

from avjax.sweep import Row, Study

FINETUNE = "configs/avmae_vgg_finetune.py:demo"


def get_study() -> Study:
  """Rows of the README's demonstration."""
  pretrained = "pretrained_audiovisual/pretrain"
  return Study(
    title="Audiovisual MAE on av_demo: top-1 accuracy on the test clips",
    rows=(
      Row(
        "pretrained_audiovisual",
        "configs/avmae_vgg.py:demo",
        stages=("pretrain", "finetune"),
      ),
      Row("scratch_audiovisual", FINETUNE),
      Row("pretrained_audio", f"{FINETUNE},modality=a", start=pretrained),
      Row("pretrained_video", f"{FINETUNE},modality=v", start=pretrained),
    ),
    metrics=("test/top1",),
    chance=1 / 24,
  )
