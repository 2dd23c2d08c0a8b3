"""Public checkpoints that can be converted, and what to expect of them.

Licences are those that the projects state for code and weights alike; Scenic's
READMEs name none for the weights alone. Scores are the ones the projects or
papers print: CAV-MAE's README and training logs, AV-MAE's, MBT's and AST's
READMEs, MAE's (ImageNet-1K after fine-tuning), torchvision's list, table 6 of
AV-MAE for ViT.
"""

import dataclasses
from typing import Any

CAVMAE = "https://github.com/YuanGongND/cav-mae"
MAE = "https://github.com/facebookresearch/mae"
VIT = "https://github.com/google-research/vision_transformer"
AST = "https://github.com/YuanGongND/ast"
SCENIC = "https://github.com/google-research/scenic/tree/main/scenic/projects/"
BSD, APACHE, NC = "BSD-2-Clause", "Apache-2.0", "CC-BY-NC 4.0"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """One public file.

  Attributes:
    name: of the file or folder, as its project has it.
    family: name in `avjax.weights.families.FAMILIES`.
    licence: SPDX name or as the project writes it.
    score: as published, with its metric and data; '' = none is published.
    config: of ours that goes with it, with the flags for values that its
      arrays do not show; or that it starts.
    origin: the project's page, which links the file.
  """

  name: str
  family: str
  licence: str
  score: str
  config: str
  origin: str


def _cavmae(name: str, score: str, config: str) -> Checkpoint:
  return Checkpoint(name, "cavmae", BSD, score, config, CAVMAE)


def _pretrained(
  name: str, file: str, argument: str, score: str = "", **values: Any
) -> Checkpoint:
  """A row of a pretraining file, with the values that its arrays do not show.

  They are those that CAV-MAE's README tells its files apart by.
  """
  top = ("batch_size",)
  flags = [
    f" --config.{'' if key in top else 'model.'}{key}={value}"
    for key, value in values.items()
  ]
  config = f"{AS}:{argument}{''.join(flags)}"
  return _cavmae(f"CAV-MAE-{name} ({file})", score, config)


def _avmae(name: str, score: str, config: str) -> Checkpoint:
  return Checkpoint(name, "avmae", APACHE, score, config, SCENIC + "av_mae")


def _finetuned(name: str, score: str, config: str) -> Checkpoint:
  return Checkpoint(name, "mbt", APACHE, score, config, SCENIC + "av_mae")


def _mbt(name: str, score: str, config: str) -> Checkpoint:
  return Checkpoint(name, "mbt_original", APACHE, score, config, SCENIC + "mbt")


AS, BASE = "cavmae_audioset.py", "variant=base"
AS20K, AS2M = "cavmae_as20k_finetune.py", "cavmae_as2m_finetune.py"
VGG_FT = "cavmae_vgg_finetune.py"
# These files hold the unused branch of the picture, too.
AUDIO = ":modality=a"
AVSIAM, AVSIAM_AS = "https://github.com/GenjiB/AVSiam", "avsiam_audioset.py"
COAVT = "starts coavt_audioset.py"
UAVM, UAVM_EXTRACTOR = "https://github.com/YuanGongND/uavm", "uavm_extractor_"
_UNIFIED, _FULL = "unified_trans", "full_att_trans"
# The middle of the names is the recipe: -lr5e-5-bs-144-…-h4-.
UAVM_MODELS = (
  ("unified", "VGGSound", f"testfm66-vgg-{_UNIFIED}", "di3-ds3…r1.pth",
   "56.5, 49.9, 65.8 top-1 a, v, av", "uavm_vgg.py"),
  ("independent", "VGGSound", f"testfm66-vgg-{_UNIFIED}", "di6-ds0…r1.pth",
   "56.5, 49.7, 65.7 top-1 a, v, av", "uavm_vgg.py:variant=independent"),
  ("cross-modal", "VGGSound", f"testfm75-vgg-{_FULL}", "di3-ds3…r1.pth",
   "62.9 top-1 av", "uavm_vgg.py:variant=cross_modal"),
  ("unified", "AudioSet", f"testfm74-full-{_UNIFIED}", "di3-ds3…r1.pth",
   "45.6, 27.4, 48.0 mAP a, v, av", "uavm_audioset.py"),
  ("independent", "AudioSet", f"testfm74-full-{_UNIFIED}", "di6-ds0…r1.pth",
   "45.5, 26.8, 48.1 mAP a, v, av", "uavm_audioset.py:variant=independent"),
  ("cross-modal", "AudioSet", f"testfm74-full-{_FULL}", "di3-ds3….pth",
   "50.4 mAP av", "uavm_audioset.py:variant=cross_modal"),
)  # fmt: skip
AVMAE_AS, AVMAE_AS_FT = "avmae_audioset.py", "avmae_audioset_finetune.py"
AVMAE_VGG, AVMAE_VGG_FT = "avmae_vgg.py", "avmae_vgg_finetune.py"

CHECKPOINTS = (
  _pretrained("Scale++", "audio_model.21.pth", "variant=scale++"),
  _pretrained(
    "Scale+",
    "audio_model.25.pth",
    "variant=scale+",
    score="zero-shot R@1 AudioSet V→A 18.8, A→V 15.1; VGGSound 14.8, 12.8",
  ),
  _pretrained("Base", "cav-mae-base.pth", BASE),
  _pretrained("Base-NoNorm", "cav-mae-base-nonorm.pth", BASE, norm_pix=False),
  *(
    _pretrained(
      f"Base-{name}",
      f"{file}.pth",
      BASE,
      **({"masking": masking} if masking else {}),
      mask_audio=ratio,
      mask_video=ratio,
    )
    for name, file, masking, ratio in (
      ("50", "50", "", 0.5),
      ("65", "65", "", 0.65),
      ("85", "85", "", 0.85),
      ("TF", "time_freq_75", "time_frequency", 0.75),
      ("TF-50", "time_freq_50", "time_frequency", 0.5),
      ("T", "time_75", "time", 0.75),
      ("F", "freq_75", "frequency", 0.75),
    )
  ),
  *(
    _pretrained(
      f"Base-C{weight}",
      f"cav-mae-base-c{weight}.pth",
      BASE,
      contrast_weight=weight,
    )
    for weight in (0.001, 0.1)
  ),
  *(
    _pretrained(
      f"{name} of batch 120",
      file,
      "variant=scale+",
      group_size=30,
      contrast_two_way=two_way,
      batch_size=120,
    )
    for name, file, two_way in (
      ("Scale+", "single_direction.pth", False),
      ("Symc-Scale+", "symc.pth", True),
    )
  ),
  _cavmae("as-full-51.2.pth", "51.2 mAP AS-2M audiovisual", AS2M),
  _cavmae("as-20k-42.0.pth", "42.0 mAP AS-20K audiovisual", AS20K),
  _cavmae("vgg_65.5.pth", "65.5 top-1 VGGSound audiovisual", VGG_FT),
  _cavmae(
    "vgg_66.0.pth (AS-2M + VGGSound pretraining)",
    "65.9 top-1 VGGSound audiovisual",
    VGG_FT,
  ),
  _cavmae("as_46.6.pth", "46.6 mAP AS-2M audio", AS2M + AUDIO),
  _cavmae("as_37.7.pth", "37.7 mAP AS-20K audio", AS20K + AUDIO),
  _cavmae("vgg_59.8.pth", "59.8 top-1 VGGSound audio", VGG_FT + AUDIO),
  *(
    Checkpoint(
      f"{name}.pth", "avsiam", "MIT (README badge)", "", config, AVSIAM
    )
    for name, config in (
      ("as2m_pretrained.20", AVSIAM_AS),
      ("as+vgg+acav_pretrained", f"{AVSIAM_AS}:variant=base+"),
    )
  ),
  *(
    Checkpoint(
      f"{name}_audio_feat.pth", "convnext", BSD, "", f"{config}.py", UAVM
    )
    for name, config in (
      ("as", f"{UAVM_EXTRACTOR}audioset"),
      ("vgg", f"{UAVM_EXTRACTOR}vgg"),
    )
  ),
  *(
    Checkpoint(
      f"UAVM {model} ({data}: {file}…{ending})",
      "uavm",
      BSD,
      score,
      config,
      UAVM,
    )
    for model, data, file, ending, score, config in UAVM_MODELS
  ),
  Checkpoint(
    "convnext_base-6075fbad.pth",
    "convnext",
    "BSD-3-Clause",
    "84.1 top-1 ImageNet-1K",
    f"starts {UAVM_EXTRACTOR}vgg.py, {UAVM_EXTRACTOR}audioset.py",
    "https://github.com/pytorch/vision",
  ),
  Checkpoint(
    "mae_pretrain_vit_base.pth, mae_pretrain_vit_base_full.pth",
    "mae",
    NC,
    "83.6 top-1 ImageNet-1K fine-tuned",
    f"starts {AS}, {AVMAE_VGG}:size=B",
    MAE,
  ),
  Checkpoint(
    "mae_pretrain_vit_large.pth",
    "mae",
    NC,
    "85.9 top-1 ImageNet-1K fine-tuned",
    f"starts {AVMAE_VGG}",
    MAE,
  ),
  Checkpoint(
    "ViT-B_16.npz (imagenet21k), timm's names too",
    "vit",
    APACHE,
    "64.1 top-1 VGGSound through MBT (AV-MAE, table 6)",
    f"starts {AVMAE_VGG_FT}:size=B",
    VIT,
  ),
  Checkpoint(
    "ViT-L_16.npz (imagenet21k), timm's names too",
    "vit",
    APACHE,
    "61.4 top-1 VGGSound through MBT (AV-MAE, table 6)",
    f"starts {AVMAE_VGG_FT}",
    VIT,
  ),
  Checkpoint(
    "audioset_10_10_0.4593.pth and AST's others, transformers' names too",
    "ast",
    "BSD-3-Clause",
    "45.9 mAP AudioSet audio",
    f"starts {AVSIAM_AS}:pretrain=ast",
    AST,
  ),
  Checkpoint(
    "bert-base-uncased (model.safetensors, pytorch_model.bin)",
    "bert",
    APACHE,
    "",
    f"{COAVT} (init_from=av:PATH,text:PATH)",
    "https://huggingface.co/google-bert/bert-base-uncased",
  ),
  Checkpoint(
    "blip2_pretrained.pth of LAVIS, transformers' names too",
    "bert",
    "BSD-3-Clause",
    "",
    f"{COAVT} --config.model.cross_every=2 --config.model.query_ffn=True "
    "--config.model.queries=32 (init_from=av:PATH,text:PATH)",
    "https://github.com/salesforce/LAVIS",
  ),
  _avmae("as2m_selfsup_audiovisual", "", AVMAE_AS + ":variant=public"),
  _avmae("as2m_selfsup_audio", "", AVMAE_AS + ":variant=public,modality=a"),
  _avmae("vggsound_selfsup_audiovisual", "", AVMAE_VGG + ":variant=public"),
  *(
    _finetuned(
      f"as2m_selfsup_audiovisual_finetuned_{m}",
      f"{score} mAP AudioSet",
      f"{AVMAE_AS_FT}:variant=public{arg}",
    )
    for m, score, arg in (
      ("audiovisual", 51.8, ""),
      ("audio", 46.6, ",modality=a"),
      ("video", 31.1, ",modality=v"),
    )
  ),
  _finetuned(
    "as2m_selfsup_audio_finetuned_audio",
    "46.4 mAP AudioSet",
    f"{AVMAE_AS_FT}:variant=public,modality=a",
  ),
  *(
    _finetuned(
      f"vggsound_selfsup_audiovisual_finetuned_{m}",
      f"{score} top-1 VGGSound",
      f"{AVMAE_VGG_FT}:variant=public{arg}",
    )
    for m, score, arg in (
      ("audiovisual", "65.0", ""),
      ("audio", "57.2", ",modality=a"),
      ("video", "50.3", ",modality=v"),
    )
  ),
  *(
    _mbt(f"mbtb32_as-{data}_{m}", f"{score} mAP AudioSet", AVMAE_AS_FT)
    for data, m, score in (
      ("mini", "spec", 30.9),
      ("mini", "rgb", "27.0"),
      ("mini", "rgb-spec", 43.9),
      ("500k", "spec", "44.0"),
      ("500k", "rgb", 33.9),
      ("500k", "rgb-spec", 52.3),
    )
  ),
)


def markdown() -> str:
  """The table, as the README has it."""
  rows = ["| checkpoint | family | licence | published score | config | from |"]
  rows.append("|---|---|---|---|---|---|")
  for c in CHECKPOINTS:
    score = c.score or "–"
    cells = (c.name, c.family, c.licence, score, c.config, c.origin)
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows)
