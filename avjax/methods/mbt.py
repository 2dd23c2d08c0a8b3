"""The classifier that AV-MAE fine-tunes: MBT, or the pretraining encoder.

Audiovisual Masked Autoencoders, arXiv:2212.05922, §4.1 "Finetuning"; MBT is
arXiv:2107.00135, its streams and bottleneck are in `avjax/nn/streams.py`. What
the papers leave open follows the authors' public code:

- one head serves both modalities; each modality has its own logits, its own
  mixup weight and its own loss, and the prediction is the mean of the logits;
- labels are smoothed after mixup, multi-hot ones too;
- stochastic depth does not rescale the branches that it keeps.

A modality that an example lacks (`has_audio`, `has_video`) takes no part: the
logits, the loss and the bottleneck are those of the other modality alone.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from avjax import losses
from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.methods.base import Inputs, Loaded, Method, ParamInfo, Params
from avjax.nn import av_encoder, heads, masking, sizes, streams
from avjax.nn.av_encoder import INPUTS, MODALITIES, Keep, Tokens
from avjax.nn.transformer import stack_layers
from avjax.weights import transfer

MODES = {"av": ("av", "a", "v"), "a": ("av", "a"), "v": ("av", "v")}
CHOICES = {
  "fusion": ("mbt", *av_encoder.KINDS),
  "classifier": ("gap", "token"),
  "positions": ("sinusoid_1d", "learned_1d", "none"),
}


def default_model(size: str = "L", **overrides: Any) -> ConfigDict:
  """`config.model`: every key, with the paper's values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    "size": size,  # Ti, S, B, L, H
    # 0 = as the size says.
    **dict.fromkeys(("width", "depth", "heads", "mlp"), 0),
    "patch_video": (2, 16, 16),  # t, h, w
    "patch_audio": (16, 16),  # time, mel
    "audio_channels": 1,  # 3 = the spectrogram thrice (public, VGGSound)
    "modality": "av",  # a, v: a plain ViT
    # mbt, or the encoder that was pretrained: early, separate, shared, mid.
    "fusion": "mbt",
    "fusion_layers": 2,  # S of mid
    "fusion_layer": -1,  # first of mbt; -1 = 2/3 of the depth: B 8, L 16
    "use_bottleneck": True,  # False = attention across all tokens
    "n_bottlenecks": 4,  # one more with `token` (public)
    "test_with_bottlenecks": True,
    "share_encoder": False,  # one set of blocks for both streams
    "classifier": "gap",  # token = a CLS per modality
    "positions": "sinusoid_1d",  # learned_1d (original MBT), none
    "modality_tokens": False,
    "classes": {},  # by head; empty = the data set's
    "segments": 0,  # of the segment head; 0 = one per second of the clip
    "label_smoothing": 0.3,  # public
    "drop_path": 0.3,  # public
    "scan": False,
    "remat": "none",  # see avjax.nn.transformer.REMAT
    "attention": "auto",  # see avjax.nn.attention.IMPLEMENTATIONS
  }
  return with_overrides(values, overrides)


class MBT(Method):
  """Fine-tuning; `config.model` as `default_model` has it.

  `predict` in mode 'av' uses what there is; in modes 'a' and 'v' a model of
  two modalities runs one stream by itself and takes its logits.
  """

  def __init__(self, config: Any):
    super().__init__(config)
    self.model = check(config.model)
    self.modalities = MODALITIES[self.model.modality]
    self.modes = MODES[self.model.modality]
    self.size = sizes.resolve(self.model)
    self.num_layers = self.size.depth
    self.classes = heads.classes(config)
    if "segment" in self.classes and self.model.classifier != "gap":
      raise InputError("the segment head goes with model.classifier='gap'")

  # --- 4.1 Finetuning: the encoder ---

  def encoder(self) -> streams.Streams | av_encoder.AVEncoder:
    """MBT's streams, or the structure that was pretrained."""
    model, depth = self.model, self.size.depth
    common = {
      "size": self.size,
      "positions": model.positions,
      "modality_tokens": model.modality_tokens,
    }
    stack = {k: model[k] for k in ("attention", "remat", "scan")}
    if model.fusion != "mbt":
      both = len(self.modalities) == 2
      return av_encoder.AVEncoder(
        kind=model.fusion if both else "shared",
        fusion_layers=model.fusion_layers,
        stack=stack,
        **common,
      )
    first, cls = model.fusion_layer, model.classifier == "token"
    return streams.Streams(
      fusion_layer=2 * depth // 3 if first == -1 else first,
      bottlenecks=(model.n_bottlenecks + cls) * model.use_bottleneck,
      shared=model.share_encoder,
      cls=cls,
      **stack,
      **common,
    )

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; the head starts at zero."""
    patches, encoder = self.patches(inputs, self.modalities), self.encoder()
    if self.model.fusion == "mbt":
      params = encoder.init(rng, patches)
    else:
      plain = encoder.clone(stack={**encoder.stack, "scan": False})
      params = plain.init(rng, patches)["params"]
    return {**params, "head": heads.init(self.size.width, self.classes)}

  def patches(self, inputs: Inputs, names: tuple[str, ...]) -> Tokens:
    """Raw patches of modalities `names` in the dtype of the computation."""
    for m in names:
      if INPUTS[m] not in inputs:
        raise InputError(f"the inputs have no {INPUTS[m]!r} for the {m} stream")
    cut = av_encoder.patches(inputs, self.model)
    cut = {m: cut[m].astype(self.config.dtype) for m in names}
    if "audio" in cut and self.model.audio_channels > 1:
      cut["audio"] = jnp.repeat(cut["audio"], self.model.audio_channels, -1)
    return cut

  def encode(
    self,
    params: Params,
    inputs: Inputs,
    *,
    mode: str = "av",
    train: bool = False,
    keep: Keep | None = None,
  ) -> dict[str, Any]:
    """All tokens through the encoder.

    Args:
      params, inputs: as everywhere.
      mode: one of `modes`.
      train: False obeys `test_with_bottlenecks`.
      keep: stochastic depth, of `encoder().draw_keep`.

    Returns:
      'tokens' {modality: [b n d]} after the last LayerNorm, the CLS first;
      'bottleneck' [b q d] or None.
    """
    lookup(dict.fromkeys(self.modes), mode, "mode of predict")
    names = self.modalities if mode == "av" else MODALITIES[mode]
    patches, has = self.patches(inputs, names), streams.presence(inputs, names)
    model, encoder = self.model, self.encoder()
    params = stack_layers(params) if model.scan else params
    fuse = train or model.test_with_bottlenecks or not model.use_bottleneck
    fuse = fuse and len(self.modalities) == 2

    def run(patches: Tokens) -> tuple[Tokens, Any]:
      if model.fusion == "mbt":
        return encoder(params, patches, keep, has, fuse)
      return encoder.apply({"params": params}, patches, keep), None

    bottle = model.fusion == "mbt" and model.use_bottleneck
    if has is None or bottle or model.fusion in ("separate", "shared"):
      tokens, bottleneck = run(patches)
      return {"tokens": tokens, "bottleneck": bottleneck}
    tokens = streams.alone_where_lacking(lambda x: run(x)[0], patches, has)
    return {"tokens": tokens, "bottleneck": None}

  # --- Heads and objective ---

  def logits(
    self, params: Params, tokens: Tokens, inputs: Inputs
  ) -> dict[str, Float[Array, "b *_"]]:
    """By modality, [b k] of all heads or [b t k] of the segment head."""
    return {
      m: heads.project(params["head"], self.pool(m, x, inputs))
      for m, x in tokens.items()
    }

  def pool(
    self, m: str, x: Float[Array, "b n d"], inputs: Inputs
  ) -> Float[Array, "b *_"]:
    """What the head reads: CLS, mean of the tokens, or heads.segments."""
    x = x.astype(jnp.float32)
    if self.model.classifier == "token":
      return x[:, 0]
    if "segment" not in self.classes:
      return x.mean(1)
    return heads.segments(
      x,
      heads.segments_of(self.config),
      span=self.model[f"patch_{m}"][0],
      length=inputs[INPUTS[m]].shape[1],
    )

  def loss(
    self,
    params: Params,
    inputs: Inputs,
    rng: jax.Array,
    step: jax.Array,
    keep: Keep | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The mean over heads, over an example's modalities, over examples.

    Args:
      params: of `init`.
      inputs: with labels, and `mix/audio`, `mix/video` where mixed.
      rng: of this step.
      step: of no effect.
      keep: stochastic depth instead of drawn patterns.
    """
    keep = self.draw_keep(inputs, rng) if keep is None else keep
    tokens = self.encode(params, inputs, train=True, keep=keep)["tokens"]
    logits = self.logits(params, tokens, inputs)
    terms = {
      m: losses.multi_head(
        heads.split(x, self.classes),
        heads.labels(inputs, self.classes, m),
        self.model.label_smoothing,
        multilabel=self.config.data.multilabel,
      )
      for m, x in logits.items()
    }
    ones = jnp.ones(len(tokens[self.modalities[0]]), bool)
    valid = inputs.get("valid", ones)
    has = {m: valid & inputs.get(f"has_{m}", ones) for m in terms}
    some = jnp.stack(list(has.values())).any(0)
    loss = losses.weighted_mean(streams.mean(terms, has), some)
    metrics = {
      f"loss_{m}": losses.weighted_mean(x, has[m]) for m, x in terms.items()
    }
    named = {f"logits/{m}": x for m, x in logits.items()}
    return loss, {"metrics": metrics, "intermediates": named}

  def draw_keep(self, inputs: Inputs, rng: jax.Array) -> Keep | None:
    """Patterns of stochastic depth, one key per example."""
    keys = masking.draw_keys(inputs, rng)
    return self.encoder().draw_keep(keys, self.modalities, self.model.drop_path)

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """See `Method.predict`: the mean of the logits of an example's modalities.

    Modes 'a' and 'v' ask for one modality, whatever the example has.
    """
    tokens = self.encode(params, inputs, mode=mode)["tokens"]
    logits = self.logits(params, tokens, inputs)
    has = streams.presence(inputs, tuple(logits))
    return heads.split(streams.mean(logits, has), self.classes)

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """The mean of a modality's tokens, or its CLS, after the encoder.

    Returns:
      'video' and 'audio' [b d], and 'av', the mean of those that an example
      has; not normalised.
    """
    tokens = self.encode(params, inputs)["tokens"]
    cls = self.model.classifier == "token"
    tokens = {m: x.astype(jnp.float32) for m, x in tokens.items()}
    pooled = {m: x[:, 0] if cls else x.mean(1) for m, x in tokens.items()}
    has = streams.presence(inputs, self.modalities)
    both = {"av": streams.mean(pooled, has)} if len(pooled) == 2 else {}
    return {**pooled, **both}

  # --- 4.1 Finetuning: how a pretrained encoder becomes this model's ---

  def param_info(self, path: str) -> ParamInfo:
    """Layer 0: patches, positions, modality tokens, first modality's CLS.

    Block i is layer i+1 (the joint blocks of mid-fusion come last); all else
    is the last layer: norms, bottleneck, head, and, as in the public code, the
    CLS of the second modality.
    """
    stack, _, rest = path.partition("/")
    layer = self.num_layers + 1
    cls = f"cls_{self.modalities[0]}"
    if stack.startswith(("embed_", "positions_", "modality_token_", cls)):
      layer = 0
    elif rest.startswith("block_"):
      joint = stack == "encoder_joint"
      offset = self.num_layers - self.model.fusion_layers if joint else 0
      layer = offset + int(rest.split("/")[0].removeprefix("block_")) + 1
    return ParamInfo(layer, decay=path.endswith("kernel"))

  def adapt(
    self, params: Params, source: Params, source_config: Mapping[str, Any]
  ) -> Loaded:
    """See `Method.adapt`; the rules are those of `transfer.av_encoder`.

    Sources are AV-MAE with any encoder, AudioMAE or VideoMAE for both streams
    (table 3) or one for each ("Additional baseline"), and MBT, as the names of
    their parameters tell. A head, bottleneck or position table of another size
    is missing here and unused there.
    """
    return transfer.fill(
      params,
      source,
      transfer.av_encoder(params, source),
      reshape={"embed_audio/kernel": transfer.channels},
      optional=("head/", "bottleneck", "positions_"),
    )


def check(model: Any) -> Any:
  """The section, if its values fit together.

  Raises:
    InputError: names the key, its value and what is possible.
  """
  lookup(MODALITIES, model.modality, "model.modality")
  for key, known in CHOICES.items():
    lookup(dict.fromkeys(known), model[key], f"model.{key}")
  first, depth = model.fusion_layer, sizes.resolve(model).depth
  if not -1 <= first <= depth:
    raise InputError(f"model.fusion_layer {first} is not in 0..{depth}")
  for key, only in (("classifier", "gap"), ("audio_channels", 1)):
    if model.fusion != "mbt" and model[key] != only:
      raise InputError(
        f"model.fusion={model.fusion!r} goes with model.{key}={only!r}, "
        f"not {model[key]!r}"
      )
  return model
