"""AVSiam's configs: arguments, values of tables 9 to 11, sizes and rates."""

import jax
import numpy as np
import pytest

from avjax import methods, optim
from avjax.errors import InputError
from tests.runs import assert_fits, load, params, value

FINETUNE = (
  "avsiam_vgg_finetune", "avsiam_as20k_finetune", "avsiam_as2m_finetune",
)  # fmt: skip
VARIANTS = ("base", "base+", "large", "huge")
DEMO = ("demo,epochs=3", "demo,variant=base+", "demo,variant=huge")
ARGUMENTS = {
  "avsiam_audioset": ("variant=base+", "encoder=separate", *DEMO),
  "avsiam_msrvtt_finetune": ("encoder=separate", *DEMO),
  "avsiam_vgg_finetune": ("variant=huge", "modality=av", "demo,modality=a"),
  "avsiam_as20k_finetune": ("variant=large,encoder=separate", "demo"),
  "avsiam_as2m_finetune": ("modality=v,pretrain=in21k", *DEMO),
}


@pytest.mark.parametrize(
  "name, arg", [(n, a) for n, args in ARGUMENTS.items() for a in args]
)
def test_arguments_resolve_and_fit_the_method(name, arg):
  assert_fits(load(name, arg))


# --- Numbers of the paper and the public scripts -----------------------------

COMMON = {
  "optimizer.name": "adam_l2",
  "optimizer.b1": 0.95,
  "optimizer.b2": 0.999,
  "optimizer.weight_decay": 5e-7,
  "optimizer.clip_norm": 0.0,
  "optimizer.average": "none",
  "schedule.name": "step",
  "schedule.lr_batch": 0,
  "schedule.warmup_epochs": 0.0,
  "model.encoder": "shared",
  "data.variant": "frames10",
  "data.video.num_frames": 1,
  "data.video.size": 224,
  "data.video.mean": (0.485, 0.456, 0.406),
  "data.video.std": (0.229, 0.224, 0.225),
  "data.fbank.window": "hanning",
  "data.fbank.num_mels": 128,
  "data.fbank.frames": 1_024,
  "data.fbank.mean": -5.081,
  "data.fbank.std": 4.4849,
  "data.augment.noise": 0.1,
  "data.augment.roll": 1_024,
}
PRETRAIN_VALUES = {
  **COMMON,
  "batch_size": 1_536,
  "total_epochs": 20.0,
  "schedule.base_lr": 1e-4,
  "schedule.step_factor": 0.5,
  "schedule.step_epochs": (10, 15),
  "model.temperature": 0.05,
  "model.multimodal_depth": 2,
  "model.stop_gradient": True,
  "model.public_base": False,
  "data.augment.mixup": 0.0,
  "data.augment.freq_masks": 0,
  "data.sampling": "shuffle",
  "data.name": "audioset",
  "data.split": "train_2m",
}
FINETUNE_VALUES = {
  **COMMON,
  "total_epochs": 15.0,
  "model.label_smoothing": 0.1,
  "model.loss": "auto",
  "model.shares": (0.25, 0.25, 0.5),
  "data.augment.mixup": 10.0,
  "data.augment.mixup_probability": 0.5,
  "data.augment.mixup_waveform": True,
  "data.augment.freq_size": 48,
  "data.augment.time_size": 192,
  "evals.test.views": 10,
  "evals.test.average": "probabilities",
  "evals.test.modes": ("a", "v", "av"),
  "evals.frame.views": 1,
  "evals.frame.every_epochs": 1.0,
}
# Tables 9 to 11: rate, times it for classifiers, first fall, factor, batch.
TABLE = {
  ("avsiam_as20k_finetune", "base"): (1e-4, 100.0, 2, 0.75, 32),
  ("avsiam_as2m_finetune", "base"): (5e-6, 50.0, 5, 0.75, 128),
  ("avsiam_vgg_finetune", "base"): (5e-5, 10.0, 2, 0.75, 128),
  ("avsiam_as20k_finetune", "large"): (5e-5, 100.0, 2, 0.75, 32),
  ("avsiam_as2m_finetune", "large"): (5e-6, 50.0, 2, 0.5, 128),
  ("avsiam_vgg_finetune", "large"): (5e-6, 50.0, 2, 0.5, 128),
  ("avsiam_as20k_finetune", "huge"): (1e-5, 100.0, 5, 0.5, 32),
  ("avsiam_as2m_finetune", "huge"): (5e-6, 50.0, 2, 0.5, 32),
  ("avsiam_vgg_finetune", "huge"): (5e-6, 50.0, 2, 0.5, 32),
}
DATA = {
  "avsiam_as20k_finetune": ("audioset", "train_20k", "shuffle", True, "eval"),
  "avsiam_as2m_finetune": ("audioset", "train_2m", "balanced", True, "eval"),
  "avsiam_vgg_finetune": ("vggsound", "train", "balanced", False, "test"),
}


def found(config, expected):
  return {key: value(config, key) for key in expected}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pretraining_is_the_published_one(variant):
  config = load("avsiam_audioset", f"variant={variant}")
  assert found(config, PRETRAIN_VALUES) == PRETRAIN_VALUES
  assert bool(config.data.mixture) == (variant == "base+")
  size = {"large": "L", "huge": "H"}.get(variant, "B")
  assert config.model.size == size
  assert config.init_from.startswith(f"ViT-{size}_")


@pytest.mark.parametrize("name, variant", TABLE)
def test_finetuning_is_the_published_one(name, variant):
  config = load(name, f"variant={variant}")
  assert found(config, FINETUNE_VALUES) == FINETUNE_VALUES
  rate, times, start, factor, batch = TABLE[name, variant]
  schedule = config.schedule
  assert (schedule.base_lr, schedule.step_factor) == (rate, factor)
  assert schedule.step_epochs == tuple(range(start, 15))
  assert config.batch_size == batch
  multipliers = {f"head_{m}": times for m in ("audio", "video", "av")}
  multipliers["multimodal"] = 1.0
  assert config.optimizer.multipliers.to_dict() == multipliers
  data = config.data
  assert DATA[name] == (
    data.name, data.split, data.sampling, data.multilabel,
    config.evals.test.split,
  )  # fmt: skip


def test_retrieval_is_contrast_without_masks():
  config = load("avsiam_msrvtt_finetune")
  assert found(config, COMMON) == COMMON
  assert config.model.ratios == (0.0,) and not config.model.mae_weight
  assert (config.data.name, config.evals.retrieval.split) == ("msrvtt", "test")
  assert config.init_from == "runs/avsiam_audioset"


@pytest.mark.parametrize("arg", ["epochs=0", "demo,epochs=0"])
def test_no_epochs_are_one_step_that_learns_nothing(arg):
  config = load("avsiam_msrvtt_finetune", arg)
  assert (config.total_steps, config.total_epochs) == (1, 0.0)
  rate = optim.schedule(
    config.schedule, batch_size=1, steps_per_epoch=9, total_steps=1
  )
  assert not rate(0)


@pytest.mark.parametrize(
  "arg, run",
  [
    ("", "runs/avsiam_audioset"),
    ("variant=large", "runs/avsiam_audioset-variant_large"),
    (
      "variant=large,encoder=separate",
      "runs/avsiam_audioset-variant_large-encoder_separate",
    ),
    ("pretrain=in21k", "ViT-B_16.npz"),
    ("pretrain=ast", "audioset_10_10_0.4593.pth"),
    ("pretrain=scratch", ""),
  ],
)
def test_starts_from_the_run_of_the_same_arguments(arg, run):
  for name in (*FINETUNE, "avsiam_msrvtt_finetune"):
    assert load(name, arg).init_from == run


def test_rate_of_every_epoch():
  """Table 9: AS-2M falls from epoch 5 on, by .75 an epoch."""
  config, long = load("avsiam_as2m_finetune"), 7
  rate = optim.schedule(
    config.schedule, batch_size=128, steps_per_epoch=long, total_steps=15 * long
  )
  for epoch in range(15):
    expected = 5e-6 * 0.75 ** max(epoch - 4, 0)
    for step in (epoch * long, (epoch + 1) * long - 1):
      np.testing.assert_allclose(rate(step), expected, rtol=1e-6)


def test_a_mixture_draws_every_clip_as_often():
  sizes = {"audioset": 1.7, "vggsound": 0.2, "acav": 2.4}  # millions, §5.1
  entries = load("avsiam_audioset", "variant=base+").data.mixture
  parts = [entry.split(":") for entry in entries]
  assert {name: float(weight) for name, _, weight in parts} == sizes
  assert load("avsiam_audioset", "demo,variant=base+").data.mixture == ()


# --- Sizes -------------------------------------------------------------------


def millions(tree, names):
  leaves = [x for n in names for x in jax.tree.leaves(tree[n])]
  return sum(leaf.size for leaf in leaves) / 1e6


@pytest.mark.parametrize(
  "arg, published",
  [
    ("", 100),
    ("variant=large", 332),
    ("variant=huge", 672),
    ("variant=large,encoder=separate", 640),
  ],
)
def test_parameters_are_the_published_ones(arg, published):
  """Encoder, embeddings and multimodal layers; no decoder, no heads."""
  config = load("avsiam_audioset", arg)
  tree = params(config)
  wanted = ("embed_", "positions_", "encoder", "multimodal")
  names = [name for name in tree if name.startswith(wanted)]
  assert millions(tree, names) == pytest.approx(published, rel=0.025)
  side = 14 if config.model.size == "H" else 16
  tokens = {
    "audio": (128 // side) * (1024 // side),
    "video": (224 // side) ** 2,
  }
  for m, n in tokens.items():
    assert len(tree[f"positions_{m}"]) == n


@pytest.mark.parametrize("name", FINETUNE)
def test_classifiers_have_the_data_sets_classes(name):
  tree, k = params(load(name)), 309 if "vgg" in name else 527
  for m, width in (("audio", 768), ("video", 768), ("av", 1_536)):
    assert tree[f"classifier_{m}"]["out"]["kernel"].shape == (width, k)


@pytest.mark.parametrize(
  "name, arg, words",
  [
    ("avsiam_audioset", "variant=bas", "Did you mean 'base'"),
    ("avsiam_audioset", "encoder=both", "encoder"),
    ("avsiam_audioset", "pretrain=audioset", "Known: ast, in21k, scratch"),
    ("avsiam_audioset", "variant=large,pretrain=ast", "Known: in21k, scratch"),
    (
      "avsiam_vgg_finetune",
      "variant=huge,pretrain=ast",
      "Known: audioset, in21k, s",
    ),
    ("avsiam_vgg_finetune", "modality=va", "modality"),
    ("avsiam_as2m_finetune", "pretrain=in22k", "Did you mean 'in21k'"),
    ("avsiam_msrvtt_finetune", "modality=a", "modality"),
  ],
)
def test_unknown_values_are_refused(name, arg, words):
  with pytest.raises(InputError, match=words):
    methods.make(load(name, arg))
