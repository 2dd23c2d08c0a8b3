"""Optimisers, learning rates and gradient accumulation.

One step, in this order, whatever the optimiser:

1. groups that do not train drop out: they count in no norm;
2. the gradient is clipped by its global norm;
3. `adam_l2` and `sgd` add `weight_decay * w` to it (coupled, as in PyTorch);
4. moments, with one step count per parameter group;
5. `w <- w - rate * direction`, where `rate` is the schedule's value times
   the parameter's scale (layer-wise decay times its group's multiplier);
6. `adam` alone: `w <- (1 - rate * weight_decay) w`, after that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from avjax import trees
from avjax.errors import InputError, lookup, unknown
from avjax.methods.base import ParamInfo, Params

Schedule = Callable[[Any], Any]  # step -> Float[Array, ""], the learning rate

# Parameters of this group never train and own no moments, unless a multiplier
# is set for it: fixed position tables, a branch that no pass uses.
FROZEN = "frozen"


# --- Learning rate -----------------------------------------------------------


def schedule(
  section: Any,
  *,
  batch_size: int,
  steps_per_epoch: int | float,
  total_steps: int,
) -> Schedule:
  """The learning rate by step.

  Linear warm-up from 0, then a cosine to `end_lr`, a constant, or a factor at
  each of `step_epochs` (with 15, the 16th epoch is the first at the lower
  rate). Scenic's cosine restarts at `total_steps`; this one stays.

  Args:
    section: `config.schedule`.
    batch_size: global; the rate is `base_lr * batch_size / lr_batch`.
    steps_per_epoch: turns epochs into steps, which are rounded.
    total_steps: the cosine's end.

  Raises:
    InputError: an unknown name, two warm-ups, or one longer than the run.
  """
  if section.warmup_steps and section.warmup_epochs:
    raise InputError(
      f"schedule.warmup_steps={section.warmup_steps} and "
      f"schedule.warmup_epochs={section.warmup_epochs} are both set; set one"
    )
  warmup = section.warmup_steps or round(
    section.warmup_epochs * steps_per_epoch
  )
  if warmup > total_steps:
    raise InputError(
      f"schedule: the warm-up takes {warmup} steps, the run {total_steps}"
    )
  peak = section.base_lr * batch_size / (section.lr_batch or batch_size)
  last = section.end_lr / section.base_lr if section.end_lr else 0.0

  def cosine(step):
    decay = optax.cosine_decay_schedule(
      1.0, max(total_steps - warmup, 1), alpha=last
    )
    return decay(jnp.maximum(step - warmup, 0))

  steps = [round(e * steps_per_epoch) for e in section.step_epochs]
  shapes = {
    "cosine": cosine,
    "constant": optax.constant_schedule(1.0),
    "step": optax.piecewise_constant_schedule(
      1.0, {s: section.step_factor for s in steps}
    ),
  }
  shape = lookup(shapes, section.name, "schedule.name")

  def rate(step):
    step = jnp.asarray(step)
    ramp = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
    return jnp.asarray(peak * ramp * shape(step), jnp.float32)

  return rate


# --- Optimiser ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Leaf:
  """How one live parameter is treated.

  Attributes:
    group: its step count and multiplier.
    scale: float32 [] or, if layers are stacked, [layers].
    decay: 1 where weight decay applies, else 0; shaped like `scale`.
  """

  group: str
  scale: np.ndarray
  decay: np.ndarray


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Made by `make`; its functions are pure and run under jit.

  The state is a nested dict: `step`, and `count` (by group), `mu` and `nu` of
  Adam or `trace` of SGD. Moments lie under the parameters' own paths, so that
  sharding rules and layer stacking apply to them as to parameters. Groups
  with multiplier 0 have no entry.
  """

  plan: Mapping[str, _Leaf]
  frozen: frozenset[str]
  moments: optax.GradientTransformation
  learning_rate: Schedule
  clip_norm: float
  decay: float
  coupled: bool

  def init(self, params: Params) -> dict[str, Any]:
    """Zero moments and counts for live (stacked or per-layer) parameters.

    Raises:
      InputError: a path differs from those that `make` saw.
    """
    leaves = trees.flatten(params)
    stray = sorted(set(leaves) ^ set(self.plan))
    if stray:
      where = "parameters" if stray[0] in leaves else "optimiser's plan"
      raise InputError(f"parameter {stray[0]!r} is in the {where} alone")
    groups = self._split(leaves)
    states = {name: self.moments.init(g) for name, g in groups.items()}
    return {"step": jnp.zeros((), jnp.int32), **_merge(states)}

  def update(
    self,
    grads: Params,
    state: Mapping[str, Any],
    params: Params,
    trainable: Mapping[str, Any] | None = None,
  ) -> tuple[Params, dict[str, Any], dict[str, Float[Array, ""]]]:
    """One step.

    Args:
      grads: tree like `params`.
      state: of `init` or the last `update`.
      params: the live parameters.
      trainable: group -> bool (array). A group that is false keeps its
        parameters, moments and count, and does not decay; `step`, which the
        schedule reads, counts on. A group not named trains.

    Returns:
      The new parameters, the new state, and metrics: `grad_norm`, the global
      norm over all that trains, before clipping.

    Raises:
      InputError: an unknown group in `trainable`.
    """
    flags = dict(trainable or {})
    weights = trees.flatten(params)
    grads, norm = self._prepare(trees.flatten(grads), flags)
    rate = self.learning_rate(state["step"])
    old = _unmerge(state, grads, self.moments)
    live, new = dict(weights), {}
    for group, gradient in grads.items():
      coupled = self._coupled(gradient, weights)
      direction, after = self.moments.update(coupled, old[group])
      moved = {
        path: self._move(path, weights[path], d, rate)
        for path, d in direction.items()
      }
      if group in flags:
        moved = _where(flags[group], moved, {p: weights[p] for p in moved})
        after = _where(flags[group], after, old[group])
      live.update(moved)
      new[group] = after
    live = jax.tree.unflatten(jax.tree.structure(params), live.values())
    state = {"step": state["step"] + 1, **_merge(new)}
    return live, state, {"grad_norm": norm}

  def _split(self, leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
      group = self.plan[path].group
      if group not in self.frozen:
        groups.setdefault(group, {})[path] = leaf
    return groups

  def _prepare(self, grads, flags):
    """Gradients by group, clipped, and their norm before that."""
    known = {leaf.group for leaf in self.plan.values()}
    groups = self._split(grads)
    for name, flag in flags.items():
      if name not in known:
        raise unknown("parameter group in aux['trainable']", name, known)
      # Out of the norm, whatever it is: PyTorch has no gradient there at all.
      if name in groups:
        groups[name] = {
          path: jnp.where(flag, g, 0.0) for path, g in groups[name].items()
        }
    norm = optax.tree.norm(groups)
    if self.clip_norm:
      clip = optax.clip_by_global_norm(self.clip_norm)
      groups, _ = clip.update(groups, clip.init(groups))
    return groups, norm

  def _decay(self, path, weight):
    return self.decay * _spread(self.plan[path].decay, weight)

  def _coupled(self, grads, weights):
    if not (self.decay and self.coupled):
      return grads
    return {
      p: g + self._decay(p, weights[p]) * weights[p] for p, g in grads.items()
    }

  def _move(self, path, weight, direction, rate):
    rate = rate * _spread(self.plan[path].scale, weight)
    weight = weight - rate * direction
    if self.decay and not self.coupled:
      weight = (1.0 - rate * self._decay(path, weight)) * weight
    return weight


def make(
  section: Any,
  learning_rate: Schedule,
  params: Params,
  param_info: Callable[[str], ParamInfo],
  num_layers: int,
  *,
  stack: Callable[[Params], Params] | None = None,
) -> Optimizer:
  """The optimiser of a config.

  Args:
    section: `config.optimizer`. `adam` decays decoupled, `adam_l2` and `sgd`
      coupled. `sgd` is plain momentum: `t = g + m t`, `w -= rate t`.
    learning_rate: of `schedule`.
    params: tree of arrays or shapes under per-layer names.
    param_info: of the method.
    num_layers: of the method.
    stack: turns a tree under per-layer names, of scalars too, into the form
      of the live parameters, when layers are stacked for a scan.

  Raises:
    InputError: an unknown optimiser; a multiplier of a group that no
      parameter has; a layer outside 0..num_layers+1 under layer-wise decay;
      stacked layers of different groups.
  """
  adam = optax.scale_by_adam(section.b1, section.b2, section.eps)
  table = {"adam": adam, "adam_l2": adam, "sgd": optax.trace(section.momentum)}
  moments = lookup(table, section.name, "optimizer.name")
  infos = {path: param_info(path) for path in trees.flatten(params)}
  multipliers = _multipliers(section, infos)
  scales = {
    path: multipliers[info.group]
    * _layer_scale(section, path, info, num_layers)
    for path, info in infos.items()
  }
  return Optimizer(
    plan=_plan(infos, scales, stack or (lambda tree: tree)),
    frozen=frozenset(g for g, factor in multipliers.items() if factor == 0),
    moments=moments,
    learning_rate=learning_rate,
    clip_norm=float(section.clip_norm),
    decay=float(section.weight_decay),
    coupled=section.name != "adam",
  )


def _multipliers(section, infos) -> dict[str, float]:
  groups = {info.group for info in infos.values()}
  for name in section.multipliers:
    if name not in groups:
      raise unknown("parameter group in optimizer.multipliers", name, groups)
  defaults = {g: 0.0 if g == FROZEN else 1.0 for g in groups}
  return {**defaults, **dict(section.multipliers)}


def _layer_scale(section, path, info, num_layers) -> float:
  if section.layer_decay == 1:
    return 1.0
  if not 0 <= info.layer <= num_layers + 1:
    raise InputError(
      f"layer {info.layer} of parameter {path!r} is outside "
      f"0..{num_layers + 1}, which layer-wise decay counts with"
    )
  return section.layer_decay ** (num_layers + 1 - info.layer)


def _plan(infos, scales, stack) -> dict[str, _Leaf]:
  """Per-layer facts in the form of the live parameters."""
  names = sorted({info.group for info in infos.values()})

  def live(values):
    values = {path: np.float32(v) for path, v in values.items()}
    return trees.flatten(stack(trees.unflatten(values)))

  groups = live({p: names.index(i.group) for p, i in infos.items()})
  decays = live({p: i.decay for p, i in infos.items()})
  plan = {}
  for path, scale in live(scales).items():
    members = {names[int(code)] for code in np.ravel(groups[path])}
    if len(members) > 1:
      raise InputError(
        f"the layers stacked in parameter {path!r} belong to several groups: "
        f"{', '.join(sorted(members))}; do not stack them"
      )
    plan[path] = _Leaf(
      members.pop(), np.asarray(scale), np.asarray(decays[path])
    )
  return plan


def _spread(values: np.ndarray, like: Any) -> np.ndarray:
  """[] or [layers] -> shape that broadcasts over the leading axis."""
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _where(flag, new, old):
  return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)


def _merge(states: Mapping[str, Any]) -> dict[str, Any]:
  """Optax states by group -> one tree per moment, one count per group."""
  merged: dict[str, Any] = {}
  for group, state in states.items():
    for name, value in state._asdict().items():
      # A moment is a dict by path; what is not one is the group's count.
      value = value if isinstance(value, dict) else {group: value}
      merged.setdefault(name, {}).update(value)
  return {name: trees.unflatten(leaves) for name, leaves in merged.items()}


def _unmerge(state, groups, moments) -> dict[str, Any]:
  """The inverse of `_merge`: optax states by group."""
  flat = {
    name: trees.flatten(tree) for name, tree in state.items() if name != "step"
  }
  states = {}
  for group, leaves in groups.items():
    blank = jax.eval_shape(moments.init, leaves)
    fields = {
      name: {p: flat[name][p] for p in leaves}
      if isinstance(value, dict)
      else flat[name][group]
      for name, value in blank._asdict().items()
    }
    states[group] = type(blank)(**fields)
  return states


# --- Gradient accumulation ---------------------------------------------------


def accumulate(
  loss_and_grad: Callable[[Params, Mapping[str, Any]], Any],
  params: Params,
  batch: Mapping[str, Any],
  n: int,
) -> tuple[tuple[Float[Array, ""], dict[str, Any]], Params]:
  """Loss, aux and gradient of a batch, computed in `n` parts one by one.

  Part i holds the examples i, i+n, i+2n, …, so a batch that is sharded over
  devices splits without moving data. Parts are weighted by their number of
  valid examples, so the result is the whole batch's where the loss is a mean
  over examples; a contrastive loss sees the negatives of its part alone. Where
  examples lack a modality, its loss is the mean over the parts' means, not over
  the examples that have it; a part in which none has it counts as 0.

  Args:
    loss_and_grad: (params, batch) -> ((loss, aux), grads), as made by
      `jax.value_and_grad(..., has_aux=True)`.
    params: the parameters.
    batch: arrays with the batch dimension first.
    n: number of parts; 1 calls `loss_and_grad` as it is.

  Returns:
    ((loss, aux), grads). Of `aux`, 'metrics' are averaged like the loss,
    'trainable' is true where any part says so, and the rest is dropped.

  Raises:
    InputError: the batch size is not divisible by `n`.
  """
  if n == 1:
    return loss_and_grad(params, batch)
  size = len(jax.tree.leaves(batch)[0])
  if size % n:
    raise InputError(f"batch size {size} is not divisible by {n} micro-batches")
  parts = jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(size // n, n, *x.shape[1:]), 0, 1),
    dict(batch),
  )

  def evaluate(part):
    (loss, aux), grads = loss_and_grad(params, part)
    valid = part.get("valid", jnp.ones((size // n,), bool))
    sums = (loss, aux.get("metrics", {}), grads)
    return jnp.sum(valid.astype(jnp.float32)), sums, aux.get("trainable", {})

  def body(carry, part):
    total, sums, flags = carry
    weight, values, trainable = evaluate(part)
    # A part of padding alone may divide 0 by 0.
    sums = jax.tree.map(
      lambda s, v: s + jnp.where(weight > 0, weight * v, 0.0), sums, values
    )
    flags = jax.tree.map(jnp.logical_or, flags, trainable)
    return (total + weight, sums, flags), None

  first = jax.tree.map(lambda x: x[0], parts)
  start = jax.tree.map(_zeros, jax.eval_shape(evaluate, first))
  (total, sums, flags), _ = jax.lax.scan(body, start, parts)
  loss, metrics, grads = jax.tree.map(lambda s: s / total, sums)
  return (loss, {"metrics": metrics, "trainable": flags}), grads


def _zeros(like):
  least = jnp.bool_ if like.dtype == jnp.bool_ else jnp.float32
  return jnp.zeros(like.shape, jnp.promote_types(like.dtype, least))
