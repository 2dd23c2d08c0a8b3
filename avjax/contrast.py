"""The contrast of pretraining by `config.model`: which loss, which numbers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from avjax import losses
from avjax.errors import InputError, lookup

LOSSES = ("softmax", "sigmoid")
STACK = "contrast"  # the parameters' name

# Keys of `config.model`; earlier configs have none of them.
KEYS = {
  # softmax = InfoNCE; sigmoid = SigLIP's (arXiv:2303.15343), both ways at
  # once, whatever contrast_two_way says.
  "contrast_loss": "softmax",
  # Added to cosine / temperature by sigmoid; SigLIP starts with -10 and
  # temperature 0.1.
  "sigmoid_bias": -10.0,
  "sigmoid_learned": True,  # both numbers, from these first values on
}


def check(model: Any) -> None:
  """Looks at the keys of `KEYS` and the temperature.

  Raises:
    InputError: an unknown loss, or a temperature that is not positive.
  """
  lookup(dict.fromkeys(LOSSES), kind(model), "model.contrast_loss")
  if model.temperature <= 0:
    raise InputError(
      f"model.temperature={model.temperature}: cosines are divided by it, so "
      "it must be above 0"
    )


def kind(model: Any) -> str:
  """One of LOSSES."""
  return model.get("contrast_loss", KEYS["contrast_loss"])


def first_params(model: Any) -> dict[str, dict[str, Float[Array, ""]]]:
  """Parameters of the contrast; none unless `sigmoid` learns.

  They are changes of log(1 / temperature) and of the bias, so zeros, which
  keeps them exact in bfloat16 where the numbers themselves are not.
  """
  learns = kind(model) == "sigmoid" and model.sigmoid_learned
  if not (learns and model.contrast_weight):
    return {}
  return {STACK: {"log_scale": jnp.zeros(()), "bias": jnp.zeros(())}}


def info(path: str, found: Any) -> Any:
  """A parameter's `ParamInfo`; the contrast's numbers are a group of their own.

  It is called STACK (`optimizer.multipliers`) and does not decay.
  """
  if not path.startswith(f"{STACK}/"):
    return found
  return dataclasses.replace(found, group=STACK, decay=False)


def loss(
  model: Any,
  anchors: Float[Array, "b d"],
  candidates: Float[Array, "b d"],
  weights: Shaped[Array, "b"] | None,
  params: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The loss and its accuracy as `model` has it.

  Args:
    model: `config.model`.
    anchors: pooled vectors of any length.
    candidates: the pair of anchor i is candidate i.
    weights: an example of weight 0 is neither anchor nor candidate.
    params: of the method; None = the first values.

  Raises:
    InputError: a batch that `model.group_size` does not divide.
  """
  pair = anchors, candidates
  more = {"group_size": model.get("group_size", 0), "weights": weights}
  if kind(model) == "softmax":
    two_way = model.contrast_two_way
    return losses.contrastive(*pair, model.temperature, two_way=two_way, **more)
  temperature, bias = model.temperature, model.sigmoid_bias
  learned = (params or {}).get(STACK)
  if learned:
    scale = losses.at_least_float32(learned["log_scale"])
    temperature = temperature * jnp.exp(-scale)
    bias = bias + losses.at_least_float32(learned["bias"])
  return losses.sigmoid_contrastive(*pair, temperature, bias, **more)
