"""Config arguments, the keys that every config has, and stages.

A config is `get_config(arg)` in `configs/`. The argument follows the file's
name after a colon: `configs/avmae_vgg.py:demo,encoder=early`.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from avjax.errors import InputError, unknown

# Every key that an argument may use, in any config.
ARGUMENTS = (
  "demo",
  "size",
  "modality",
  "encoder",
  "decoder",
  "objective",
  "variant",
  "threshold_audio",
  "threshold_video",
  "shared_layers",
  "shared_width",
  "lambda_audio",
  "queries",
  "mask_audio",
  "mask_video",
  "pretrain",
  "epochs",
)


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Reads `key=value,…`; a bare key means true.

  Args:
    arg: the text after the colon, may be empty or None.
    **defaults: the keys this config knows; values take the default's type.
      `demo=False` is always known.

  Raises:
    InputError: an unknown key (the nearest is named), a repeated key, or a
      value that does not fit the default's type.
  """
  defaults = {"demo": False, **defaults}
  stray = set(defaults) - set(ARGUMENTS)
  if stray:
    raise unknown("config argument", min(stray), ARGUMENTS)
  values = dict(defaults)
  seen = set()
  for part in filter(None, (p.strip() for p in (arg or "").split(","))):
    key, equals, text = part.partition("=")
    if key not in defaults:
      raise unknown("config argument", key, defaults)
    if key in seen:
      raise InputError(f"config argument {key!r} is given twice in {arg!r}")
    seen.add(key)
    values[key] = _convert(key, text if equals else "true", defaults[key])
  return ConfigDict(values)


def _convert(key: str, text: str, default: Any) -> Any:
  if isinstance(default, bool):
    if text.lower() in ("true", "1", "false", "0"):
      return text.lower() in ("true", "1")
    raise InputError(f"config argument {key}={text!r} is not true or false")
  try:
    return type(default)(text)
  except ValueError as error:
    kind = type(default).__name__
    raise InputError(f"config argument {key}={text!r} is not {kind}") from error


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
  """`table[name]` for a config argument; see `avjax.errors.lookup`."""
  if name not in table:
    raise unknown(f"value of config argument {key}", name, table)
  return table[name]


def with_overrides(
  values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> ConfigDict:
  """`config.model` of a method: its default values, some of them replaced.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  model = ConfigDict(dict(values))
  for key, value in overrides.items():
    if key not in model:
      raise unknown("key of model", key, model)
    model[key] = value
  return model


def parse_variants(
  arg: str | None,
  variants: Mapping[str, Mapping[str, Any]],
  demo: Mapping[str, Any],
) -> ConfigDict:
  """`parse_arg` where defaults depend on `variant` and `demo`.

  Args:
    arg: the text after the colon.
    variants: value of `variant` -> all defaults; each has the same keys.
    demo: defaults that hold instead where `demo` is given.

  Raises:
    InputError: as `parse_arg`; an unknown variant.
  """
  first = parse_arg(arg, **next(iter(variants.values())))
  defaults = choose(variants, first.variant, "variant")
  return parse_arg(arg, **{**defaults, **(demo if first.demo else {})})


def base_config() -> ConfigDict:
  """The keys that every config has, with neutral values.

  A config sets what its paper says. Anything not here or in `model` is
  refused, so a misspelt key never passes silently.
  """
  return ConfigDict(
    {
      "seed": 42,
      # One of the two is positive. An epoch is the built split's size.
      "total_steps": 0,
      "total_epochs": 0.0,
      "batch_size": 512,  # global
      "dtype": "float32",  # of the computation; parameters are float32
      "grad_cache": 0,  # examples encoded at a time; 0 = the whole batch
      "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
      "method": "",
      "model": {},
      "data": data_section(),
      "optimizer": {
        "name": "adam",  # adam, adam_l2 (coupled), sgd
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "clip_norm": 0.0,  # 0 = none
        "layer_decay": 1.0,
        "multipliers": {},  # parameter group -> factor of the learning rate
        "accumulate": 1,  # micro-batches per step
        "average": "none",  # none, ema, epochs (mean of epoch checkpoints)
        "ema_decay": 0.9999,
        "average_from": 1,  # first epoch of `epochs`
      },
      "schedule": {
        "name": "cosine",  # cosine, constant, step
        "base_lr": 1e-3,
        "lr_batch": 0,  # lr = base_lr * batch_size / lr_batch; 0 = base_lr
        "end_lr": 0.0,  # `cosine`: the last rate, scaled as base_lr is
        "warmup_steps": 0,
        "warmup_epochs": 0.0,
        "step_epochs": (),  # `step`: epochs at which lr *= step_factor
        "step_factor": 0.5,
      },
      "evals": {},  # name -> see eval_section
      "checkpoint": {
        "every_steps": 0,
        "every_epochs": 1.0,
        "keep": 2,
        "best": "",  # metric whose best checkpoint is kept too
        "best_mode": "max",
      },
      # '' = random initialisation; a workdir, checkpoint or weights file; or
      # `audio:PATH,video:PATH`. In a staged run 'previous' is the stage before.
      "init_from": "",
      "log_every": 50,
      "stages": (),
    }
  )


# Of the computation: `config.dtype`.
DTYPES = ("float32", "bfloat16")
# That a run reads: `config.data.modality`.
TRACKS = ("a", "v", "av")

# Log-mel, computed on the device: `config.data.fbank`.
FBANK = {
  "window": "hamming",  # hamming, hanning
  "num_mels": 128,
  "low_hz": 20.0,
  "high_hz": 0.0,  # 0 = half the rate
  "preemphasis": 0.97,
  "remove_dc": True,
  "frame_ms": 25.0,
  "hop_ms": 10.0,
  # `same`: seconds*100 frames, the last ones padded with zeros;
  # `snip`: Kaldi's whole frames only.
  "edges": "same",
  # Of `snip`: raw log-mel is cut to this length or padded with 0, before it is
  # normalised, so padding becomes -mean / std. 0 = as long as the waveform.
  "frames": 0,
  "remove_mean": False,  # of the whole waveform, over its true length
  "mean": 0.0,
  "std": 1.0,
}

# What is done to training clips: `config.data.augment`. All off.
AUGMENT = {
  "flip": 0.0,  # probability
  "random_crop": True,
  "scale_jitter": (1.0, 1.0),  # height and width drawn apart
  "colour": 0.0,  # probability
  "grey": 0.0,  # probability
  "freq_masks": 0,
  "freq_size": 0,  # bins at most
  "time_masks": 0,
  "time_size": 0,  # frames at most
  # What masked cells become: `normalised` = 0, the mean; `raw` = what 0 in the
  # raw log-mel becomes, -mean / std; spans then start by torchaudio's rule.
  "mask_value": "normalised",
  "time_shift": False,  # circular, uniform over the whole length
  "noise": 0.0,  # + noise * u * U[0, 1) in each cell, one u in [0, 1) a clip
  "roll": 0,  # frames, circular: uniform in -roll .. roll - 1
  "mixup": 0.0,  # alpha of Beta(alpha, alpha)
  "mixup_per_modality": False,
  # 1 = one weight per step for all. Below, or with `mixup_waveform`: whether an
  # example is mixed and its weight are drawn for each example, one weight for
  # all modalities.
  "mixup_probability": 1.0,
  "mixup_waveform": False,  # mix waveforms (means removed), not log-mel
}


# What batches hold of captions: `config.data.text`.
TEXT = {
  "vocabulary": "",  # av_demo, a vocab.txt or a tokenizer.json; '' = no text
  "length": 32,  # tokens, [CLS] and [SEP] among them; longer texts are cut
  "source": "captions",  # `labels`: names of the classes, joined by ", "
  "lower": True,  # lower case without accents; of a vocab.txt alone
}

# The built-in data set: `config.data.demo`.
DEMO = {
  "clips_per_class": 40,
  "test_per_class": 10,
  "seed": 0,
  # Of object_scores='truth': share of present objects that score below 0.5, and
  # of absent ones that score above.
  "missed": 0.3,
  "imagined": 0.005,
}


FILES = {
  "seconds": 3_600.0,
  "pixels": 8_192 * 8_192,
  "frames": 100_000,
  "gigabytes": 8.0,  # of decoded frames
  "channels": "mean",  # first
}


def data_section() -> ConfigDict:
  """`config.data`: which clips, how they are cut and what is done to them."""
  return ConfigDict(
    {
      "name": "av_demo",
      "dir": "",  # '' = $AVJAX_DATA or ~/avjax_data
      "variant": "video",
      "split": "train",
      # Trained on instead of `name` and `split`: 'name:split:weight', ….
      "mixture": (),
      "heads": ("label",),  # label heads to read
      "multilabel": False,
      "modality": "av",  # which tracks to read: a, v or av
      "video": {
        "num_frames": 16,
        "rate": 25.0,  # frames/s that `stride` counts in
        "stride": 4,
        "resize": 256,  # short side before the crop
        "size": 224,  # of the crop
        "mean": (0.5, 0.5, 0.5),  # of values in 0..1: (x - mean) / std
        "std": (0.5, 0.5, 0.5),
      },
      "audio": {
        "rate": 16_000,
        "seconds": 8.0,
        # Where the sound starts against the frames in training: `aligned`
        # (same time, moved back if the track is too short, never wrapped),
        # `wrap` (same time, wrapped around: the public AV-MAE code),
        # `independent`.
        "start": "aligned",
      },
      "fbank": FBANK,
      "augment": AUGMENT,
      "sampling": "shuffle",  # shuffle, balanced
      "workers": 0,  # processes; 0 = threads of this one
      "threads": 2,
      "prefetch": 2,  # batches on the device
      "limit": 0,  # first clips of the split only; 0 = all
      # Folder of object scores to train on, see avjax.data.object_scores;
      # `truth` stands for av_demo's own objects.
      "object_scores": "",
      # Folder of stored features, see avjax.data.features; '' = none. With it a
      # batch has neither frames nor sound. `demo` stands for av_demo's own.
      "features": "",
      "feature_frames": 30,  # tokens of a clip, with zeros if it has fewer
      "feature_width": 1024,
      # Captions as token ids, see avjax.data.text: `text` and `text_mask`.
      "text": TEXT,
      # File of ids that never enter training, see avjax.data.id_list.
      "exclude": "",
      # One's own media files (avjax.load, avjax.embed): what one may make the
      # decoder do (avjax.data.media.Limits), and what becomes of its channels.
      "files": FILES,
      "demo": DEMO,
    }
  )


# Options of single evaluators, with the values that they have by themselves.
EVAL_OPTIONS: dict[str, dict[str, Any]] = {
  # mode: '' = the method's main one.
  "captions": {
    "captions": 5, "mode": "", "beams": 3, "length_penalty": 1.0,
    "pictures": 8,
  },
  # modes: () = the method's main one; average: logits, probabilities.
  "classification": {"modes": (), "average": "logits"},
  # See avjax/evaluators/layers.py.
  "layers": {"per_class": 0, "published_maps": False, "tsne": 0},
  # names: () = all embeddings; limits: 0 = the whole split.
  "linear_probe": {
    "train_split": "train", "train_limit": 0, "names": (),
    "inverse_l2": 1.0, "iterations": 1_000,
  },
  "reconstruction": {"pictures": 4},
  "retrieval": {"subset": "", "within": "", "pictures": 0},
  # modes: () = all; rerank: candidates, 0 = none; match_batch: pairs at a time.
  "text_retrieval": {
    "captions": 5, "modes": (), "rerank": 128, "rerank_add": True,
    "match_batch": 256, "subset": "", "pictures": 0,
  },
}  # fmt: skip


def eval_section(kind: str, **options: Any) -> ConfigDict:
  """One entry of `config.evals`.

  Args:
    kind: name in `avjax.evaluators.EVALUATORS`.
    **options: `split`, `every_epochs` (0 = only at the end), `batch_size`
      (0 = the training one), `views`, `captions` (texts of each clip to read,
      0 = none), and what the evaluator adds.
  """
  section = ConfigDict(
    {
      "type": kind,
      "split": "test",
      "every_epochs": 0.0,
      "batch_size": 0,
      "views": 1,
      "limit": 0,
      "captions": 0,
      **EVAL_OPTIONS.get(kind, {}),
    }
  )
  for key, value in options.items():
    section[key] = value
  return section


def staged(**stages: ConfigDict) -> ConfigDict:
  """A run of several stages in order, each in `workdir/<stage>/`.

  The stages' `seed`, `mesh`, `dtype` and `data.dir` are references to keys at
  the top, so `--config.seed=1` reaches all; `--config.<stage>.key` reaches
  one. A stage after the first starts from the one before it.
  """
  names = tuple(stages)
  first = stages[names[0]]
  config = ConfigDict(
    {
      "stages": names,
      "seed": first.seed,
      "dtype": first.dtype,
      "mesh": first.mesh.to_dict(),
      "data_dir": "",
    }
  )
  for position, (name, stage) in enumerate(stages.items()):
    stage.seed = config.get_ref("seed")
    stage.dtype = config.get_ref("dtype")
    for axis in ("data", "fsdp", "tensor"):
      stage.mesh[axis] = config.mesh.get_ref(axis)
    stage.data.dir = config.get_ref("data_dir")
    if position and not stage.init_from:
      stage.init_from = "previous"
    config[name] = stage
  return config


def plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """The config as JSON types; tuples become lists, references their values."""
  if isinstance(config, ConfigDict):
    config = config.copy_and_resolve_references().to_dict()
  return json.loads(json.dumps(config))


def from_plain(values: Mapping[str, Any]) -> ConfigDict:
  """The inverse of `plain`: a locked config, lists back to tuples.

  It is `completed`.
  """

  def convert(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {k: convert(v) for k, v in value.items()}
    if isinstance(value, list):
      return tuple(convert(v) for v in value)
    return value

  return ConfigDict(convert(completed(values))).lock()


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
  """A plain config with neutral values where an earlier version had no key."""
  if values.get("stages"):
    stages = {name: completed(values[name]) for name in values["stages"]}
    return {**values, **stages}
  return _filled(values, plain(base_config()))


def _filled(
  values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  filled = {**defaults, **values}
  for key, default in defaults.items():
    if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
      filled[key] = _filled(filled[key], default)
  return filled


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[str]:
  """`key: old -> new` for every leaf in which two plain configs differ."""
  rows = []
  for key in sorted({*old, *new}):
    a, b = old.get(key, "absent"), new.get(key, "absent")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      rows += differences(a, b, f"{prefix}{key}.")
    elif a != b:
      rows.append(f"{prefix}{key}: {a!r} -> {b!r}")
  return rows
