"""DETECLAP: CAV-MAE that also names the objects of a clip (arXiv:2409.11729).

Two linear heads read the vectors that the contrastive loss compares, one a
modality, and predict object labels that other models found (§III):

  L = L_c + L_r + L_a2l + L_v2l                                     (eq. 11)

with binary cross-entropy, here the mean over the labels. The labels come as
scores, `objects/audio` (CLAP cosines) and `objects/video` (largest detection
probability over ten frames). What the heads learn of them is
`config.model.labels`:

| labels | audio head learns | video head learns | paper |
|---|---|---|---|
| or, and | both merged | both merged | Table I, OR, AND |
| audio, visual | one modality's | the same | Table I |
| separate | audio's | video's | Table I |
| soft_audio, soft_visual | one modality's scores | the same | Table III |
| soft_max | the larger score | the same | Table III |

A hard label is a score above its modality's threshold. A clip without scores of
a modality (NaN) has no label from it: `or` and `soft_max` take what the other
one says, all else leaves the clip out of the loss.

What the paper leaves open: the mean over labels, a bias in the heads, and soft
labels of cosines below 0, which count as 0.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from avjax import losses
from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.methods import cavmae
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import present
from avjax.methods.pretraining import Rows
from avjax.nn.cav_encoder import ALONE, INPUTS

SCORES = {m: f"objects/{m}" for m in INPUTS}
Target = tuple[Float[Array, "b k"], Bool[Array, "b"]]

# Modalities whose scores are needed.
LABELS = {
  "or": ("audio", "video"),
  "and": ("audio", "video"),
  "separate": ("audio", "video"),
  "audio": ("audio",),
  "visual": ("video",),
  "soft_audio": ("audio",),
  "soft_visual": ("video",),
  "soft_max": ("audio", "video"),
}


def default_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model`: CAV-MAE's keys and those of the label loss.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    **cavmae.default_model(size).to_dict(),
    "labels": "or",  # see LABELS
    "objects": 0,  # how many labels there are; 0 = as the scores say
    "threshold_audio": 0.5,
    "threshold_video": 0.4,
    "label_weight": 1.0,  # of L_a2l + L_v2l
  }
  return with_overrides(values, overrides)


class DETECLAP(cavmae.CAVMAE):
  """Pretraining; `config.model` as `default_model` has it."""

  optional = (*cavmae.CAVMAE.optional, "objects_")

  def __init__(self, config: Any):
    super().__init__(config)
    self.needed = lookup(LABELS, self.model.labels, "model.labels")
    for m in INPUTS:
      threshold = self.model[f"threshold_{m}"]
      if not 0 <= threshold <= 1:
        raise InputError(
          f"model.threshold_{m}={threshold}: thresholds lie between 0 and 1"
        )
    if self.model.label_weight < 0:
      raise InputError(
        f"model.label_weight={self.model.label_weight} must not be below 0"
      )
    # The heads read what these passes give, whatever the contrast's weight.
    self.passes += [p for p in ALONE.values() if p not in self.passes]

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; a head has an output for each label.

    Raises:
      InputError: neither the config nor scores among the inputs say how many.
    """
    count = self.model.objects
    if not count:
      self._check(inputs)
      count = inputs[SCORES[self.needed[0]]].shape[1]
    params = super().init(rng, inputs)
    head = nn.Dense(count, kernel_init=nn.initializers.xavier_uniform())
    blank = jnp.zeros((1, self.size.width))
    for k, m in enumerate(INPUTS):
      key = jax.random.fold_in(rng, k)
      params[f"objects_{m}"] = head.init(key, blank)["params"]
    return params

  def _check(self, inputs: Inputs) -> None:
    for m in self.needed:
      if SCORES[m] not in inputs:
        raise InputError(
          f"model.labels={self.model.labels!r} needs {m} scores of objects: "
          "data.object_scores names their folder, which `python -m "
          "data_prep.object_labels` makes"
        )
    if any(f"mix/{m}" in inputs for m in INPUTS):
      raise InputError(
        "data.augment.mixup mixes clips, but not their object labels; "
        "set it to 0.0"
      )

  def example_rows(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> tuple[Rows, dict[str, jax.Array]]:
    """CAV-MAE's, and of each modality 'labels/<m>' [b 3].

    They are binary cross-entropy (eq. 8, 9), number of labels, and whether the
    clip has any to learn from.
    """
    self._check(inputs)
    rows, seen = super().example_rows(params, inputs, rng)
    for m, (target, known) in self.targets(inputs).items():
      logits = seen[f"objects/{m}"] = objects(params, m, seen[f"contrast/{m}"])
      terms = losses.sigmoid_cross_entropy(logits, target, mean=True)
      rows[f"labels/{m}"] = jnp.stack([terms, target.sum(-1), known], axis=1)
    return rows, seen

  def loss_of_rows(
    self, params: Params, rows: Mapping[str, Array], inputs: Inputs
  ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """CAV-MAE's losses and label_weight (L_a2l + L_v2l); eq. 10 and 11.

    Metrics: the losses, and `labels_<m>`, how many labels a clip has.
    """
    total, metrics = super().loss_of_rows(params, rows, inputs)
    for m in (m for m in INPUTS if f"labels/{m}" in rows):
      terms, count, known = rows[f"labels/{m}"].T
      weights = known * present(inputs, (m,))
      loss = losses.weighted_mean(terms, weights)
      total = total + self.model.label_weight * loss
      metrics[f"loss_labels_{m}"] = loss
      metrics[f"labels_{m}"] = losses.weighted_mean(count, weights)
    return total, metrics

  def targets(self, inputs: Inputs) -> dict[str, Target]:
    """What the head of each modality learns, and for which clips (§III-D)."""
    model, labels = self.model, self.model.labels
    scores = {m: inputs[SCORES[m]].astype(jnp.float32) for m in self.needed}
    if labels.startswith("soft_"):
      found = {m: soft(x) for m, x in scores.items()}
    else:
      found = {m: hard(x, model[f"threshold_{m}"]) for m, x in scores.items()}
    if labels == "separate":
      return found
    # Without a label means 0 in both, so that the other one decides.
    values, known = zip(*found.values(), strict=True)
    merge = jnp.minimum if labels == "and" else jnp.maximum
    told = jnp.logical_and if labels == "and" else jnp.logical_or
    target = values[0], known[0]
    if len(values) == 2:
      target = merge(*values), told(*known)
    return dict.fromkeys(INPUTS, target)

  def group(self, path: str) -> str:
    """See `CAVMAE.group`; heads are of the group `head`."""
    return "head" if path.startswith("objects_") else super().group(path)


def objects(
  params: Params, m: str, pooled: Float[Array, "b d"]
) -> Float[Array, "b k"]:
  """Logits of the labels from one modality's contrastive vector (eq. 8, 9)."""
  head: Mapping[str, Array] = params[f"objects_{m}"]
  logits = pooled.astype(head["kernel"].dtype) @ head["kernel"] + head["bias"]
  return logits.astype(jnp.float32)


def hard(scores: Float[Array, "b k"], threshold: float) -> Target:
  """1 where a score is above the threshold; which clips have scores."""
  return (scores > threshold).astype(jnp.float32), _known(scores)


def soft(scores: Float[Array, "b k"]) -> Target:
  """Scores as probabilities, 0 for clips without; which clips have them."""
  known = _known(scores)
  return jnp.where(known[:, None], jnp.clip(scores, 0, 1), 0.0), known


def _known(scores: Float[Array, "b k"]) -> Bool[Array, "b"]:
  return ~jnp.isnan(scores).any(axis=1)
