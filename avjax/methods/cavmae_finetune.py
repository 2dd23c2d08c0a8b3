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

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax.errors import InputError, lookup
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import CAVMethod, where_missing
from avjax.methods.cavmae_config import finetune_model as default_model
from avjax.methods.supervised import chosen, classify, criterion, objective
from avjax.nn import heads
from avjax.nn.cav_encoder import ALONE, MODALITIES, TOGETHER, Pass
from avjax.optim import FROZEN

__all__ = ["CAVMAEFinetune", "default_model"]

PASSES: dict[str, list[Pass]] = {
  "av": [TOGETHER],
  "a": [ALONE["audio"]],
  "v": [ALONE["video"]],
  "missing_v": [("", ("audio",)), ALONE["audio"]],
  "missing_a": [("", ("video",)), ALONE["video"]],
}
# By the modality that an example lacks.
OTHERS = {"audio": "missing_a", "video": "missing_v"}
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
    loss, metrics = objective(self, logits, inputs, MODALITIES[self.modality])
    return loss, {"metrics": metrics, "intermediates": {"logits": logits}}

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
      answer = functools.partial(self.pooled, params, inputs)
      pooled = where_missing(answer, inputs, pooled, OTHERS)
    logits = classify(params["classifier"], pooled)
    return heads.split(logits, self.classes)

  def group(self, path: str) -> str:
    """`head` for the classifier; FROZEN as in `CAVMethod`, or all the rest."""
    if path.startswith("classifier/"):
      return "head"
    return FROZEN if self.model.freeze_base else super().group(path)
