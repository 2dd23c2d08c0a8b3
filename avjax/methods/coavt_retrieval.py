"""What a CoAVT of clips and text is used for (arXiv:2401.12264, §III-C1).

Clips and texts to compare, pairs to judge and captions to write; evaluators and
`avjax.load` find these methods by their names.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from avjax import losses
from avjax.methods.base import Inputs, Params
from avjax.methods.coavt_base import QUERY, CoAVTMethod, available, pooled
from avjax.methods.coavt_objectives import bounded
from avjax.nn import bert
from avjax.nn.bert import QueryEncoder


class Retrieval(CoAVTMethod):
  """A model of clips and text.

  Attributes:
    retrieval_modes: what `encode_media` encodes, given `data.modality`.
  """

  modes = ()

  def __init__(self, config: Any):
    super().__init__(config)
    self.retrieval_modes = available(config.data.modality)

  def words(self) -> dict[str, int]:
    """See `CoAVTMethod.words`."""
    names = ("vocabulary", "positions", "projection")
    return {name: self.model[name] for name in names}

  def temperature(self, params: Params) -> Float[Array, ""]:
    """What similarities are divided by."""
    value = params[QUERY]["temperature"]
    return bounded(losses.at_least_float32(value))

  # --- Passes ---

  def feature(
    self,
    params: Params,
    media: tuple[Float[Array, "b _ w"], ...] | bert.CrossCache,
    **more: Any,
  ) -> tuple[Float[Array, "b m _ p"], bert.Cache | None]:
    """Projected queries, of length 1; Baseline's one projected mean.

    Args:
      params: of the whole model.
      media: tokens of the clips by mode, or their `QueryEncoder.cross_cache`.
      **more: of the pass.
    """
    if self.model.query_encoder:
      known = isinstance(media, bert.CrossCache)
      modes = media.num_arrays if known else len(media)
      out, cache = self.asked(params, media, **more)
      out = self.run(params, QueryEncoder.project, "query", out)
      return rearrange(out, "(b m) q p -> b m q p", m=modes), cache
    layer = jax.tree.map(losses.at_least_float32, params["project_media"])
    x = jnp.stack([pooled(tokens) for tokens in media], axis=1)
    x = losses.unit(x @ layer["kernel"] + layer["bias"])
    return x[:, :, None], None

  def judged(
    self,
    params: Params,
    tokens: bert.Encoded | bert.CrossCache,
    ids: Int[Array, "t l"],
    mask: Bool[Array, "t l"],
    **more: Any,
  ) -> Float[Array, "n q 2"]:
    """Logits of (no match, match) of each pair and query."""
    out = self.run(params, QueryEncoder.match, tokens, ids, mask, **more)
    return self.run(params, QueryEncoder.matching, out)

  # --- Use ---

  def encode_media(
    self, params: Params, inputs: Inputs, mode: str
  ) -> dict[str, jax.Array]:
    """Clips in a mode of `retrieval_modes`, unmasked.

    Returns:
      'feature' [b q p] of length 1 (Baseline: q = 1), of which equation 1
      takes the most similar; 'tokens' [b s w] for `match` and captions, but
      not of Baseline.
    """
    (tokens,) = self.tokens(params, inputs, (mode,))
    feature = self.feature(params, (tokens,))[0][:, 0]
    own = {"tokens": tokens} if self.model.query_encoder else {}
    return {"feature": feature, **own}

  def encode_text(
    self, params: Params, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
  ) -> Float[Array, "b p"]:
    """Texts in the space of `encode_media`'s 'feature', of length 1."""
    rows = self.run(params, QueryEncoder.first, ids, mask)
    return self.run(params, QueryEncoder.project, "text", rows)

  def match(
    self,
    params: Params,
    tokens: Float[Array, "n s w"],
    ids: Int[Array, "n l"],
    mask: Bool[Array, "n l"],
  ) -> Float[Array, "n"]:
    """The mean over the queries of the logit of "match"."""
    return self.judged(params, tokens, ids, mask)[..., 1].mean(1)

  def caption_start(
    self, params: Params, tokens: Float[Array, "b s w"], length: int
  ) -> tuple[bert.Cache, bert.Cache]:
    """For captions of up to `length` words, batch first.

    Returns:
      What the queries found, which stays, and the state of the words.
    """
    _, cache = self.asked(params, tokens)
    blank = self.run(params, QueryEncoder.empty, len(tokens), length)
    return _swapped((cache, blank))

  def caption_step(
    self,
    params: Params,
    found: bert.Cache,
    state: bert.Cache,
    token: Int[Array, "b"],
    position: Any,
  ) -> tuple[Float[Array, "b k"], bert.Cache]:
    """Logits of the next word, and the state with this one in it.

    Args:
      params: of the whole model.
      found: of `caption_start`.
      state: of `caption_start` or of the step before.
      token: the word at `position`, [DEC] at 0.
      position: the same for the batch, below the length.
    """
    caches = _swapped((found, state))
    logits, text = self.run(params, QueryEncoder.step, *caches, token, position)
    return logits, _swapped(text)

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """Features of clips for audio-visual retrieval, and texts.

    Returns:
      'audio', 'video' [b d] of the modalities in the inputs, and 'av' where
      both are: the mean over the queries, before the projection (§IV-C3);
      Baseline: over the tokens. 'text' [b p] is `encode_text`'s, of the first
      text of each clip.
    """
    found = self.means(params, inputs, self.config.data.modality)
    if "text" in inputs:
      ids, mask = inputs["text"], inputs["text_mask"]
      if ids.ndim == 3:
        ids, mask = ids[:, 0], mask[:, 0]
      found["text"] = self.encode_text(params, ids, mask)
    return found


def _swapped(caches: Any) -> Any:
  """Depth first <-> batch first."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1), caches)
