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
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from avjax import losses
from avjax.data.datasets import DATASETS
from avjax.errors import InputError, lookup, unknown
from avjax.methods.base import Inputs, Loaded, Method, ParamInfo, Params
from avjax.nn import av_encoder, masking, sizes, streams, tokenizers
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
  model = ConfigDict(
    {
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
      "segments": 0,  # of the segment head; 0 = one per second of sound
      "label_smoothing": 0.3,  # public
      "drop_path": 0.3,  # public
      "scan": False,
      "remat": "none",  # see avjax.nn.transformer.REMAT
      "attention": "auto",  # see avjax.nn.attention.IMPLEMENTATIONS
    }
  )
  for key, value in overrides.items():
    if key not in model:
      raise unknown("key of model", key, model)
    model[key] = value
  return model


def classes(config: Any) -> dict[str, int]:
  """Number of classes by head, in the order of the head's outputs.

  Alphabetical, so noun before verb as in the public code.

  Raises:
    InputError: the data set has no such head, or a head stands alone.
  """
  known = config.model.classes or DATASETS[config.data.name].heads
  heads = sorted(config.data.heads)
  if "segment" in heads and len(heads) > 1:
    raise InputError(f"data.heads={tuple(heads)}: segment cannot be combined")
  return {name: lookup(dict(known), name, "head") for name in heads}


def label_key(head: str) -> str:
  """Where a head's labels are in the inputs."""
  return "label" if head == "label" else f"label/{head}"


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
    self.classes = classes(config)
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
    stack = {"attention": model.attention, "remat": model.remat}
    if model.fusion != "mbt":
      both = len(self.modalities) == 2
      return av_encoder.AVEncoder(
        kind=model.fusion if both else "shared",
        fusion_layers=model.fusion_layers,
        stack={**stack, "scan": model.scan},
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
    shape = (self.size.width, sum(self.classes.values()))
    head = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
    return {**params, "head": head}

  def patches(self, inputs: Inputs, names: tuple[str, ...]) -> Tokens:
    """Raw patches of modalities `names` in the dtype of the computation."""
    for m in names:
      if INPUTS[m] not in inputs:
        raise InputError(f"the inputs have no {INPUTS[m]!r} for the {m} stream")
    cut = av_encoder.patches({INPUTS[m]: inputs[INPUTS[m]] for m in names},
                             self.model)  # fmt: skip
    cut = {m: x.astype(self.config.dtype) for m, x in cut.items()}
    if "audio" in cut:
      channels = self.model.audio_channels
      cut["audio"] = jnp.repeat(cut["audio"], channels, axis=-1)
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
      params: of `init`.
      inputs: see avjax.batch.INPUTS.
      mode: one of `modes`.
      train: False obeys `test_with_bottlenecks`.
      keep: stochastic depth, of `encoder().draw_keep`.

    Returns:
      'tokens' {modality: [b n d]} after the last LayerNorm, the CLS first;
      'bottleneck' [b q d] or None.
    """
    lookup(dict.fromkeys(self.modes), mode, "mode of predict")
    names = self.modalities if mode == "av" else MODALITIES[mode]
    patches, model = self.patches(inputs, names), self.model
    params = stack_layers(params) if model.scan else params
    encoder, has = self.encoder(), presence(inputs, names)
    fuse = train or model.test_with_bottlenecks or not model.use_bottleneck
    fuse = fuse and len(self.modalities) == 2

    def run(patches: Tokens) -> tuple[Tokens, Any]:
      if model.fusion == "mbt":
        return encoder(params, patches, keep, has, fuse)
      return encoder.apply({"params": params}, patches, keep), None

    mixes = (
      model.fusion in ("early", "mid")
      if model.fusion != "mbt"
      else not model.use_bottleneck
    )
    if has is None or not mixes:
      tokens, bottleneck = run(patches)
    else:
      tokens, bottleneck = alone_where_lacking(run, patches, has), None
    return {"tokens": tokens, "bottleneck": bottleneck}

  # --- Heads and objective ---

  def logits(
    self, params: Params, tokens: Tokens, inputs: Inputs
  ) -> dict[str, Float[Array, "b *_"]]:
    """By modality, [b k] of all heads or [b t k] of the segment head."""
    head = {k: v.astype(jnp.float32) for k, v in params["head"].items()}
    return {
      m: self.pool(m, x, inputs) @ head["kernel"] + head["bias"]
      for m, x in tokens.items()
    }

  def pool(
    self, m: str, x: Float[Array, "b n d"], inputs: Inputs
  ) -> Float[Array, "b *_"]:
    """What the head reads: the mean of the tokens, the CLS, or per segment.

    For the segment head, tokens of one time step are averaged, then the steps
    of every segment as `time_weights` says.
    """
    x = x.astype(jnp.float32)
    if self.model.classifier == "token":
      return x[:, 0]
    if "segment" not in self.classes:
      return x.mean(1)
    grid = {"video": tokenizers.video_grid, "audio": tokenizers.audio_grid}
    shape, patch = inputs[INPUTS[m]].shape, self.model[f"patch_{m}"]
    steps = grid[m](shape, patch)[0]
    count = self.model.segments or round(self.config.data.audio.seconds)
    weights = time_weights(steps, patch[0], shape[1], count)
    x = rearrange(x, "b (t s) d -> b t s d", t=steps).mean(2)
    return jnp.einsum("st,btd->bsd", weights, x)

  def split(self, logits: Float[Array, "*b k"]) -> dict[str, jax.Array]:
    """Logits by head."""
    borders = np.cumsum(list(self.classes.values()))[:-1]
    parts = jnp.split(logits, borders, axis=-1)
    return dict(zip(self.classes, parts, strict=True))

  def modality_loss(
    self, m: str, logits: Float[Array, "b *_"], inputs: Inputs
  ) -> Float[Array, "b"]:
    """The mean over heads, against labels mixed with this modality's weight."""
    labels = {head: inputs[label_key(head)] for head in self.classes}
    weight = inputs.get(f"mix/{m}")
    if weight is not None:
      labels = {k: losses.mix_labels(y, weight) for k, y in labels.items()}
    return losses.multi_head(
      self.split(logits),
      labels,
      self.model.label_smoothing,
      multilabel=self.config.data.multilabel,
    )

  def loss(
    self,
    params: Params,
    inputs: Inputs,
    rng: jax.Array,
    step: jax.Array,
    keep: Keep | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The mean over an example's modalities, then over examples.

    Args:
      params: of `init`.
      inputs: with labels, and `mix/audio`, `mix/video` where mixed.
      rng: of this step.
      step: not used.
      keep: stochastic depth instead of drawn patterns.
    """
    del step
    b = len(inputs[INPUTS[self.modalities[0]]])
    if keep is None and self.model.drop_path:
      index = inputs.get("index", jnp.arange(b, dtype=jnp.uint32))
      keep = self.encoder().draw_keep(
        masking.example_keys(rng, index), self.modalities, self.model.drop_path
      )
    out = self.encode(params, inputs, train=True, keep=keep)
    logits = self.logits(params, out["tokens"], inputs)
    terms = {m: self.modality_loss(m, x, inputs) for m, x in logits.items()}
    valid = inputs.get("valid", jnp.ones(b, bool))
    has = presence(inputs, self.modalities) or dict.fromkeys(terms, valid)
    some = valid & jnp.stack(list(has.values())).any(0)
    loss = losses.weighted_mean(streams.mean(terms, has), some)
    metrics = {
      f"loss_{m}": losses.weighted_mean(x, valid & has[m])
      for m, x in terms.items()
    }
    named = {f"logits/{m}": x for m, x in logits.items()}
    return loss, {"metrics": metrics, "intermediates": named}

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """See `Method.predict`: the mean of the logits of an example's modalities.

    Modes 'a' and 'v' ask for one modality, whatever the example has.
    """
    tokens = self.encode(params, inputs, mode=mode)["tokens"]
    logits = self.logits(params, tokens, inputs)
    return self.split(streams.mean(logits, presence(inputs, tuple(logits))))

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """What the head reads of a modality: mean of the tokens, or the CLS.

    Returns:
      'video' and 'audio' [b d], and 'av', the mean of those that an example
      has; not normalised.
    """
    tokens = self.encode(params, inputs)["tokens"]
    cls = self.model.classifier == "token"
    pooled = {m: x[:, 0] if cls else x.mean(1) for m, x in tokens.items()}
    pooled = {m: x.astype(jnp.float32) for m, x in pooled.items()}
    if len(pooled) == 2:
      has = presence(inputs, tuple(pooled))
      pooled["av"] = streams.mean(pooled, has)
    return pooled

  # --- 4.1 Finetuning: how a pretrained encoder becomes this model's ---

  def param_info(self, path: str) -> ParamInfo:
    """Layer 0: patches, positions, modality tokens, first modality's CLS.

    Block i is layer i+1 (the joint blocks of mid-fusion come last); all else
    is the last layer: norms, bottleneck, head, and, as in the public code, the
    CLS of the second modality.
    """
    stack, _, rest = path.partition("/")
    layer = self.num_layers + 1
    first = ("embed_", "positions_", "modality_token_")
    if stack.startswith(first) or stack == f"cls_{self.modalities[0]}":
      layer = 0
    elif rest.startswith("block_"):
      joint = stack == "encoder_joint"
      offset = self.num_layers - self.model.fusion_layers if joint else 0
      layer = offset + int(rest.split("/")[0].removeprefix("block_")) + 1
    return ParamInfo(layer, decay=path.endswith("kernel"))

  def adapt(
    self, params: Params, source: Params, source_config: Mapping[str, Any]
  ) -> Loaded:
    """See `Method.adapt` and `avjax.weights.transfer.av_encoder`.

    Sources are AV-MAE with any encoder, AudioMAE or VideoMAE for both streams
    (table 3) or one for each ("Additional baseline"), and MBT. What they are
    is told by their parameters' names. A head for other classes, a bottleneck
    of another size and position tables of another length keep their initial
    values and are listed as missing, the source's as unused.
    """
    del source_config
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
  depth = sizes.resolve(model).depth
  if not -1 <= model.fusion_layer <= depth:
    raise InputError(
      f"model.fusion_layer {model.fusion_layer} is not in 0..{depth}"
    )
  if model.fusion != "mbt":
    for key, only in (("classifier", "gap"), ("audio_channels", 1)):
      if model[key] != only:
        raise InputError(
          f"model.fusion={model.fusion!r} goes with model.{key}={only!r}, "
          f"not {model[key]!r}"
        )
  return model


def presence(inputs: Inputs, names: tuple[str, ...]) -> streams.Present:
  """Which of two modalities each example has; None = all have all."""
  flags = {m: inputs.get(f"has_{m}") for m in names}
  if len(names) == 1 or all(flag is None for flag in flags.values()):
    return None
  b = len(inputs[INPUTS[names[0]]])
  return {m: jnp.ones(b, bool) if f is None else f for m, f in flags.items()}


def alone_where_lacking(
  run: Any, patches: Tokens, has: Mapping[str, jax.Array]
) -> Tokens:
  """Tokens of encoders whose attention spans both modalities.

  Examples that lack one get what a pass over the other alone gives. That pass
  is computed only if the batch has such examples.
  """
  both = jnp.stack(list(has.values())).all(0)

  def some() -> Tokens:
    joint = run(patches)[0]
    return {
      m: jnp.where(both[:, None, None], joint[m], run({m: x})[0][m])
      for m, x in patches.items()
    }

  return jax.lax.cond(both.all(), lambda: run(patches)[0], some)


def time_weights(
  steps: int, span: int, length: int, segments: int
) -> Float[np.ndarray, "t n"]:
  """Shares of time steps in the equal segments of a clip.

  Step i covers the frames [i*span, (i+1)*span), segment s the frames
  [s, s+1) * length/segments; a segment is the mean of the steps that it
  overlaps, weighted by the overlap.

  Raises:
    InputError: a segment overlaps no step.
  """
  start = np.arange(steps) * span
  edges = np.arange(segments + 1) * length / segments
  overlap = np.minimum(edges[1:, None], start + span)
  overlap = np.maximum(overlap - np.maximum(edges[:-1, None], start), 0)
  if not overlap.any(axis=1).all():
    raise InputError(
      f"{steps} steps of {span} frames leave one of {segments} segments of "
      f"{length} frames without a token"
    )
  return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
