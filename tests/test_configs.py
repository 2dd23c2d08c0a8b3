"""Every config resolves, has known keys, the paper's values and its size."""

import importlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax import methods
from avjax.errors import InputError
from avjax.methods import mbt

ROOT = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(p.stem for p in ROOT.glob("*.py") if p.stem != "__init__")
PRETRAIN = ("avmae_vgg", "avmae_audioset")
FINETUNE = (
  "avmae_vgg_finetune",
  "avmae_audioset_finetune",
  "avmae_epic_finetune",
  "avmae_ave_finetune",
)
AVMAE = PRETRAIN + FINETUNE
ARGUMENTS = {
  **dict.fromkeys(
    PRETRAIN,
    (
      "size=B",
      "size=B,encoder=early,decoder=early",
      "size=B,encoder=shared",
      "size=B,encoder=separate",
      "size=B,decoder=separate",
      "size=B,encoder=early,objective=inpaint_video_from_audio",
      "size=B,encoder=early,objective=inpaint_audio_from_video",
      "size=B,encoder=early,objective=inpaint_both",
      "size=B,modality=a",
      "size=B,modality=v",
      "epochs=1200",
      "demo,epochs=3",
      "variant=public",
      "demo,variant=public",
    ),
  ),
  **dict.fromkeys(
    FINETUNE,
    (
      "modality=a",
      "modality=v",
      "size=B",
      "size=B,pretrain=audiomae",
      "pretrain=audioset",
      "pretrain=scratch,epochs=5",
      "variant=public",
      "demo,modality=a",
      "demo,modality=v,epochs=3",
    ),
  ),
}
CASES = [
  (name, arg)
  for name in NAMES
  for arg in ("", "demo", *ARGUMENTS.get(name, ()))
]


def load(name, arg=""):
  return importlib.import_module(f"configs.{name}").get_config(arg)


def stages(config):
  """The config itself, or those of its stages."""
  if not config.stages:
    return [config]
  return [config[n].copy_and_resolve_references() for n in config.stages]


def default_model(method):
  """All keys of `config.model`, from the method's own file."""
  module = methods.METHODS[method].split(":")[0]
  return importlib.import_module(module).default_model()


def value(config, path):
  for key in path.split("."):
    config = config[key]
  return config


def assert_same_keys(found, known, path=""):
  """Keys and kinds of values, recursively; sections that may be open, not."""
  open_sections = ("evals", "optimizer.multipliers", "model.classes")
  if path in open_sections:
    return
  assert sorted(found) == sorted(known), path
  for key in found:
    place = f"{path}.{key}".strip(".")
    if isinstance(known[key], ConfigDict):
      assert_same_keys(found[key], known[key], place)
    else:
      assert type(found[key]) is type(known[key]), place


def shapes(config):
  """ShapeDtypeStructs of a method's inputs, two clips."""
  video, audio = config.data.video, config.data.audio
  size = (video.size, video.size, 3)
  frames = (2, video.num_frames, *size)
  fbank = (2, round(100 * audio.seconds), config.data.fbank.num_mels)
  inputs = {"v": ("frames", frames), "a": ("fbank", fbank)}
  return {
    inputs[m][0]: jax.ShapeDtypeStruct(inputs[m][1], jnp.float32)
    for m in config.data.modality
  }


def parameters(config):
  """Number of parameters, without computing any."""
  init = methods.make(config).init
  found = jax.eval_shape(init, jax.random.key(0), shapes(config))
  return sum(leaf.size for leaf in jax.tree.leaves(found))


def test_cases_cover_every_config():
  assert set(ARGUMENTS) <= set(NAMES)


@pytest.mark.parametrize("name, arg", CASES)
def test_resolves_with_known_keys(name, arg):
  config = load(name, arg)
  for stage in stages(config):
    known = config_lib.base_config()
    known.model = default_model(stage.method)
    known.stages = stage.stages
    assert_same_keys(stage, known)
    for section in stage.evals.values():
      assert_same_keys(section, config_lib.eval_section(section.type))
    methods.make(stage)
  plain = json.loads(json.dumps(config_lib.plain(config)))
  again = config_lib.from_plain(plain)
  assert config_lib.differences(plain, config_lib.plain(again)) == []
  config.lock()
  with pytest.raises(AttributeError):
    stages(again)[0].lock().optimizer.learning_rate = 1.0


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_are_refused(name):
  with pytest.raises(InputError, match="Did you mean 'demo'"):
    load(name, "deom")


@pytest.mark.parametrize("name", AVMAE)
def test_unknown_values_are_refused(name):
  with pytest.raises(InputError, match="value of config argument size"):
    load(name, "size=Q")
  with pytest.raises(InputError, match="value of config argument variant"):
    load(name, "variant=private")


@pytest.mark.parametrize("name", FINETUNE)
def test_unknown_source_is_refused(name):
  with pytest.raises(InputError, match="Did you mean 'audiomae'"):
    load(name, "pretrain=audiomea")


def test_commands_of_docstrings_resolve():
  """Also arguments that a docstring names in passing."""
  for name in NAMES:
    docstring = importlib.import_module(f"configs.{name}").__doc__
    command = f"python -m avjax.main --config=configs/{name}.py"
    assert f"\n  {command}" in docstring
    for other, arg in re.findall(r"configs/(\w+)\.py(?::(\S+))?", docstring):
      load(other, arg.rstrip(".,:)"))


@pytest.mark.parametrize("name", NAMES)
def test_demo_changes_only_what_it_says(name):
  """Data, sizes, step counts, and what so few steps learn most with."""
  allowed = (
    r"data\.(name|dir|split|video|audio\.seconds)",
    r"data\.augment\.(scale_jitter|colour|grey|mixup):",
    r"optimizer\.name",
    r"model\.(decoder_)?(width|depth|heads|mlp)",
    r"model\.(mask_video|standardise|patch_audio|drop_path|label_smoothing)",
    r"model\.(fusion_layer|scan|remat|classes)",
    r"(total_epochs|batch_size|log_every|init_from|schedule\.(base_lr|warmup))",
    r"checkpoint\.every_epochs",
    r"evals\.\w+\.(every_epochs|split)",
  )
  if name.startswith(("cavmae", "deteclap", "avsiam", "uavm", "coavt")):
    # Its sizes of masks and turns are in frames; its rate falls by epochs.
    allowed += (
      r"data\.fbank\.frames",
      r"data\.augment\.(freq_size|time_size|roll)",
      r"model\.(group_size|contrast_weight|mask_audio|patch_video)",
      r"optimizer\.(multipliers\.head|average_from)",
      r"schedule\.step_epochs",
    )
  if name.startswith("deteclap"):
    allowed += (
      r"data\.object_scores",
      r"model\.label_weight",
      r"evals\.retrieval\.within",
    )
  if name.startswith("uavm"):
    allowed += (
      r"data\.feature",
      r"model\.(shared_width|tokens)",
      r"evals\.layers\.(per_class|tsne)",
    )
  if name.startswith("coavt"):
    allowed += (
      r"data\.text\.(source|vocabulary|length)",
      r"model\.(projection|vocabulary|queries|dropout|text_)",
      r"evals\.text\.(captions|limit|rerank)",
    )
  full, demo = stages(load(name)), stages(load(name, "demo"))
  for a, b in zip(full, demo, strict=True):
    rows = config_lib.differences(config_lib.plain(a), config_lib.plain(b))
    stray = [row for row in rows if not re.match("|".join(allowed), row)]
    assert stray == []
    assert b.data.name == "av_demo"


# --- What the paper (§4.1) and the released configurations say --------------

PRETRAIN_VALUES = {
  "batch_size": 512,
  "model.size": "L",
  "model.encoder": "mid",
  "model.fusion_layers": 2,
  "model.decoder": "shared",
  "model.objective": "joint",
  "model.standardise": "none",
  "model.patch_video": (2, 16, 16),
  "model.patch_audio": (16, 16),
  "model.mask_video": 0.9,
  "model.mask_audio": 0.5,
  "model.drop_path": 0.0,
  "data.video.num_frames": 16,
  "data.video.stride": 4,
  "data.video.rate": 25.0,
  "data.video.size": 224,
  "data.video.resize": 256,
  "data.audio.rate": 16_000,
  "data.audio.seconds": 8.0,
  "data.audio.start": "aligned",
  "data.fbank.window": "hamming",
  "data.fbank.num_mels": 128,
  "data.fbank.frame_ms": 25.0,
  "data.fbank.hop_ms": 10.0,
  "data.augment.flip": 0.5,
  "data.augment.mixup": 0.0,
  "optimizer.name": "adam",
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.95,
  "optimizer.eps": 1e-8,
  "optimizer.weight_decay": 0.05,
  "optimizer.clip_norm": 0.0,
  "schedule.name": "cosine",
  "schedule.lr_batch": 256,
  "schedule.warmup_epochs": 4.0,
  "seed": 42,
}
FINETUNE_VALUES = {
  "total_epochs": 50.0,
  "model.size": "L",
  "model.fusion": "mbt",
  "model.n_bottlenecks": 4,
  "model.classifier": "gap",
  "model.label_smoothing": 0.3,
  "model.drop_path": 0.3,
  "model.audio_channels": 1,
  "data.audio.start": "aligned",
  "data.audio.rate": 16_000,
  "data.video.size": 224,
  "data.augment.flip": 0.5,
  "data.augment.scale_jitter": (0.9, 1.33),
  "data.augment.colour": 0.8,
  "data.augment.grey": 0.1,
  "data.augment.time_masks": 0,
  "data.augment.time_size": 48,
  "data.augment.time_shift": False,
  "data.augment.mixup": 0.5,
  "data.augment.mixup_per_modality": True,
  "optimizer.name": "sgd",
  "optimizer.momentum": 0.9,
  "optimizer.weight_decay": 0.0,
  "optimizer.clip_norm": 1.0,
  "optimizer.layer_decay": 0.75,
  "schedule.name": "cosine",
  "schedule.base_lr": 0.8,
  "schedule.lr_batch": 64,
  "schedule.warmup_epochs": 2.5,
}
CLIPS = {
  "data.video.num_frames": 32,
  "data.video.stride": 2,
  "data.video.rate": 25.0,
  "data.audio.seconds": 8.0,
  "evals.test.views": 4,
}
SINGLE = {
  "batch_size": 64,
  "model.fusion_layer": 16,
  "data.augment.freq_masks": 1,
  "data.augment.freq_size": 48,
  "data.multilabel": False,
}
VALUES = {
  "avmae_vgg": {
    **PRETRAIN_VALUES,
    "total_epochs": 800.0,
    "data.name": "vggsound",
    "data.split": "train",
    "schedule.base_lr": 1.5e-4,
  },
  "avmae_audioset": {
    **PRETRAIN_VALUES,
    "total_epochs": 80.0,
    "data.name": "audioset",
    "data.split": "train_2m",
    "schedule.base_lr": 3e-4,
  },
  "avmae_vgg_finetune": {
    **FINETUNE_VALUES,
    **CLIPS,
    **SINGLE,
    "data.name": "vggsound",
    "data.heads": ("label",),
    "evals.test.every_epochs": 5.0,
    "checkpoint.best": "test/top1",
  },
  "avmae_audioset_finetune": {
    **FINETUNE_VALUES,
    **CLIPS,
    "batch_size": 128,
    "model.fusion_layer": 18,
    "data.name": "audioset",
    "data.split": "train_500k",
    "data.multilabel": True,
    "data.augment.freq_masks": 2,
    "data.augment.freq_size": 36,
    "evals.test.split": "eval",
    "evals.test.every_epochs": 1.0,
    "checkpoint.best": "test/mAP",
  },
  "avmae_epic_finetune": {
    **FINETUNE_VALUES,
    **CLIPS,
    **SINGLE,
    "data.name": "epic_kitchens",
    "data.heads": ("noun", "verb"),
    "evals.test.split": "validation",
    "checkpoint.best": "test/action_top1",
  },
  "avmae_ave_finetune": {
    **FINETUNE_VALUES,
    **SINGLE,
    "data.name": "ave",
    "data.heads": ("segment",),
    "data.video.num_frames": 20,
    "data.video.rate": 2.0,
    "data.audio.seconds": 10.0,
    "checkpoint.best": "test/segment_accuracy",
  },
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_the_paper(name):
  config = stages(load(name))[0]
  found = {path: value(config, path) for path in VALUES[name]}
  assert found == VALUES[name]


PUBLIC_VALUES = {
  "avmae_vgg": {
    "total_epochs": 400.0,
    "model.encoder": "separate",
    "data.audio.start": "wrap",
    "data.fbank.mean": 0.0,
    "data.fbank.std": 1.0,
  },
  "avmae_audioset": {
    "total_epochs": 120.0,
    "model.encoder": "mid",
    "model.mask_audio": 0.7,
    "data.audio.seconds": 10.0,
    "data.audio.start": "wrap",
  },
  "avmae_vgg_finetune": {
    "model.audio_channels": 3,
    "data.audio.start": "wrap",
    "data.fbank.std": 1.0,
  },
  "avmae_audioset_finetune": {
    "model.audio_channels": 1,
    "data.audio.seconds": 10.0,
    "data.audio.start": "wrap",
    "data.augment.time_shift": True,
    "data.fbank.mean": 1.102,
    "data.fbank.std": 2.762,
  },
}


@pytest.mark.parametrize("name", PUBLIC_VALUES)
def test_values_of_the_released_configurations(name):
  config = stages(load(name, "variant=public"))[0]
  found = {path: value(config, path) for path in PUBLIC_VALUES[name]}
  assert found == PUBLIC_VALUES[name]


def test_size_of_the_learning_rate_follows_the_batch():
  config = load("avmae_audioset_finetune")
  rate = config.schedule.base_lr * config.batch_size / config.schedule.lr_batch
  assert rate == pytest.approx(1.6)


def test_second_stage_follows_the_first():
  for name in PRETRAIN:
    config = load(name, "size=B,modality=a,variant=public")
    assert config.stages == ("pretrain", "finetune")
    assert config.pretrain.model.modality == "a"
    assert config.finetune.model.modality == "av"
    assert config.finetune.model.size == "B"
    assert config.finetune.data.audio.start == "wrap"
    assert config.finetune.init_from == "previous"


@pytest.mark.parametrize(
  "arg, path",
  [
    ("", "runs/avmae_vgg/pretrain"),
    ("size=B", "runs/avmae_vgg-size_B/pretrain"),
    ("pretrain=audioset", "runs/avmae_audioset/pretrain"),
    (
      "size=B,pretrain=twomaes",
      "audio:runs/avmae_vgg-size_B-modality_a/pretrain,"
      "video:runs/avmae_vgg-size_B-modality_v/pretrain",
    ),
    ("demo", ""),
  ],
)
def test_sources_are_default_folders(arg, path):
  assert load("avmae_vgg_finetune", arg).init_from == path


# Public totals: the authors' modules, by arithmetic and by running them.
@pytest.mark.parametrize(
  "name, arg, count",
  [
    ("avmae_vgg", "size=B,encoder=early", 94_813_696),
    ("avmae_vgg", "size=B,encoder=shared", 94_813_696),
    ("avmae_vgg", "size=B", 165_695_488),
    ("avmae_vgg", "size=B,encoder=separate", 179_869_696),
    ("avmae_vgg", "encoder=early", 318_728_960),
    ("avmae_vgg", "", 595_849_984),
    ("avmae_vgg", "variant=public", 621_040_384),
    ("avmae_audioset", "", 595_849_984),
    ("avmae_vgg_finetune", "size=B", 171_728_949),
    ("avmae_vgg_finetune", "", 606_778_677),
    ("avmae_audioset_finetune", "size=B", 171_896_591),
    ("avmae_audioset_finetune", "", 607_002_127),
  ],
)
def test_parameters_at_full_size(name, arg, count):
  assert parameters(stages(load(name, arg))[0]) == count


# Heads of 397 and 29 outputs in the place of 309.
@pytest.mark.parametrize(
  "name, outputs",
  [("avmae_epic_finetune", 300 + 97), ("avmae_ave_finetune", 29)],
)
def test_parameters_follow_the_heads(name, outputs):
  expected = 606_778_677 + (outputs - 309) * (1024 + 1)
  assert parameters(load(name)) == expected


@pytest.mark.parametrize("name", FINETUNE)
@pytest.mark.parametrize("modality", ["a", "v"])
def test_one_modality_is_a_plain_vit(name, modality):
  """24 blocks, one embedding, LayerNorm and head; no bottleneck."""
  config = load(name, f"modality={modality}")
  classes = sum(mbt.MBT(config).classes.values())
  blocks, d = 24 * 12_596_224, 1024
  patch = {"a": 256, "v": 1536}[modality]
  embed, norm, head = (patch + 1) * d, 2 * d, (d + 1) * classes
  assert parameters(config) == blocks + embed + norm + head
