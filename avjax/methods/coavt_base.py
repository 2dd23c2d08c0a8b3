"""What CoAVT's pretraining and fine-tuning share (arXiv:2401.12264, §III-A).

The joint audio-visual encoder is CAV-MAE's with its three passes: sound alone,
picture alone and both, of the same tokens. The text and query encoder is
`avjax.nn.bert.QueryEncoder`; its parameters lie under `query_encoder`. Weight
decay leaves out biases, LayerNorms and the temperature (BLIP-2, but for the
temperature).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax import trees
from avjax.losses import at_least_float32
from avjax.methods import coavt_config
from avjax.methods.base import Inputs, Loaded, ParamInfo, Params
from avjax.methods.cavmae_base import CAVMethod
from avjax.methods.supervised import chosen
from avjax.nn import bert, bert_block, sizes
from avjax.nn.bert import Cache, QueryEncoder
from avjax.nn.cav_encoder import ALONE, INPUTS, MODALITIES, TOGETHER, Ids, Pass
from avjax.optim import FROZEN
from avjax.weights.bert import start

QUERY = "query_encoder"  # where the text and query encoder's parameters lie
PASSES: dict[str, Pass] = {
  "av": TOGETHER,
  "a": ALONE["audio"],
  "v": ALONE["video"],
}
# The parts of `init_from` that name the two encoders apart.
PARTS = ("av", "text")


class CoAVTMethod(CAVMethod):
  """The two encoders and how they are started.

  Parameters are of the groups `default` (audio-visual encoder),
  `query_encoder`, `temperature`, and `frozen` where nothing reaches them.
  """

  check = staticmethod(coavt_config.check)
  trained: Sequence[str] = ()  # modes of the training
  unused: tuple[str, ...] = ()  # beginnings of names within QUERY

  def __init__(self, config: Any):
    super().__init__(config)
    self.text_size = sizes.resolve(self.model, "text_")
    self.passes = [PASSES[mode] for mode in self.trained]

  # --- Encoders ---

  def query_encoder(self, **more: Any) -> QueryEncoder:
    """The Flax module for text and queries."""
    names = ("queries", "cross_every", "query_ffn", "dropout", "scan", "remat")
    options = {name: self.model[name] for name in names}
    options |= {"dtype": jnp.dtype(self.config.dtype), **self.words(), **more}
    return QueryEncoder(self.text_size, **options)

  def words(self) -> dict[str, int]:
    """The options of the query encoder that belong to text."""
    return {"vocabulary": 1}

  def run(
    self, params: Params, method: Callable[..., Any], *args: Any, **more: Any
  ) -> Any:
    """A pass through the text and query encoder.

    Args:
      params: of the whole model.
      method: of `QueryEncoder`.
      *args: of the method.
      **more: its keywords, and `rngs` of dropout.
    """
    rngs = more.pop("rngs", None)
    own = params[QUERY]
    own = bert_block.stacked(own) if self.model.scan else own
    module = self.query_encoder()
    return module.apply(
      {"params": own}, *args, method=method, rngs=rngs, **more
    )

  def tokens(
    self,
    params: Params,
    inputs: Inputs,
    modes: Sequence[str],
    ids: Ids | None = None,
  ) -> list[Float[Array, "b _ w"]]:
    """E_AV, E_A or E_V of each mode, all from one run of the encoder.

    Args:
      params: of the whole model.
      inputs: those that the modes need.
      modes: of PASSES.
      ids: kept tokens by modality; None keeps all.

    Raises:
      InputError: the inputs of a mode are not there.
    """
    names = tuple(
      m for m in INPUTS if any(m in PASSES[mode][1] for mode in modes)
    )
    inputs = chosen(inputs, names)
    passes = [PASSES[mode] for mode in modes]
    encoder = {name: x for name, x in params.items() if name != QUERY}
    found = self.apply(self.encoder(inputs), encoder, inputs, passes, ids)
    if self.model.freeze_encoder:
      found = jax.lax.stop_gradient(found)
    return found

  def draw_encoders(
    self,
    rng: jax.Array,
    inputs: Inputs,
    passes: Callable[..., Any],
  ) -> Params:
    """Initial parameters of both encoders.

    Args:
      rng: key.
      inputs: their shapes.
      passes: (module, tokens, ids, mask) -> anything: what the text and query
        encoder is used for; what it does not reach is not there.
    """
    media, text = jax.random.split(rng)
    shown = {k: inputs[k] for k in INPUTS.values() if k in inputs}
    params = self.draw_params(media, shown, self.encoder(shown))
    enc = jnp.zeros((1, 1, self.size.width))
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    module = self.query_encoder(scan=False, dtype=jnp.float32)
    own = module.init(text, enc, ids, mask, method=passes)["params"]
    return {**params, QUERY: own}

  def asked(
    self, params: Params, tokens: bert.Encoded | bert.CrossCache, **more: Any
  ) -> tuple[Float[Array, "_ q d"], Cache]:
    """Q_X and what language modelling needs of that pass."""
    return self.run(params, QueryEncoder.query, tokens, **more)

  def means(
    self, params: Params, inputs: Inputs, modality: str
  ) -> dict[str, Float[Array, "b _"]]:
    """'audio', 'video' and 'av', of `modality` and the inputs what is there.

    'av' of an example that lacks a modality (`has_<m>`) is that of the other.

    The mean over the queries before the projection (§IV-C3), or over the
    tokens of a model without a query encoder.
    """
    told = {m[0] for m, key in INPUTS.items() if key in inputs}
    modes = [m for m in available(modality) if set(m) <= told]
    found = {}
    for mode, x in zip(modes, self.tokens(params, inputs, modes), strict=True):
      asked = self.model.get("query_encoder", True)
      name = {"a": "audio", "v": "video", "av": "av"}[mode]
      found[name] = pooled(self.asked(params, x)[0] if asked else x)
    if "av" in found:
      for m, other in (("audio", "video"), ("video", "audio")):
        if f"has_{m}" in inputs:
          has = inputs[f"has_{m}"][:, None]
          found["av"] = jnp.where(has, found["av"], found[other])
    return found

  # --- Optimiser ---

  def param_info(self, path: str) -> ParamInfo:
    """See the class; the query encoder is of the last layer."""
    decay = not path.endswith(("bias", "scale", "temperature"))
    return dataclasses.replace(super().param_info(path), decay=decay)

  def group(self, path: str) -> str:
    """See the class."""
    root, _, rest = path.partition("/")
    if root == QUERY:
      if rest.startswith(self.unused):
        return FROZEN
      return rest if rest == "temperature" else QUERY
    fixed = self.fixed_positions and root.startswith("positions_")
    if fixed or self.model.freeze_encoder:
      return FROZEN
    return super().group(path)

  # --- Start ---

  def adapt(self, params: Params, source: Params, source_config: Any) -> Loaded:
    """See `CAVMethod.adapt`: from CoAVT, CAV-MAE, BERT, or two of them.

    {'av': …, 'text': …} of two sources gives each encoder its own: 'av' is of
    CAV-MAE's family, CoAVT among them, 'text' BERT or CoAVT. For the latter see
    `avjax.weights.bert.start`.
    """
    prefixes = ("", f"{QUERY}/")
    if set(source) == set(PARTS):
      media, text = source["av"], source["text"]
      inner = f"{QUERY}/" if QUERY in text else ""
      prefixes = ("av/", f"text/{inner}")
      text = text.get(QUERY, text)
    elif "words" in source:
      media, text, prefixes = {}, source, ("", "")
    else:
      text = source.get(QUERY)
      media = {name: x for name, x in source.items() if name != QUERY}
    first = {name: x for name, x in params.items() if name != QUERY}
    encoder = super().adapt(first, media, source_config)
    if text is None:
      queries = Loaded(
        params[QUERY], {}, [*trees.flatten(params[QUERY])], [], {}
      )
    else:
      queries = start(params[QUERY], text)
    return joined(encoder, queries, prefixes)


def joined(encoder: Loaded, queries: Loaded, prefixes: Sequence[str]) -> Loaded:
  """Both encoders' reports as one.

  Args:
    encoder: of all that is not under QUERY.
    queries: of what is, without QUERY in its paths.
    prefixes: of the source's paths in each.
  """
  own = ("", f"{QUERY}/")
  parts = list(zip((encoder, queries), own, prefixes, strict=True))
  return Loaded(
    params={**encoder.params, QUERY: queries.params},
    loaded={o + k: p + v for x, o, p in parts for k, v in x.loaded.items()},
    missing=[o + k for x, o, _ in parts for k in x.missing],
    unused=[p + k for x, _, p in parts for k in x.unused],
    reshaped={o + k: v for x, o, _ in parts for k, v in x.reshaped.items()},
  )


def available(modality: str) -> tuple[str, ...]:
  """The modes that clips with these tracks have: 'av' has all three."""
  own = MODALITIES[modality]
  return tuple(
    mode for mode in ("a", "v", "av") if set(MODALITIES[mode]) <= set(own)
  )


def pooled(queries: Float[Array, "b q d"]) -> Float[Array, "b d"]:
  """The mean over the queries, or over tokens, in float32."""
  return at_least_float32(queries).mean(1)
