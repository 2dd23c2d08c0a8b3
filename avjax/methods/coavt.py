"""CoAVT: sound, pictures and text (arXiv:2401.12264).

§III-B in its order: contrast over the most similar query (equations 1 to 3),
matching with hard negatives (4), language modelling (5), for text with both
modalities, with sound and with pictures (6, 7). Fine-tuning for retrieval is
the same without masks (§III-C). The variants of table I: `modes=('av',)` is
Vanilla; Baseline has `query_encoder=False, objectives=('contrast',)` besides.

What the paper leaves open is as in BLIP-2 (arXiv:2301.12597):

- equation 4 has no minus sign, no term of pairs that do not match and an index
  too many. By default the mean of the queries' *logits* is judged; see
  `coavt_objectives.matching` for the other readings;
- hard negatives: one text for each clip and one clip for each text, drawn by
  softmax of the similarities; of clips with equal texts none is the other's;
- label smoothing of contrast and language, the width of the projection, the
  first temperature; the temperature stays within bounds (ALBEF).

Text passes its encoder once for all three pairs, and the queries of the three
go through the blocks as one batch. The kept tokens are the same in the three
passes of the audio-visual encoder. The objectives are pure functions in
`avjax/methods/coavt_objectives.py`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from avjax import losses
from avjax.errors import InputError
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import present
from avjax.methods.coavt_base import PASSES
from avjax.methods.coavt_config import default_model
from avjax.methods.coavt_objectives import (
  contrast,
  equal_texts,
  hard_negatives,
  language,
  matching,
  similarity,
)
from avjax.methods.coavt_retrieval import Retrieval
from avjax.nn import bert, masking
from avjax.nn.bert import QueryEncoder
from avjax.nn.cav_encoder import INPUTS
from avjax.nn.masking import Keys
from avjax.nn.transformer import NORMAL

__all__ = ["CoAVT", "default_model"]

Pairs = Bool[Array, "b b"]
Counted = Bool[Array, "m b"]  # examples with both sides, by mode
Found = dict[str, Float[Array, "m"]]  # loss or accuracy, by mode


class CoAVT(Retrieval):
  """Pretraining and retrieval; `config.model` as `default_model` has it.

  An example without text counts in no loss, one that lacks a modality in none
  of the pairs that have it; one without a negative not in the matching loss.
  """

  fixed_positions = True

  def __init__(self, config: Any):
    self.trained = tuple(config.model.modes)
    super().__init__(config)
    needs = {
      "contrast": ("project_", "temperature"),
      "matching": ("match/",),
      "language": ("language/",),
    }
    missing = [k for k in needs if k not in self.model.objectives]
    self.unused = sum((needs[k] for k in missing), ())
    if not self.model.query_encoder:
      self.unused += ("queries",)

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; the branches of the modalities in the inputs."""
    if self.model.query_encoder:
      return self.draw_encoders(rng, inputs, QueryEncoder.__call__)
    rng, key = jax.random.split(rng)

    def text_alone(module, _, ids, mask):
      return module.project("text", module.first(ids, mask))

    params = self.draw_encoders(rng, inputs, text_alone)
    shape = (self.size.width, self.model.projection)
    layer = {"kernel": NORMAL(key, shape), "bias": jnp.zeros(shape[1])}
    return {**params, "project_media": layer}

  @property
  def masked(self) -> Sequence[str]:
    """Modalities of which not all tokens are kept (FLIP)."""
    return [m for m in INPUTS if self.model[f"mask_{m}"]]

  # --- Objective ---

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The sum over pairs and objectives, equations 6 and 7.

    Raises:
      InputError: the inputs have no text, or a modality is missing.
    """
    del step
    if "text" not in inputs:
      raise InputError(
        "CoAVT needs 'text' in the inputs: set data.text.vocabulary"
      )
    masks, draws, drop = jax.random.split(rng, 3)
    ids, mask = inputs["text"], inputs["text_mask"]
    train = [
      {"train": True, "rngs": {"dropout": key}}
      for key in jax.random.split(masking.part_key(inputs, drop), 4)
    ]
    text = self.run(params, QueryEncoder.first, ids, mask, **train[0])
    text = self.run(params, QueryEncoder.project, "text", text)
    media = self.tokens(params, inputs, self.trained, self.draw(inputs, masks))
    media = cross = tuple(media)
    if self.model.query_encoder:
      cross = self.run(params, QueryEncoder.cross_cache, media)
    feature, cache = self.feature(params, cross, **train[1])
    logits = jax.vmap(similarity, (1, None))(feature, text)
    logits = logits / self.temperature(params)
    equal, here = equal_texts(ids, mask), mask.any(1)
    counted = jnp.stack(
      [present(inputs, PASSES[mode][1]) & here for mode in self.trained]
    )
    found = {}
    if "contrast" in self.model.objectives:
      found |= self.contrast(logits, equal, counted)
    if "matching" in self.model.objectives:
      keys = masking.draw_keys(inputs, draws)
      found |= self.matching(
        params, media, cross, logits, ids, mask, equal, counted, keys, train[2]
      )
    if "language" in self.model.objectives:
      found |= self.language(params, cache, ids, mask, counted, train[3])
    metrics = {
      f"{name}_{mode}": values[i]
      for name, values in found.items()
      for i, mode in enumerate(self.trained)
    }
    metrics["temperature"] = self.temperature(params)
    total = sum(found[name].sum() for name in self.model.objectives)
    return total, {"metrics": metrics}

  def contrast(
    self, logits: Float[Array, "m b b"], equal: Pairs, counted: Counted
  ) -> Found:
    """Equations 2 and 3 and their accuracy, of each mode."""
    options = {
      "smoothing": self.model.label_smoothing,
      "equals": self.model.equal_texts,
    }
    one = functools.partial(contrast, **options)
    loss, right = jax.vmap(one, (0, None, 0))(logits, equal, counted)
    return {"contrast": loss, "contrast_accuracy": right}

  def matching(
    self,
    params: Params,
    media: Sequence[Float[Array, "b _ w"]],
    cross: bert.CrossCache,
    logits: Float[Array, "m b b"],
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    equal: Pairs,
    counted: Counted,
    keys: Keys,
    options: dict[str, Any],
  ) -> Found:
    """Equation 4 and its accuracy, of each mode.

    Every clip and text makes three pairs: itself, the text with the clip's
    hard negative in place of the clip, and the clip with the text's.

    Args:
      params: of the whole model.
      media: tokens of the clips by mode.
      cross: `QueryEncoder.cross_cache` of them.
      logits: similarity / temperature.
      ids, mask: words of the texts.
      equal: pairs of equal texts.
      counted: which examples have both sides, by mode.
      keys: one per example.
      options: of the pass.
    """
    allowed = ~equal & counted[:, None]
    keys = [masking.fold_in(keys, i) for i in range(2 * len(media))]
    keys = jnp.stack(keys).reshape(2, len(media), len(keys[0]))
    drawn = jax.vmap(hard_negatives)
    texts, some = drawn(logits, allowed, keys[0])
    clips, _ = drawn(logits.swapaxes(1, 2), allowed, keys[1])
    m, b = texts.shape
    others = tuple(x[i] for x, i in zip(media, clips, strict=True))
    others = self.run(params, QueryEncoder.cross_cache, others)

    # Each clip with its own and the drawn text; then the drawn clips.
    out = self.judged(
      params, cross.beside(others), ids, mask,
      pairs_each=(2,) * m + (1,) * m,
      expand=functools.partial(pairs, drawn=texts), **options,
    )  # fmt: skip
    out = out.reshape(b, 3 * m, *out.shape[1:])
    first = rearrange(out[:, : 2 * m], "b (m p) q k -> m b p q k", p=2)
    other = rearrange(out[:, 2 * m :], "b m q k -> m b 1 q k")
    out = jnp.concatenate([first, other], axis=2)
    matched = jnp.broadcast_to(jnp.arange(3) == 0, out.shape[:3])
    loss = matching(out, matched, self.model.matching_loss).mean(2)
    answer = out.mean(3)
    right = ((answer[..., 1] > answer[..., 0]) == matched).mean(2)
    mean = jax.vmap(losses.weighted_mean)
    weights = counted & some
    return {
      "matching": mean(loss, weights),
      "matching_accuracy": mean(right, weights),
    }

  def language(
    self,
    params: Params,
    cache: bert.Cache,
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    counted: Counted,
    options: dict[str, Any],
  ) -> Found:
    """Equation 5, of each mode; arguments as of `matching`."""
    times = len(counted)
    options = {**options, "repeats": times}
    logits = self.run(
      params, QueryEncoder.language, cache, ids, mask, **options
    )
    logits = rearrange(logits, "(b m) l k -> m b l k", m=times)
    one = functools.partial(language, smoothing=self.model.label_smoothing)
    kept = mask & counted[..., None]
    return {"language": jax.vmap(one, (0, None, 0))(logits, ids, kept)}


def pairs(x: Array, drawn: Int[Array, "m b"]) -> Array:
  """Rows of the texts [b …] -> of the pairs [b 3m …] -> [3bm …].

  For each example its own and the drawn text of every mode, then its own again
  for every mode.
  """
  own = jnp.broadcast_to(x, (len(drawn), *x.shape))
  first = rearrange(jnp.stack((own, x[drawn])), "p m b ... -> b (m p) ...")
  rows = jnp.concatenate([first, own.swapaxes(0, 1)], axis=1)
  return rows.reshape(-1, *x.shape[1:])
