"""CAV-MAE's configs: arguments, published values, sizes and rates."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import experiment, methods, optim, parallel
from avjax.data import pipeline
from avjax.errors import InputError
from tests.runs import assert_fits, inputs, load, value

PRETRAIN = ("cavmae_audioset", "cavmae_vgg")
FINETUNE = (
  "cavmae_vgg_finetune", "cavmae_as20k_finetune", "cavmae_as2m_finetune",
)  # fmt: skip
ARGUMENTS = {
  **dict.fromkeys(
    PRETRAIN,
    ("variant=base", "variant=scale+", "variant=scale++", "pretrain=scratch",
     "demo", "demo,epochs=3", "demo,variant=base"),
  ),
  **dict.fromkeys(
    FINETUNE,
    ("modality=a", "modality=v", "pretrain=scale++", "pretrain=base",
     "pretrain=vgg,epochs=3", "pretrain=audioset_vgg", "pretrain=scratch",
     "demo", "demo,modality=a", "demo,modality=v,epochs=3"),
  ),
}  # fmt: skip


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
  "optimizer.eps": 1e-8,
  "optimizer.weight_decay": 5e-7,
  "optimizer.clip_norm": 0.0,
  "optimizer.layer_decay": 1.0,
  "schedule.name": "step",
  "schedule.step_factor": 0.5,
  "schedule.lr_batch": 0,
  "schedule.warmup_epochs": 0.0,
  "model.size": "B",
  "data.variant": "frames10",
  "data.video.num_frames": 1,
  "data.video.resize": 224,
  "data.video.size": 224,
  "data.video.mean": (0.485, 0.456, 0.406),
  "data.video.std": (0.229, 0.224, 0.225),
  "data.fbank.window": "hanning",
  "data.fbank.edges": "snip",
  "data.fbank.num_mels": 128,
  "data.fbank.frames": 1_024,
  "data.fbank.remove_mean": True,
  "data.fbank.mean": -5.081,
  "data.fbank.std": 4.4849,
  "data.files.channels": "first",
  "data.augment.flip": 0.0,
  "data.augment.random_crop": False,
  "data.augment.noise": 0.1,
  "data.augment.roll": 1_024,
  "data.augment.mask_value": "raw",
}
PRETRAIN_VALUES = {
  **COMMON,
  "total_epochs": 25.0,
  "init_from": "mae_pretrain_vit_base_full.pth",
  "model.mask_audio": 0.75,
  "model.mask_video": 0.75,
  "model.masking": "unstructured",
  "model.norm_pix": True,
  "model.mae_weight": 1.0,
  "model.contrast_weight": 0.01,
  "model.contrast_two_way": False,
  "model.temperature": 0.05,
  "data.augment.mixup": 0.0,
  "data.augment.freq_masks": 0,
  "data.augment.time_masks": 0,
  "data.sampling": "shuffle",
  "optimizer.average": "none",
  "schedule.step_epochs": (10, 15, 20),
}
FINETUNE_VALUES = {
  **COMMON,
  "model.label_smoothing": 0.1,
  "model.loss": "auto",
  "model.freeze_base": False,
  "data.augment.mixup": 10.0,
  "data.augment.mixup_probability": 0.5,
  "data.augment.mixup_waveform": True,
  "data.augment.freq_masks": 1,
  "data.augment.freq_size": 48,
  "data.augment.time_masks": 1,
  "data.augment.time_size": 192,
  "optimizer.average": "epochs",
  "evals.test.views": 10,
  "evals.test.average": "probabilities",
  "evals.test.modes": ("av", "missing_a", "missing_v"),
  "evals.frame.views": 1,
}
SCALE_KEYS = ("batch_size", "schedule.base_lr", "model.group_size")
FINETUNE_KEYS = (
  "batch_size", "schedule.base_lr", "optimizer.multipliers.head",
  "total_epochs", "schedule.step_epochs", "optimizer.average_from",
  "data.sampling", "data.multilabel", "data.name", "data.split",
)  # fmt: skip
FINETUNE_TABLE = {
  "cavmae_as20k_finetune": (
    36, 5e-5, 100.0, 15.0, tuple(range(5, 15)), 3, "shuffle", True,
    "audioset", "train_20k",
  ),
  "cavmae_as2m_finetune": (
    48, 1e-5, 50.0, 10.0, tuple(range(2, 10)), 1, "balanced", True,
    "audioset", "train_2m",
  ),
  "cavmae_vgg_finetune": (
    48, 1e-4, 10.0, 10.0, tuple(range(2, 10)), 3, "balanced", False,
    "vggsound", "train",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_is_the_published_one(name):
  config = load(name)
  assert {k: value(config, k) for k in PRETRAIN_VALUES} == PRETRAIN_VALUES


@pytest.mark.parametrize(
  "name, arg, expected",
  [
    ("cavmae_audioset", "variant=base", (48, 5e-5, 12)),
    ("cavmae_audioset", "", (108, 1e-4, 27)),
    ("cavmae_audioset", "variant=scale+", (108, 1e-4, 27)),
    ("cavmae_audioset", "variant=scale++", (256, 2e-4, 64)),
    ("cavmae_vgg", "", (120, 1e-4, 30)),
    ("cavmae_vgg", "pretrain=audioset", (120, 5e-5, 30)),
  ],
)
def test_scales(name, arg, expected):
  config = load(name, arg)
  assert tuple(value(config, key) for key in SCALE_KEYS) == expected


@pytest.mark.parametrize("arg", ["", "demo"])
def test_clips_of_one_class_are_probed_once(arg):
  """AudioSet's clips have several: hundreds of regressions each time."""
  assert "probe" not in load("cavmae_audioset", arg).evals
  probe = load("cavmae_vgg", arg).evals.probe
  assert (probe.type, probe.every_epochs) == ("linear_probe", 0.0)
  assert (probe.train_split, probe.split) == ("train", "test")
  assert 0 < probe.train_limit <= 10_000


def test_from_audioset_ten_epochs_at_one_rate():
  config = load("cavmae_vgg", "pretrain=audioset")
  assert config.total_epochs == 10.0
  assert config.schedule.step_epochs == ()
  assert config.init_from == "runs/cavmae_audioset-variant_scale++"


@pytest.mark.parametrize("name", FINETUNE)
def test_finetuning_is_the_published_one(name):
  config = load(name)
  assert {k: value(config, k) for k in FINETUNE_VALUES} == FINETUNE_VALUES
  found = tuple(value(config, key) for key in FINETUNE_KEYS)
  assert found == FINETUNE_TABLE[name]
  assert config.init_from == "runs/cavmae_audioset"


def test_second_stage_starts_from_the_first():
  config = importlib.import_module("configs.cavmae_vgg").get_config("demo")
  assert config.stages == ("pretrain", "finetune")
  assert config.finetune.init_from == "previous"
  assert config.pretrain.init_from == ""
  assert config.pretrain.model.group_size == 0


@pytest.mark.parametrize(
  "name, start, step, epochs",
  [
    ("cavmae_audioset", 10, 5, 25),
    ("cavmae_vgg", 10, 5, 25),
    ("cavmae_as20k_finetune", 5, 1, 15),
    ("cavmae_as2m_finetune", 2, 1, 10),
    ("cavmae_vgg_finetune", 2, 1, 10),
  ],
)
def test_rate_of_every_epoch(name, start, step, epochs):
  """PyTorch's MultiStepLR, milestones range(start, 1000, step), by epoch."""
  config, long = load(name), 7
  rate = optim.schedule(
    config.schedule,
    batch_size=config.batch_size,
    steps_per_epoch=long,
    total_steps=epochs * long,
  )
  assert config.total_epochs == epochs
  full, milestones = config.schedule.base_lr, range(start, 1_000, step)
  for epoch in range(1, epochs + 1):  # the scheduler has stepped epoch - 1
    expected = full * 0.5 ** sum(m <= epoch - 1 for m in milestones)
    for at in ((epoch - 1) * long, epoch * long - 1):
      np.testing.assert_allclose(rate(at), expected, rtol=1e-6)
  assert rate(start * long - 1) == pytest.approx(full)
  assert rate(start * long) == pytest.approx(full / 2)


# --- Sizes -------------------------------------------------------------------

# Public totals: 191,036,160 and, with 527 classes, 164,907,023. Norms that no
# pass uses are not there: 8 of 22 blocks of 768 and of 8 blocks of 512.
DEAD, DEAD_DECODER = 22 * 8 * 768, 8 * 8 * 512


@pytest.mark.parametrize(
  "name, total",
  [
    ("cavmae_audioset", 191_036_160 - DEAD - DEAD_DECODER),
    ("cavmae_vgg", 191_036_160 - DEAD - DEAD_DECODER),
    ("cavmae_as20k_finetune", 164_907_023 - DEAD),
    ("cavmae_as2m_finetune", 164_907_023 - DEAD),
    ("cavmae_vgg_finetune", 164_907_023 - DEAD - (527 - 309) * 769),
  ],
)
def test_shapes_and_parameters_at_full_size(name, total):
  config = load(name)
  given = inputs(config)
  assert given["fbank"].shape == (2, 1_024, 128)
  assert given["frames"].shape == (2, 1, 224, 224, 3)
  assert given["fbank"].dtype == given["frames"].dtype == jnp.float32
  assert ("mix/audio" in given) == name.endswith("finetune")
  method = methods.make(config)
  params = jax.eval_shape(method.init, jax.random.key(0), given)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total
  assert params["positions_audio"].shape == (512, 768)
  assert params["positions_video"].shape == (196, 768)


@pytest.mark.parametrize("modality, gone", [("a", "frames"), ("v", "fbank")])
def test_one_modality_is_read_and_judged_alone(modality, gone):
  config = load("cavmae_as20k_finetune", f"modality={modality}")
  given = inputs(config)
  assert gone not in given
  assert config.evals.test.modes == ()
  views = pipeline.batch_shapes(config.data, 2)
  assert ("waveform" in views) == (modality == "a")


@pytest.mark.parametrize(
  "name, arg, words",
  [
    ("cavmae_audioset", "variant=scale", "variant"),
    ("cavmae_audioset", "pretrain=vgg", "pretrain"),
    ("cavmae_vgg", "pretrain=maee", "Did you mean 'mae'"),
    ("cavmae_vgg_finetune", "modality=va", "modality"),
    ("cavmae_as2m_finetune", "pretrain=scale", "pretrain"),
  ],
)
def test_unknown_values_are_refused(name, arg, words):
  with pytest.raises(InputError, match=words):
    load(name, arg)


def test_groups_of_the_contrast_divide_the_batch():
  config = load("cavmae_audioset", "variant=scale+")  # 108 clips, groups of 27
  mesh = parallel.make_mesh(config.mesh, jax.devices()[:1])
  with config.unlocked():
    config.optimizer.accumulate = 4
    experiment.check_batch(config, 108, mesh)
    config.optimizer.accumulate = 3
    with pytest.raises(InputError, match="36 .108 in 3 .*group_size=27"):
      experiment.check_batch(config, 108, mesh)
    config.model.contrast_weight = 0.0  # no groups then
    experiment.check_batch(config, 108, mesh)
