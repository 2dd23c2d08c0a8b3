"""Which family of public checkpoints a file is of, and what becomes of it.

A family is told by the names in the file. `load` brings any of them, and our
own files, to one form: parameters under the house's names (of an image model:
an image tree), what is kept aside, and the config that goes with them.
"""

import dataclasses
import difflib
import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from avjax import config as config_lib
from avjax import trees
from avjax.errors import InputError, lookup
from avjax.nn import sizes
from avjax.weights import (
  ast,
  avsiam,
  bert,
  cavmae,
  class_lists,
  convnext,
  formats,
  image,
  mae,
  scenic,
  uavm,
  vit,
)

State = Mapping[str, np.ndarray]

HOUSE = "avjax"  # the family of files that `house_arrays` made
ASIDE = "aside/"  # before public names of arrays that are no parameters here
METADATA = "avjax"  # key of a house file's metadata: JSON

_CAVMAE = (
  r"(module\.)?(modality_[av]|pos_embed_[av]|patch_embed_[av]\..+|"
  r"blocks_[avu]\..+|norm(_[av])?\.\w+|mask_token|decoder_.+|mlp_head\..+)"
)
_SCENIC = (
  r"cls|clsspectrogram|bottleneck|(mask_token|Encoder_modality_token)_\w+|"
  r"Decoder_modality_token_\w+|(embedding|posembed_input|decoder_projection|"
  r"output_projection|ProjectionHeadAndClassifier|Decoder)\w*/.+|"
  r"Transformer\w*/(encoderblock_\d+(_spec\w*)?/(LayerNorm_[01]|"
  r"MultiHeadDotProductAttention_0|MlpBlock_0)/.+|(encoder_norm|posembed).+)"
)


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a file holds, in the house's form.

  Attributes:
    family: name in FAMILIES, or HOUSE.
    method: `config.method` that the parameters are of; `image.METHOD` for an
      image model.
    params: nested; the house's names, or an image tree.
    aside: by public name, arrays of the file that are no parameters here.
    config: plain config that the file brings along; None if it has none.
    names: of the file's arrays.
  """

  family: str
  method: str
  params: Any
  aside: Mapping[str, np.ndarray]
  config: dict[str, Any] | None
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Family:
  """How to tell and convert one family.

  Attributes:
    tells: whether a file with these arrays is of the family.
    knows: whether the family uses a name.
    to_house: arrays -> (parameters, aside).
    example: a name that every file of the family has.
  """

  tells: Callable[[State], bool]
  knows: Callable[[str], bool]
  to_house: Callable[[State], tuple[Any, Mapping[str, np.ndarray]]]
  example: str


def _ordered(module: Any, state: State) -> tuple[Any, dict[str, np.ndarray]]:
  params, aside = module.to_house(state)
  return class_lists.class_order(params, to_house=True), aside


def _is_scenic(layout: str, state: State) -> bool:
  inner = "MultiHeadDotProductAttention_0/"
  blocks = any("encoderblock_" in name and inner in name for name in state)
  return blocks and scenic.layout_of(state) == layout


def _scenic(layout: str, example: str) -> Family:
  return Family(
    functools.partial(_is_scenic, layout),
    lambda name: bool(re.fullmatch(_SCENIC, name)),
    lambda state: (scenic.to_house(state, layout=layout), {}),
    example,
  )


def _is_vit(state: State) -> bool:
  torch = "blocks.0.attn.qkv.weight" in state and not mae.is_mae(state)
  return torch or "Transformer/encoderblock_0/LayerNorm_2/scale" in state


FAMILIES = {
  "cavmae": Family(
    lambda state: any(re.match(r"(module\.)?blocks_[avu]\.", n) for n in state),
    lambda name: bool(re.fullmatch(_CAVMAE, name)),
    functools.partial(_ordered, cavmae),
    "blocks_a.0.attn.qkv.weight",
  ),
  "avsiam": Family(
    lambda state: any(
      re.match(r"(module\.)?vit_base\.blocks\.", n) for n in state
    ),
    avsiam.knows,
    avsiam.to_house,
    "vit_base.blocks.0.attn.qkv.weight",
  ),
  "uavm": Family(
    uavm.is_uavm,
    uavm.knows,
    functools.partial(_ordered, uavm),
    "a_trans.blocks.0.attn.qkv.weight",
  ),
  "convnext": Family(
    convnext.is_convnext,
    convnext.knows,
    functools.partial(_ordered, convnext),
    "features.1.0.layer_scale",
  ),
  "mae": Family(
    lambda state: "blocks.0.attn.qkv.weight" in state and mae.is_mae(state),
    lambda name: mae.name_of(name) is not None,
    lambda state: (mae.to_image(state), {}),
    "decoder_blocks.0.attn.qkv.weight",
  ),
  "vit": Family(
    _is_vit,
    lambda name: bool(vit.torch_name(name) or vit.jax_name(name)),
    lambda state: (vit.to_image(state), {}),
    "blocks.0.attn.qkv.weight",
  ),
  "ast": Family(
    ast.is_ast,
    ast.knows,
    lambda state: (ast.to_image(state), {}),
    "v.blocks.0.attn.qkv.weight",
  ),
  "avmae": _scenic("avmae", "decoder_projection_rgb/kernel"),
  "mbt": _scenic("mbt", "ProjectionHeadAndClassifier_0/output_projection/bias"),
  "mbt_original": _scenic(
    "mbt_original", "Transformer/posembed_input/pos_embedding"
  ),
  "bert": Family(
    bert.is_bert,
    bert.knows,
    bert.to_house,
    "bert.encoder.layer.0.attention.self.query.weight",
  ),
}
IMAGE_FAMILIES = ("mae", "vit", "ast")
# Methods of weights that can start a model but are none.
STARTERS = (image.METHOD, bert.METHOD)


def load(path: formats.Path, family: str = "") -> Weights:
  """A file in the house's form.

  Args:
    path: a file of `formats.read`; not a folder.
    family: name in FAMILIES; '' = told by the names.

  Raises:
    InputError: the file cannot be read, is of no known family, or does not
      hold what its family has.
  """
  state, words = formats.read(path), formats.metadata(path)
  if METADATA in words and not family:
    return _own(path, state, words[METADATA])
  name = recognise(state, path, family)
  try:
    params, aside = FAMILIES[name].to_house(state)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error
  method = method_of(name, params)
  return Weights(name, method, params, aside, None, tuple(state))


def recognise(state: State, path: formats.Path, family: str = "") -> str:
  """The family of a file, or the one that is asked for.

  Raises:
    InputError: none fits; says which comes nearest, how many names it knows,
      and the name that is most like one of its own.
  """
  if family:
    wanted = lookup(FAMILIES, family, "family of weights")
    if any(map(wanted.knows, state)):
      return family
  else:
    for name, each in FAMILIES.items():
      if each.tells(state):
        return name
  counts = {
    name: sum(map(each.knows, state))
    for name, each in FAMILIES.items()
    if family in ("", name)
  }
  nearest = max(counts, key=lambda name: counts[name])
  examples = {FAMILIES[name].example: name for name in counts}
  close = [
    (difflib.SequenceMatcher(None, a, b).ratio(), a, b)
    for a in sorted(state)[:200]
    for b in examples
  ]
  _, own, known = max(close)
  raise InputError(
    f"{path} is of no family that can be converted"
    f"{f' as {family!r}' if family else ''}. The nearest is {nearest!r}, which "
    f"knows {counts[nearest]} of its {len(state)} names; its {own!r} is most "
    f"like {known!r} of {examples[known]!r}. Families: {', '.join(FAMILIES)}"
  )


def method_of(family: str, params: Any) -> str:
  """`config.method` of a family's parameters."""
  if family in IMAGE_FAMILIES:
    return image.METHOD
  if family == "cavmae":
    return "cavmae_finetune" if "classifier" in params else "cavmae"
  if family == "avsiam":
    return "avsiam_finetune" if "classifier_av" in params else "avsiam"
  own = ("avmae", "uavm", "convnext", bert.METHOD)
  return family if family in own else "mbt"


# --- Our own files -----------------------------------------------------------


def house_arrays(
  params: Any,
  aside: Mapping[str, np.ndarray],
  config: dict[str, Any] | None,
  family: str,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Arrays and metadata of a file that `load` reads back as they were."""
  arrays = dict(trees.flatten(params))
  arrays |= {ASIDE + name: value for name, value in aside.items()}
  words = {"family": family, "config": config}
  return arrays, {METADATA: json.dumps(words), "format": "pt"}


def _own(path: formats.Path, state: State, text: str) -> Weights:
  words = json.loads(text)
  flat = {n: x for n, x in state.items() if not n.startswith(ASIDE)}
  aside = {
    n.removeprefix(ASIDE): x for n, x in state.items() if n.startswith(ASIDE)
  }
  params, family = trees.unflatten(flat), words["family"]
  method = (words["config"] or {}).get("method") or method_of(family, params)
  return Weights(family, method, params, aside, words["config"], tuple(state))


# --- The config that goes with a file ----------------------------------------


def config_of(weights: Weights) -> dict[str, Any]:
  """The plain config of a model's weights: their own, or as published.

  Sizes and classes are those of the arrays; numbers that arrays do not show,
  such as the heads, are those of the standard size.

  Raises:
    InputError: an image model, no standard size, or no config of that kind;
      says to give --config.
  """
  if weights.config is not None:
    return weights.config
  if weights.family in IMAGE_FAMILIES:
    raise InputError(
      f"the weights are of an image model ({image.describe(weights.params)}): "
      "give --config, the model that they are to start"
    )
  if weights.method == bert.METHOD:
    raise InputError(
      "the weights are of a text encoder, which can start CoAVT's: "
      "init_from=av:PATH,text:PATH, or give --config"
    )
  name, argument = _published(weights)
  try:
    module = importlib.import_module(f"configs.{name}")
  except ModuleNotFoundError as error:
    raise InputError(
      f"configs/{name}.py goes with these weights, but is not importable here: "
      "run from the checkout, or give --config"
    ) from error
  config = stage(module.get_config(argument), weights.method)
  if weights.family == "uavm":
    config.model.update(uavm.public_model(weights.params))
    config.model.classes = {"label": _classes(weights.params)}
  elif weights.family == "convnext":
    config.model.update(convnext.public_model(weights.params))
  else:
    _resize(config.model, weights)
  _say_assumed(name, config)
  if "modality" in config.model:
    config.data.modality = config.model.modality
  if weights.family == "mbt_original":
    _original(config, weights.params)
  if weights.family == "avsiam":
    config.model.update(avsiam.public_model(config.model, weights.params))
  config.init_from = ""
  return config_lib.plain(config)


# Values of CAV-MAE's pretraining that no array shows.
UNSHOWN = (
  *("norm_pix", "masking", "mask_audio", "mask_video", "contrast_weight"),
  *("contrast_two_way", "temperature", "group_size"),
)


def _say_assumed(name: str, config: Any) -> None:
  """Logs what was taken from `configs/<name>.py` as no array shows it."""
  model = config.model
  if config.method == "cavmae_finetune" and model.modality == "av":
    logging.warning(
      "the file holds both branches and is taken for an audiovisual model; "
      "CAV-MAE's files of sound alone hold both, too: convert one of these "
      "with --config=configs/%s.py:modality=a",
      name,
    )
  if config.method == "cavmae":
    logging.info(
      "the file does not show how it was trained; taken from configs/%s.py: "
      "%s. python -m avjax.convert --list shows which public files need "
      "another --config",
      name,
      ", ".join(f"model.{key}={model[key]!r}" for key in UNSHOWN),
    )


def stage(config: Any, method: str) -> ConfigDict:
  """The first stage with that method, resolved and unlocked; '' = the first.

  Raises:
    InputError: no stage has it.
  """
  config = ConfigDict(config.copy_and_resolve_references()).unlock()
  if not config.stages:
    return config
  for name in config.stages:
    if method in ("", config[name].method):
      return config[name]
  raise InputError(f"no stage of {', '.join(config.stages)} is a {method!r}")


def _published(weights: Weights) -> tuple[str, str]:
  """Config file and argument of a family's checkpoint."""
  params, classes = weights.params, _classes(weights.params)
  if weights.method in ("cavmae", "avsiam"):
    return f"{weights.method}_audioset", ""
  finetuned = {
    ("cavmae_finetune", 309): "cavmae_vgg_finetune",
    ("cavmae_finetune", 527): "cavmae_as2m_finetune",
    ("avsiam_finetune", 309): "avsiam_vgg_finetune",
    ("avsiam_finetune", 527): "avsiam_as2m_finetune",
    ("convnext", 309): "uavm_extractor_vgg",
    ("convnext", 527): "uavm_extractor_audioset",
    ("uavm", 309): "uavm_vgg",
    ("uavm", 527): "uavm_audioset",
    ("mbt", 309): "avmae_vgg_finetune",
    ("mbt", 527): "avmae_audioset_finetune",
  }
  if weights.method != "avmae":
    known = {
      k: name for (m, k), name in finetuned.items() if m == weights.method
    }
    if classes not in known:
      raise InputError(
        f"the weights have {classes} classes; configs are known for "
        f"{' and '.join(map(str, known))}: give --config"
      )
    torch = weights.family in ("cavmae", "avsiam", "uavm", "convnext")
    return known[classes], "" if torch else "variant=public"
  both = {"embed_audio", "embed_video"} <= set(params)
  if "encoder_joint" in params or not both:
    return "avmae_audioset", "variant=public"
  if "encoder" in params:
    raise InputError(
      "the names do not tell an early from a shared encoder: give --config"
    )
  return "avmae_vgg", "variant=public"


def _classes(params: Any) -> int:
  names = ("classifier", "classifier_av", "classifier_audio")
  heads = (params[name].get("out") for name in names if name in params)
  head = next(heads, None) or params.get("head") or {}
  return len(head["bias"]) if "bias" in head else 0


def _resize(model: Any, weights: Weights) -> None:
  """Sizes, and what else the arrays of a published model show."""
  params = weights.params
  names = [m for m in ("video", "audio") if f"embed_{m}" in params]
  width = params[f"embed_{names[0]}"]["bias"].shape[0]
  size = next((s for s, x in sizes.SIZES.items() if x.width == width), None)
  if size is None:
    known = ", ".join(f"{s} {x.width}" for s, x in sizes.SIZES.items())
    raise InputError(
      f"the width {width} is of no standard size ({known}): give --config"
    )
  model.size = size
  if "modality" in model:
    model.modality = "av" if len(names) == 2 else names[0][0]
  if "classes" in model:
    model.classes = {"label": _classes(params)}
  if weights.family in ("mbt", "mbt_original") and "audio" in names:
    pixels = model.patch_audio[0] * model.patch_audio[1]
    model.audio_channels = len(params["embed_audio"]["kernel"]) // pixels
  if "bottleneck" in params:
    model.n_bottlenecks = len(params["bottleneck"])
  if "fusion_layer" in model:
    model.fusion_layer = 8 if size == "B" else model.fusion_layer
  if "encoder" in model and len(names) == 2:
    model.encoder = "mid" if "encoder_joint" in params else "separate"


def _original(config: Any, params: Any) -> None:
  """What the original MBT has otherwise: a CLS and learned positions.

  They say how long its clips are; the log-mel's statistics are those of its
  released config.
  """
  model, data = config.model, config.data
  cls = any(name.startswith("cls_") for name in params)
  model.update(positions="learned_1d", classifier="token" if cls else "gap")
  if "bottleneck" in params:
    model.n_bottlenecks = len(params["bottleneck"]) - cls
  data.fbank.update(mean=1.102, std=2.762)
  if "positions_audio" in params:
    bands = data.fbank.num_mels // model.patch_audio[1]
    columns = (len(params["positions_audio"]) - cls) // bands
    hop = data.fbank.hop_ms / 1_000
    data.audio.seconds = columns * model.patch_audio[0] * hop
  if "positions_video" in params:
    side = data.video.size // model.patch_video[1]
    tubelets = (len(params["positions_video"]) - cls) // side**2
    data.video.num_frames = tubelets * model.patch_video[0]
