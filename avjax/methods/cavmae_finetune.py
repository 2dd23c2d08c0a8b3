"""The classifier that CAV-MAE fine-tunes (arXiv:2210.07839, public code).

The encoder of pretraining without masks, and a LayerNorm and a linear layer on
the mean over all tokens: 512 of sound and 196 of an image count 512 : 196. No
dropout, no stochastic depth. The passes through the joint block by mode:

| mode | tokens | LayerNorms of the joint block | what the classifier reads |
|---|---|---|---|
| av | both | unified | mean |
| a, v | one | those of the modality | mean |
| missing_v, missing_a | one | both sets | mean of both means |

`missing_v` says that the *video* is missing from a model trained with both
(the public code's `missingaudioonly`: audio alone is there); `missing_a` that
the audio is. Only av trains the unified LayerNorms, and it leaves those of the
modalities as they were pretrained.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avjax import losses
from avjax.errors import InputError, lookup
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import CAVMethod, present
from avjax.methods.cavmae_config import finetune_model as default_model
from avjax.nn import cav_encoder, heads
from avjax.nn.cav_encoder import ALONE, INPUTS, MODALITIES, TOGETHER, Pass
from avjax.optim import FROZEN

__all__ = ["CAVMAEFinetune", "default_model"]

PASSES: dict[str, list[Pass]] = {
  "av": [TOGETHER],
  "a": [ALONE["audio"]],
  "v": [ALONE["video"]],
  "missing_v": [("", ("audio",)), ALONE["audio"]],
  "missing_a": [("", ("video",)), ALONE["video"]],
}
MODES = {"av": tuple(PASSES), "a": ("av", "a"), "v": ("av", "v")}


class CAVMAEFinetune(CAVMethod):
  """Fine-tuning; `config.model` as `cavmae_config.finetune_model` has it.

  The classifier's parameters are of the group `head`. A model of one modality
  answers in mode 'av', too, from what it has.
  """

  def __init__(self, config: Any):
    super().__init__(config)
    self.modality = self.model.modality
    self.modes = MODES[self.modality]
    self.passes = PASSES[self.modality]
    self.classes = heads.classes(config)
    if "segment" in self.classes:
      raise InputError("CAV-MAE pools all tokens: it has no segment head")
    self.criterion = criterion(config)

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; the branches of the modalities in the inputs."""
    chosen(inputs, MODALITIES[self.modality])
    rng, key = jax.random.split(rng)
    params = self.draw_params(rng, inputs, self.encoder(inputs))
    d, k = self.size.width, sum(self.classes.values())
    bound = (6 / (d + k)) ** 0.5  # Xavier
    kernel = jax.random.uniform(key, (d, k), minval=-bound, maxval=bound)
    norm = {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
    out = {"kernel": kernel, "bias": jnp.zeros(k)}
    return {**params, "classifier": {"norm": norm, "out": out}}

  def pooled(
    self, params: Params, inputs: Inputs, mode: str
  ) -> Float[Array, "b d"]:
    """What the classifier reads in a mode."""
    passes = PASSES[self.modality if mode == "av" else mode]
    inputs = chosen(inputs, passes[0][1])
    tokens = self.apply(self.encoder(inputs), params, inputs, passes)
    means = [x.astype(jnp.float32).mean(1) for x in tokens]
    return sum(means) / len(means)

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The mean over heads and over examples.

    Examples that lack a modality that is trained do not count.
    """
    del rng, step
    pooled = self.pooled(params, inputs, "av")
    if self.model.freeze_base:
      pooled = jax.lax.stop_gradient(pooled)
    logits = classify(params["classifier"], pooled)
    weight = self.mixed(inputs)
    counted = present(inputs, MODALITIES[self.modality])
    metrics = {}
    for head, x in heads.split(logits, self.classes).items():
      labels = inputs["label" if head == "label" else f"label/{head}"]
      labels = losses.assign_labels(labels, self.model.label_smoothing, weight)
      values = cross_entropy(self.criterion, x, labels)
      metrics[f"loss_{head}"] = losses.weighted_mean(values, counted)
    aux = {"metrics": metrics, "intermediates": {"logits": logits}}
    return sum(metrics.values()) / len(metrics), aux

  def mixed(self, inputs: Inputs) -> Float[Array, "b"] | None:
    """The mixup weight of the labels: the mean over what is trained."""
    names = [f"mix/{m}" for m in MODALITIES[self.modality]]
    told = [inputs[name] for name in names if name in inputs]
    return sum(told) / len(told) if told else None

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """See `Method.predict` and the table above.

    In mode 'av' of a model of two modalities, an example that lacks one
    (`has_audio`, `has_video`) is answered as by missing_a or missing_v; these
    passes are computed only if the batch has such examples.
    """
    lookup(dict.fromkeys(self.modes), mode, "mode of predict")
    pooled = self.pooled(params, inputs, mode)
    if mode == self.modality == "av":
      for m in INPUTS:
        if f"has_{m}" in inputs:
          lacks = ~inputs[f"has_{m}"]
          pooled = self.replace(params, inputs, pooled, m, lacks)
    logits = classify(params["classifier"], pooled)
    return heads.split(logits, self.classes)

  def replace(
    self,
    params: Params,
    inputs: Inputs,
    pooled: Float[Array, "b d"],
    m: str,
    lacks: Bool[Array, "b"],
  ) -> Float[Array, "b d"]:
    """`pooled`, by the mode for a missing modality m where it is lacking."""

    def alone():
      mode = {"audio": "missing_a", "video": "missing_v"}[m]
      other = self.pooled(params, inputs, mode)
      return jnp.where(lacks[:, None], other, pooled)

    return jax.lax.cond(lacks.any(), alone, lambda: pooled)

  def group(self, path: str) -> str:
    """`head` for the classifier; FROZEN as in `CAVMethod`, or all the rest."""
    if path.startswith("classifier/"):
      return "head"
    return FROZEN if self.model.freeze_base else super().group(path)


# --- Shared with AVSiam's fine-tuning ----------------------------------------


def chosen(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
  """The inputs of the named modalities.

  Raises:
    InputError: one of them is not there.
  """
  for m in names:
    if INPUTS[m] not in inputs:
      raise InputError(f"the inputs have no {INPUTS[m]!r} for the {m}")
  return {INPUTS[m]: inputs[INPUTS[m]] for m in names}


def classify(
  classifier: Params, pooled: Float[Array, "b d"], eps: float = cav_encoder.EPS
) -> Float[Array, "b k"]:
  """Logits of all heads, in float32: LayerNorm, then a linear layer."""
  norm = classifier["norm"]
  scale, bias = (jnp.float32(norm[name]) for name in ("scale", "bias"))
  x = pooled - pooled.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
  return heads.project(classifier["out"], x * scale + bias)


def criterion(config: Any) -> str:
  """bce or ce: what `model.loss` says, or goes with the data set's labels."""
  kinds = {"auto": "bce" if config.data.multilabel else "ce"}
  return kinds.get(config.model.loss, config.model.loss)


def cross_entropy(
  kind: str, logits: Float[Array, "b k"], labels: Float[Array, "b k"]
) -> Float[Array, "b"]:
  """Per example: mean of binary cross-entropies (bce), or cross-entropy."""
  if kind == "bce":
    return losses.sigmoid_cross_entropy(logits, labels, mean=True)
  return losses.softmax_cross_entropy(logits, labels)
