"""What methods that learn from labels share: pooling's end, labels, losses."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax import losses
from avjax.errors import InputError
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import present
from avjax.nn import cav_encoder, heads
from avjax.nn.cav_encoder import INPUTS


def objective(
  method: Any,
  logits: Float[Array, "b k"],
  inputs: Inputs,
  names: Sequence[str],
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
  """The mean over heads and examples, and `loss_<head>`.

  Examples that lack a modality do not count. Labels of mixed clips are mixed
  with the mean weight of the modalities.

  Args:
    method: has `classes`, `criterion` and `model.label_smoothing`.
    logits: of all heads.
    inputs: labels, `mix/*` and `has_*`.
    names: the modalities that are trained.
  """
  weight = mixed(inputs, names)
  counted, found = present(inputs, tuple(names)), {}
  for head, x in heads.split(logits, method.classes).items():
    labels = inputs["label" if head == "label" else f"label/{head}"]
    labels = losses.assign_labels(labels, method.model.label_smoothing, weight)
    values = cross_entropy(method.criterion, x, labels)
    found[f"loss_{head}"] = losses.weighted_mean(values, counted)
  return sum(found.values()) / len(found), found


def mixed(inputs: Inputs, names: Sequence[str]) -> Float[Array, "b"] | None:
  """The mixup weight of the labels: the mean over what is trained."""
  told = [inputs[f"mix/{m}"] for m in names if f"mix/{m}" in inputs]
  return sum(told) / len(told) if told else None


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
