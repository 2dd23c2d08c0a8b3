"""What CAV-MAE's and AVSiam's pretraining share: contrast and reconstruction.

The objective is in two halves: `example_rows` holds what each example has by
itself, a few numbers and vectors; `loss_of_rows` compares them over the whole
batch. So gradients can be cached between the two, see `avjax.grad_cache`.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from avjax import contrast, losses
from avjax.methods.base import Inputs, ParamInfo, Params
from avjax.methods.cavmae_base import PatchMethod, present
from avjax.nn import cav_encoder
from avjax.nn.cav_encoder import INPUTS, Tokens

# By name: `contrast/<m>` [b d], `errors/<m>` [b 2].
Rows = dict[str, Array]


class Pretraining(PatchMethod):
  """mae_weight (L_a + L_v) + contrast_weight L_c.

  To be named before the base class that has the encoder.

  Attributes:
    pair: whose vectors are anchors, and whose are candidates.
  """

  pair: tuple[str, str] = ("video", "audio")

  def example_rows(
    self, params: Params, inputs: Inputs, rng: jax.Array
  ) -> tuple[Rows, dict[str, jax.Array]]:
    """The first half of the loss.

    Args:
      params, inputs: of `loss`.
      rng: of the step; what an example draws follows from its number alone.

    Returns:
      'contrast/<m>' [b d], pooled, if there is a contrast; 'errors/<m>' of
      `losses.masked_errors` if there is a reconstruction; intermediates.
    """
    raise TypeError(f"{type(self).__name__} does not define example_rows")

  def loss_of_rows(
    self, params: Params, rows: Mapping[str, Array], inputs: Inputs
  ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """The second half of the loss, and the metrics.

    Args:
      params: of `loss`.
      rows: of `example_rows`, of the whole batch.
      inputs: its flags `valid` and `has_<m>`; more is not needed.

    Raises:
      InputError: a batch that `model.group_size` does not divide.
    """
    model, total, metrics = self.model, 0.0, {}
    if model.mae_weight:
      for m in INPUTS:
        weights = present(inputs, (m,))
        errors = rows[f"errors/{m}"]
        metrics[f"loss_{m}"] = losses.mean_error(errors, weights)
      total = model.mae_weight * sum(metrics.values())
    if model.contrast_weight:
      pooled = {m: rows[f"contrast/{m}"] for m in INPUTS}
      loss, accuracy = self.contrast(pooled, inputs, params)
      total = total + model.contrast_weight * loss
      metrics["loss_contrast"] = loss
      metrics["contrast_accuracy"] = accuracy
    return total, metrics

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Method.loss`: both halves."""
    del step
    rows, seen = self.example_rows(params, inputs, rng)
    loss, metrics = self.loss_of_rows(params, rows, inputs)
    return loss, {"metrics": metrics, "intermediates": seen}

  def contrast(
    self,
    pooled: Mapping[str, Float[Array, "b d"]],
    inputs: Inputs,
    params: Params | None = None,
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """L_c and its accuracy, `pair`'s first over the second."""
    pair = [pooled[m] for m in self.pair]
    weights = present(inputs, tuple(INPUTS))
    return contrast.loss(self.model, *pair, weights, params)

  def errors(
    self,
    prediction: Tokens,
    inputs: Inputs,
    removed: Mapping[str, Bool[Array, "b n"]],
  ) -> tuple[Rows, dict[str, jax.Array]]:
    """Of the removed patches, 'errors/<m>'; targets and masks.

    Args:
      prediction: of every patch.
      inputs: the clips.
      removed: which patches count.
    """
    rows, seen = {}, {}
    for m, x in cav_encoder.patches(inputs, self.model).items():
      target, _, _ = cav_encoder.standardise(m, x, self.model)
      seen[f"target/{m}"], seen[f"removed/{m}"] = target, removed[m]
      errors = losses.masked_errors(prediction[m], target, removed[m])
      rows[f"errors/{m}"] = errors
    return rows, seen

  def first_params(self, params: Params) -> Params:
    """Parameters of the modules with those of the contrast."""
    return {**params, **contrast.first_params(self.model)}

  def param_info(self, path: str) -> ParamInfo:
    """See `Method.param_info`; the contrast's numbers do not decay."""
    return contrast.info(path, super().param_info(path))
