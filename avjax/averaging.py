"""Averages of a run's weights, which are what is evaluated and published.

`config.optimizer.average` names one: `none`, `ema` or `epochs`; see `init`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from avjax.errors import lookup
from avjax.methods.base import Params


def init(section: Any, params: Params) -> dict[str, Any]:
  """The state of `config.optimizer.average`; {} for `none`.

  `ema`: `mean <- ema_decay * mean + (1 - ema_decay) * w` after every step,
  from the initial weights on. `epochs`: the plain mean of the weights at the
  ends of the epochs `average_from`, `average_from` + 1, … (the first epoch is
  1); before the first of them `mean` follows the live weights.

  Raises:
    InputError: an unknown `optimizer.average`.
  """
  lookup(_AVERAGES, section.average, "optimizer.average")
  if section.average == "none":
    return {}
  # Copies: the step donates the live parameters.
  mean = {"mean": jax.tree.map(jnp.array, params)}
  if section.average == "ema":
    return mean
  return {**mean, "count": jnp.zeros((), jnp.int32)}


def update(
  section: Any,
  state: Mapping[str, Any],
  params: Params,
  step: int | jax.Array,
  steps_per_epoch: int,
) -> dict[str, Any]:
  """The state after `step` steps, `params` being their result. Jit-safe."""
  function = lookup(_AVERAGES, section.average, "optimizer.average")
  return function(section, state, params, step, steps_per_epoch)


def averaged(section: Any, state: Mapping[str, Any], live: Params) -> Params:
  """What to evaluate and publish: the mean, or `live` where there is none."""
  return live if section.average == "none" else state["mean"]


def _moving_average(section, state, params, step, steps_per_epoch):
  share = 1.0 - section.ema_decay
  return {"mean": optax.incremental_update(params, state["mean"], share)}


def _epoch_mean(section, state, params, step, steps_per_epoch):
  step, epoch = jnp.asarray(step), jnp.asarray(step) // steps_per_epoch
  ends = (step % steps_per_epoch == 0) & (epoch >= section.average_from)
  count = state["count"] + ends
  share = jnp.where(ends, 1.0 / jnp.maximum(count, 1), 0.0)
  # `m + 1 * (w - m)` is not exactly w, hence the second choice.
  mean = jax.tree.map(
    lambda m, w: jnp.where(count <= ends, w, m + share * (w - m)),
    state["mean"],
    params,
  )
  return {"mean": mean, "count": count}


_AVERAGES = {
  "none": lambda *_: {},
  "ema": _moving_average,
  "epochs": _epoch_mean,
}
