"""DETECLAP's configs: variants, thresholds and what they share with CAV-MAE."""

import pytest

from avjax import config as config_lib
from avjax.errors import InputError
from avjax.methods import deteclap
from configs import cavmae_as20k_finetune, cavmae_vgg, deteclap_vgg


def load(arg=None):
  return deteclap_vgg.get_config(arg).pretrain.copy_and_resolve_references()


@pytest.mark.parametrize("labels", deteclap.LABELS)
def test_every_variant_of_the_tables(labels):
  config = load(f"variant={labels}")
  assert config.method == "deteclap"
  assert config.model.labels == labels
  assert config.data.object_scores == "object_scores/vggsound"
  demo = load(f"variant={labels},demo")
  assert demo.model.labels == labels and demo.data.object_scores == "truth"


def test_thresholds_are_arguments():
  config = load("variant=and,threshold_audio=0.3,threshold_video=0.6")
  assert config.model.threshold_audio == 0.3
  assert config.model.threshold_video == 0.6
  assert (load().model.threshold_audio, load().model.threshold_video) == (
    0.5, 0.4,
  )  # fmt: skip


@pytest.mark.parametrize("arg", [None, "demo"])
def test_but_for_the_labels_it_is_cav_mae_base(arg):
  rest = f",{arg}" if arg else ""
  cavmae = cavmae_vgg.get_config(f"variant=base{rest}").pretrain
  plain = load(f"variant=none{rest}")
  for config, words in ((plain, ()), (load(arg), ("method", "model", "data"))):
    rows = config_lib.differences(
      config_lib.plain(cavmae), config_lib.plain(config)
    )
    allowed = ("evals.retrieval.within", *words)
    if arg and words:
      allowed += ("optimizer.multipliers",)
    assert [row for row in rows if not row.startswith(allowed)] == []
  added = {"labels", "objects", "label_weight"}
  added |= {"threshold_audio", "threshold_video"}
  assert set(load(arg).model) - set(plain.model) == added


def test_fine_tuning_is_cav_maes_and_starts_from_it():
  config = deteclap_vgg.get_config()
  assert config.stages == ("pretrain", "finetune")
  assert config.finetune.method == "cavmae_finetune"
  assert config.finetune.init_from == "previous"
  config = cavmae_as20k_finetune.get_config("pretrain=deteclap")
  assert config.init_from == "runs/deteclap_vgg/pretrain"


@pytest.mark.parametrize(
  ("arg", "words"),
  [
    ("variant=xor", "Did you mean 'or'"),
    ("threshold=0.5", "threshold_audio|threshold_video"),
    ("variant=none,threshold_audio=0.3", "threshold_audio=0.3 has no effect"),
    ("variant=soft_max,threshold_video=0.3", "no effect with variant=soft_max"),
    ("variant=audio,threshold_video=0.3", "threshold_video=0.3 has no effect"),
    ("pretrain=vgg", "value of config argument pretrain"),
  ],
)
def test_unknown_values_are_refused(arg, words):
  with pytest.raises(InputError, match=words):
    load(arg)
