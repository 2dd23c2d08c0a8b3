"""Builds all that a config names: mesh, method, optimiser, state and step.

Training, evaluation, the benchmark and the tests start from the same
`Experiment`, so none of them has a second way to do it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from avjax import averaging, grad_cache, methods, optim, parallel
from avjax.config import DTYPES, TRACKS
from avjax.data import augment, pipeline, text
from avjax.errors import InputError, lookup
from avjax.methods.base import Method
from avjax.nn import transformer

State = dict[str, Any]  # params, opt_state, average, step, rng


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config turns into; nothing in it has been computed yet.

  Attributes:
    config: the resolved config of one stage.
    mesh: the devices.
    method: the paper's model and objective.
    optimizer: see avjax.optim.
    learning_rate: step -> rate.
    total_steps: optimiser steps of the whole run.
    steps_per_epoch: as the schedule and the intervals count.
    batch_shapes: ShapeDtypeStructs of one training batch.
    state_shapes: ShapeDtypeStructs of the state, with shardings.
  """

  config: Any
  mesh: Mesh
  method: Method
  optimizer: Any
  learning_rate: Callable[[Any], Any]
  total_steps: int
  steps_per_epoch: int
  batch_shapes: dict[str, jax.ShapeDtypeStruct]
  state_shapes: State

  def prepare(
    self, batch: Any, rng: jax.Array, train: bool
  ) -> dict[str, jax.Array]:
    """Device batch -> inputs, see avjax.data.augment."""
    return augment.prepare(batch, self.config.data, rng, train)

  def ready(self, params: Any) -> Any:
    """Parameters as layers use them; see `cast` and `parallel.gathered`."""
    return parallel.gathered(cast(params, self.config.dtype), self.mesh)

  def init_state(self) -> State:
    """The first state, made on the devices where it will live."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)
    make = functools.partial(_first_state, self)
    return jax.jit(make, out_shardings=shardings)(
      jax.random.key(self.config.seed)
    )

  def trace_step(self) -> Any:
    """The training step as `jax.stages.Traced`, whose jaxpr has no devices."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)
    step = jax.jit(
      functools.partial(train_step, self),
      donate_argnums=0,
      out_shardings=(shardings, parallel.replicated(self.mesh)),
    )
    return step.trace(self.state_shapes, self.batch_shapes)

  def compile_step(self) -> Any:
    """The training step, compiled: (state, batch) -> (state, metrics)."""
    return self.trace_step().lower().compile()

  def stored_shapes(self) -> State:
    """The state as checkpoints hold it: per layer, with shardings."""
    unstack = functools.partial(stored, self.config)
    return _placed(jax.eval_shape(unstack, self.state_shapes), self.mesh)

  def place(self, state: State) -> State:
    """A restored state as and where the step expects it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)
    return jax.device_put(live(self.config, state), shardings)

  def eval_params(self, state: State) -> Any:
    """The parameters that evaluations use: averaged ones where they exist."""
    section = self.config.optimizer
    return averaging.averaged(section, state["average"], state["params"])


def build(
  config: Any, *, batch_size: int = 0, steps_per_epoch: int = 0
) -> Experiment:
  """The experiment of one stage's config.

  Args:
    config: one stage, resolved; see avjax.config.base_config.
    batch_size: instead of the config's (benchmarks).
    steps_per_epoch: instead of the built data set's, which then need not be
      there (benchmarks).

  Raises:
    InputError: what the config asks for does not fit together.
  """
  batch_size = batch_size or config.batch_size
  if config.log_every < 1:
    raise InputError(f"log_every is {config.log_every}; expected at least 1")
  lookup(dict.fromkeys(DTYPES), config.dtype, "dtype")
  lookup(dict.fromkeys(TRACKS), config.data.modality, "data.modality")
  mesh = parallel.make_mesh(config.mesh)
  method = methods.make(config)
  check_batch(config, batch_size, mesh, method.batch_multiple)
  grad_cache.check(config, method, batch_size, parallel.ways(mesh))
  if not steps_per_epoch:
    text.check(config)
    steps_per_epoch = pipeline.steps_per_epoch(config.data, batch_size)
  total_steps = number_of_steps(config, steps_per_epoch)
  batch_shapes = shapes_of_batch(config, batch_size, mesh)
  learning_rate = optim.schedule(
    config.schedule,
    batch_size=batch_size,
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
  )
  params = jax.eval_shape(
    functools.partial(init_params, config, method),
    jax.random.key(0),
    batch_shapes,
  )
  optimizer = optim.make(
    config.optimizer,
    learning_rate,
    params,
    method.param_info,
    num_layers=method.num_layers,
    stack=functools.partial(live, config),
  )
  partial = Experiment(
    config, mesh, method, optimizer, learning_rate, total_steps,
    steps_per_epoch, batch_shapes, {},
  )  # fmt: skip
  shapes = jax.eval_shape(
    functools.partial(_first_state, partial), jax.random.key(0)
  )
  return dataclasses.replace(partial, state_shapes=_placed(shapes, mesh))


def check_batch(
  config: Any, batch_size: int, mesh: Mesh, multiple: int = 1
) -> None:
  """The batch divides the mesh and groups, also micro-batch by micro-batch.

  Args:
    config: one stage.
    batch_size: of all devices.
    mesh: the devices.
    multiple: what divides the examples on a device; `Method.batch_multiple`.

  Raises:
    InputError: names both numbers.
  """
  parts = config.optimizer.accumulate
  if parts < 1 or batch_size % parts:
    raise InputError(
      f"batch size {batch_size} is not divisible by the {parts} micro-batches "
      "of optimizer.accumulate"
    )
  parallel.check_batch(batch_size // parts, mesh)
  model = config.model
  group = model.get("contrast_weight", 0) and model.get("group_size", 0)
  part = batch_size // parts
  if group and part % group:
    raise InputError(
      f"batch size {part} ({batch_size} in {parts} micro-batches of "
      f"optimizer.accumulate) is not divisible by model.group_size={group}; "
      "0 takes the whole of it"
    )
  ways = parallel.ways(mesh)
  own = batch_size // parts // ways
  if own % multiple:
    raise InputError(
      f"{own} examples a device (batch size {batch_size}, {parts} "
      f"micro-batches, {ways} devices) are not divisible by the {multiple} "
      f"that the method {config.method!r} takes together; a batch size of "
      f"{parts * ways * multiple} is the smallest"
    )


def number_of_steps(config: Any, steps_per_epoch: int) -> int:
  """Optimiser steps from total_steps or total_epochs, one of which is set."""
  steps, epochs = config.total_steps, config.total_epochs
  if (steps > 0) == (epochs > 0):
    raise InputError(
      "set one of total_steps and total_epochs to a positive number; they are "
      f"{steps} and {epochs}"
    )
  return steps or max(1, round(epochs * steps_per_epoch))


def shapes_of_batch(
  config: Any, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """ShapeDtypeStructs of one training batch, with shardings."""
  sharding = parallel.batch_sharding(mesh)
  shapes = pipeline.batch_shapes(config.data, batch_size)
  return {
    key: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for key, (shape, dtype) in shapes.items()
  }


def init_params(config: Any, method: Method, rng: jax.Array, batch: Any) -> Any:
  """Random parameters under the house's names, one group per layer."""
  inputs = augment.prepare(batch, config.data, rng, False)
  return method.init(rng, inputs)


def live(config: Any, tree: Any) -> Any:
  """Per-layer names -> the form that the step works on."""
  stacked = config.model.get("scan", False)
  return transformer.stack_layers(tree) if stacked else tree


def stored(config: Any, tree: Any) -> Any:
  """The inverse of `live`: checkpoints and converters know layers only."""
  stacked = config.model.get("scan", False)
  return transformer.unstack_layers(tree) if stacked else tree


def _first_state(experiment: Experiment, rng: jax.Array) -> State:
  init_rng, train_rng = jax.random.split(rng)
  config = experiment.config
  batch = {
    key: jnp.zeros(leaf.shape, leaf.dtype)
    for key, leaf in experiment.batch_shapes.items()
  }
  params = init_params(config, experiment.method, init_rng, batch)
  params = live(config, params)
  return {
    "params": params,
    "opt_state": experiment.optimizer.init(params),
    "average": averaging.init(config.optimizer, params),
    "step": jnp.zeros((), jnp.int32),
    "rng": jax.random.key_data(train_rng),
  }


def _placed(shapes: Any, mesh: Mesh) -> Any:
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    parallel.shardings(shapes, mesh),
  )


def cast(params: Any, dtype: str) -> Any:
  """Parameters in the dtype of the computation, norms and numbers excepted.

  Cast once per step inside the loss, so that under FSDP the gathered bytes
  are the small ones and gradients arrive in float32.
  """
  if dtype == "float32":
    return params

  def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    kept = leaf.ndim == 0 or "norm" in parallel.path_name(path)
    return leaf if kept else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def train_step(
  experiment: Experiment, state: State, batch: dict[str, jax.Array]
) -> tuple[State, dict[str, jax.Array]]:
  """One optimiser step on a global batch."""
  config = experiment.config
  step_rng = jax.random.fold_in(
    jax.random.wrap_key_data(state["rng"]), state["step"]
  )
  grad_fn = gradients(experiment, step_rng, state["step"])
  (loss, aux), grads = optim.accumulate(
    grad_fn, state["params"], batch, config.optimizer.accumulate
  )
  params, opt_state, norms = experiment.optimizer.update(
    grads, state["opt_state"], state["params"], aux.get("trainable")
  )
  average = averaging.update(
    config.optimizer,
    state["average"],
    params,
    state["step"] + 1,
    experiment.steps_per_epoch,
  )
  new_state = {
    "params": params,
    "opt_state": opt_state,
    "average": average,
    "step": state["step"] + 1,
    "rng": state["rng"],
  }
  metrics = {
    "loss": loss,
    **aux["metrics"],
    **norms,
    "learning_rate": experiment.learning_rate(state["step"]),
  }
  return new_state, metrics


def gradients(
  experiment: Experiment, rng: jax.Array, step: jax.Array
) -> Callable[[Any, Any], Any]:
  """(params, batch) -> ((loss, aux), gradients) of a step."""
  config, method = experiment.config, experiment.method
  prepare_rng, loss_rng = jax.random.split(rng)

  def loss_fn(params: Any, part: Any) -> tuple[jax.Array, Any]:
    inputs = experiment.prepare(part, prepare_rng, True)
    params = experiment.ready(params)
    loss, aux = method.loss(params, inputs, loss_rng, step)
    kept = {k: aux[k] for k in ("metrics", "trainable") if k in aux}
    return loss.astype(jnp.float32), kept

  def encode(params: Any, part: Any) -> Any:
    inputs = experiment.prepare(part, prepare_rng, True)
    params = experiment.ready(params)
    return method.example_rows(params, inputs, loss_rng)[0]

  def compare(params: Any, rows: Any, flags: Any) -> tuple[jax.Array, Any]:
    params = experiment.ready(params)
    loss, metrics = method.loss_of_rows(params, rows, flags)
    return loss.astype(jnp.float32), {"metrics": metrics}

  if not config.grad_cache:
    return jax.value_and_grad(loss_fn, has_aux=True)
  return grad_cache.value_and_grad(
    encode,
    compare,
    size=config.grad_cache,
    ways=parallel.ways(experiment.mesh),
  )


def synthetic_batch(
  experiment: Experiment, seed: int = 0
) -> dict[str, jax.Array]:
  """A device-resident batch of noise, for benchmarks."""
  rng = np.random.default_rng(seed)
  batch = {}
  for key, leaf in experiment.batch_shapes.items():
    if leaf.dtype == bool:
      value = np.ones(leaf.shape, bool)
    elif key == "index":
      value = np.arange(leaf.shape[0], dtype=np.uint32)
    elif key == "samples":
      length = experiment.batch_shapes["waveform"].shape[-1]
      value = np.full(leaf.shape, length, leaf.dtype)
    elif key == "text":
      top = experiment.config.model.get("vocabulary", 2)
      value = rng.integers(1, top, leaf.shape, leaf.dtype)
    elif np.issubdtype(leaf.dtype, np.integer):
      low, high = (0, 256) if leaf.dtype == np.uint8 else (-3_000, 3_000)
      value = rng.integers(low, high, leaf.shape).astype(leaf.dtype)
    else:
      value = np.zeros(leaf.shape, leaf.dtype)
      value[..., 0] = 1
    batch[key] = jax.device_put(value, leaf.sharding)
  return batch
