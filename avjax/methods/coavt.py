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
  first temperature; the temperature stays within TEMPERATURES (ALBEF).

Text passes its encoder once for all three pairs. The kept tokens are the same
in the three passes of the audio-visual encoder.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avjax import losses
from avjax.errors import InputError
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import present
from avjax.methods.coavt_base import PASSES, CoAVTMethod, available, pooled
from avjax.methods.coavt_config import default_model
from avjax.methods.coavt_objectives import (
  bounded,
  contrast,
  equal_texts,
  hard_negatives,
  language,
  matching,
  similarity,
)
from avjax.nn import bert, cav_encoder, masking
from avjax.nn.bert import QueryEncoder
from avjax.nn.cav_encoder import Ids
from avjax.nn.masking import Keys

__all__ = ["CoAVT", "default_model"]

Scalar = Float[Array, ""]


class CoAVT(CoAVTMethod):
  """Pretraining and retrieval; `config.model` as `default_model` has it.

  An example without text counts in no loss, one that lacks a modality in none
  of the pairs that have it; one without a negative not in the matching loss.

  Attributes:
    retrieval_modes: what `encode_media` encodes, given `data.modality`.
  """

  modes = ()
  fixed_positions = True

  def __init__(self, config: Any):
    self.trained = tuple(config.model.modes)
    super().__init__(config)
    self.retrieval_modes = available(config.data.modality)
    needs = {
      "contrast": ("project_", "temperature"),
      "matching": ("match/",),
      "language": ("language/",),
    }
    missing = [k for k in needs if k not in self.model.objectives]
    self.unused = sum((needs[k] for k in missing), ())
    if not self.model.query_encoder:
      self.unused += ("queries",)

  def words(self) -> dict[str, int]:
    """See `CoAVTMethod.words`."""
    names = ("vocabulary", "positions", "projection")
    return {name: self.model[name] for name in names}

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; the branches of the modalities in the inputs."""
    if self.model.query_encoder:
      return self.draw_encoders(rng, inputs, QueryEncoder.__call__)
    rng, key = jax.random.split(rng)

    def text_alone(module, _, ids, mask):
      return module.project("text", module.text(ids, mask)[:, 0])

    params = self.draw_encoders(rng, inputs, text_alone)
    shape = (self.size.width, self.model.projection)
    layer = {"kernel": bert.normal(key, shape), "bias": jnp.zeros(shape[1])}
    return {**params, "project_media": layer}

  def draw(self, inputs: Inputs, rng: jax.Array) -> Ids:
    """Kept tokens by modality (FLIP); none where the ratio is 0.

    Noise among the inputs is taken as it is; else every example draws by its
    own index.
    """
    keys, ids = example_keys(inputs, rng), {}
    for i, (m, grid) in enumerate(
      cav_encoder.grids(inputs, self.model).items()
    ):
      noise, n = inputs.get(f"noise/{m}"), grid[0] * grid[1]
      ratio = self.model[f"mask_{m}"]
      if noise is None:
        noise = masking.example_noise(masking.fold_in(keys, i), n)
      if ratio:
        kept = cav_encoder.num_kept(m, n, ratio, f"model.mask_{m}=")
        ids[m] = masking.ids_keep(noise, kept)
    return ids

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
    options = {"train": True, "rngs": {"dropout": jax.random.fold_in(drop, 0)}}
    text = self.run(params, QueryEncoder.text, ids, mask, **options)
    text = self.run(params, QueryEncoder.project, "text", text[:, 0])
    seen = self.tokens(params, inputs, self.trained, self.draw(inputs, masks))
    metrics, total = {"temperature": self.temperature(params)}, 0.0
    for i, (mode, tokens) in enumerate(zip(self.trained, seen, strict=True)):
      counted = present(inputs, PASSES[mode][1]) & mask.any(1)
      keys = masking.fold_in(example_keys(inputs, draws), i)
      parts = self.pair(
        params, tokens, text, ids, mask, counted, keys,
        jax.random.fold_in(drop, i + 1),
      )  # fmt: skip
      total += sum(parts[name] for name in self.model.objectives)
      metrics |= {f"{name}_{mode}": value for name, value in parts.items()}
    return total, {"metrics": metrics}

  def pair(
    self,
    params: Params,
    tokens: Float[Array, "b s w"],
    text: Float[Array, "b p"],
    ids: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    counted: Bool[Array, "b"],
    keys: Keys,
    drop: jax.Array,
  ) -> dict[str, Scalar]:
    """The objectives of one pair (equation 6) and their accuracies.

    Args:
      params: of the whole model.
      tokens: of the clips, in one of the modes.
      text: projected, of length 1.
      ids, mask: words of the texts.
      counted: which examples have both sides.
      keys: of hard negatives, one per example.
      drop: key of dropout.
    """
    model, found = self.model, {}
    rngs = [{"dropout": jax.random.fold_in(drop, i)} for i in range(3)]
    feature, cache = self.feature(params, tokens, train=True, rngs=rngs[0])
    equal = equal_texts(ids, mask)
    logits = similarity(feature, text) / self.temperature(params)
    if "contrast" in model.objectives:
      found["contrast"], found["contrast_accuracy"] = contrast(
        logits, equal, counted,
        smoothing=model.label_smoothing, equals=model.equal_texts,
      )  # fmt: skip
    if "matching" in model.objectives:
      allowed = ~equal & counted[None]
      picks = [
        hard_negatives(x, allowed, masking.fold_in(keys, i))
        for i, x in enumerate((logits, logits.T))
      ]
      (texts, some), (clips, _) = picks
      triples = [
        jnp.stack(x, 1).reshape(-1, *x[0].shape[1:])
        for x in (
          (tokens, tokens[clips], tokens),
          (ids, ids, ids[texts]),
          (mask, mask, mask[texts]),
        )
      ]
      out = self.judged(params, *triples, train=True, rngs=rngs[1])
      found["matching"], found["matching_accuracy"] = self.judge(
        out.reshape(-1, 3, *out.shape[1:]), counted & some
      )
    if "language" in model.objectives:
      words = self.run(
        params, QueryEncoder.language, cache, ids, mask,
        train=True, rngs=rngs[2],
      )  # fmt: skip
      found["language"] = language(
        words, ids, mask & counted[:, None], model.label_smoothing
      )
    return found

  def judge(
    self, logits: Float[Array, "b 3 q 2"], counted: Bool[Array, "b"]
  ) -> tuple[Scalar, Scalar]:
    """Loss and accuracy of triples, of which the first pair matches."""
    matched = jnp.broadcast_to(jnp.arange(3) == 0, logits.shape[:2])
    loss = matching(logits, matched, self.model.matching_loss)
    answer = logits.mean(2)
    right = (answer[..., 1] > answer[..., 0]) == matched
    return losses.weighted_mean(loss.mean(1), counted), losses.weighted_mean(
      right.astype(jnp.float32).mean(1), counted
    )

  def temperature(self, params: Params) -> Scalar:
    """What similarities are divided by."""
    value = params["query_encoder"]["temperature"]
    return bounded(bert.at_least_float32(value))

  # --- Passes ---

  def feature(
    self, params: Params, tokens: Float[Array, "b s w"], **more: Any
  ) -> tuple[Float[Array, "b _ p"], bert.Cache | None]:
    """Projected queries, of length 1; Baseline's one projected mean."""
    if self.model.query_encoder:
      out, cache = self.asked(params, tokens, **more)
      return self.run(params, QueryEncoder.project, "query", out), cache
    layer = jax.tree.map(bert.at_least_float32, params["project_media"])
    x = pooled(tokens) @ layer["kernel"] + layer["bias"]
    return bert.unit(x)[:, None], None

  def judged(
    self,
    params: Params,
    tokens: Float[Array, "n s w"],
    ids: Int[Array, "n l"],
    mask: Bool[Array, "n l"],
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
    feature, _ = self.feature(params, tokens)
    own = {"tokens": tokens} if self.model.query_encoder else {}
    return {"feature": feature, **own}

  def encode_text(
    self, params: Params, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
  ) -> Float[Array, "b p"]:
    """Texts in the space of `encode_media`'s 'feature', of length 1."""
    rows = self.run(params, QueryEncoder.text, ids, mask)
    return self.run(params, QueryEncoder.project, "text", rows[:, 0])

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
    """The state of captions of up to `length` words, batch first."""
    _, cache = self.asked(params, tokens)
    blank = self.run(params, QueryEncoder.empty, len(tokens), length)
    return _swapped((cache, blank))

  def caption_step(
    self, params: Params, state: Any, token: Int[Array, "b"], position: Any
  ) -> tuple[Float[Array, "b k"], Any]:
    """Logits of the next word, and the state with this one in it.

    Args:
      params: of the whole model.
      state: of `caption_start` or of the step before.
      token: the word at `position`, [DEC] at 0.
      position: the same for the batch, below the length.
    """
    cache, text = _swapped(state)
    logits, text = self.run(
      params, QueryEncoder.step, cache, text, token, position
    )
    return logits, (state[0], _swapped(text))

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


def example_keys(inputs: Inputs, rng: jax.Array) -> Keys:
  """One key per example, by its own number."""
  b = len(next(iter(inputs.values())))
  index = inputs.get("index", jnp.arange(b, dtype=jnp.uint32))
  return masking.example_keys(rng, index)


def _swapped(caches: Any) -> Any:
  """Depth first <-> batch first."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1), caches)
