"""A plan as numbers, in words, and what to change where it does not fit.

See avjax.plan, which makes it.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from avjax.errors import InputError
from avjax.memory import in_words

DAY = 86_400
# What remains of temporary memory under model.remat=full: 0.35 to 0.42 were
# compiled for ViT-B, -L and -H.
REMAT_SHARE = 0.42


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    parameters: and their running mean, where there is one.
    moments: of the optimiser.
    batch: of this device's clips.
    temporary: what the step needs beside them, by the compiler.
  """

  parameters: int
  moments: int
  batch: int
  temporary: int

  @property
  def held(self) -> int:
    """All the time."""
    return self.parameters + self.moments + self.batch

  @property
  def total(self) -> int:
    """At once."""
    return self.held + self.temporary


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that is known of a training; per device where it says so.

  Attributes:
    method: of the config.
    device: its name.
    mesh: axis -> devices.
    dtype: of the computation.
    batch_size: of all devices.
    clips: of an epoch.
    total_steps: of the run.
    memory: of one device.
    capacity: bytes that one device offers; 0 = not known.
    traffic: (kind, axes, bytes that a device sends in a step, seconds).
    flops: of a step's matrix products, over all devices.
    device_flops: of the program of one device; more than its share where work
      is repeated.
    products_s: of a step.
    other_s: of kernels that move memory.
    network_s: as if nothing else ran meanwhile; None = not known.
    clips_per_core: of the input pipeline, a second.
    cores: of the host for each device.
    peak: FLOP/s of one device; 0 = not known.
    compile_s: that the compilation took.
    measured: the rates are this machine's.
    remedy: for what does not fit; else empty.
  """

  method: str
  device: str
  mesh: Mapping[str, int]
  dtype: str
  batch_size: int
  clips: int
  total_steps: int
  memory: Memory
  capacity: float
  traffic: tuple[tuple[str, str, float, float | None], ...]
  flops: int
  device_flops: int
  products_s: float
  other_s: float
  network_s: float | None
  clips_per_core: float
  cores: float
  peak: float
  compile_s: float
  measured: bool
  remedy: str = ""

  @property
  def devices(self) -> int:
    """Of the mesh."""
    return math.prod(self.mesh.values())

  @property
  def input_s(self) -> float:
    """That the hosts need for a batch, all cores decoding."""
    if not self.cores:
      return 0.0
    return self.batch_size / (self.clips_per_core * self.cores * self.devices)

  @property
  def device_s(self) -> float:
    """Of a step on the devices, nothing overlapping."""
    return self.products_s + self.other_s + (self.network_s or 0.0)

  @property
  def step_s(self) -> float:
    """Of a step; the hosts work meanwhile."""
    return max(self.device_s, self.input_s)

  @property
  def clips_per_s(self) -> float:
    """Over all devices."""
    return self.batch_size / self.step_s

  @property
  def days(self) -> float:
    """Of the whole run, evaluations and checkpoints apart."""
    return self.total_steps * self.step_s / DAY

  @property
  def missing(self) -> float:
    """Bytes of a device that are not there."""
    return max(0.0, self.memory.total - self.capacity) if self.capacity else 0.0

  @property
  def limit(self) -> str:
    """What a faster or larger machine would have to have more of."""
    if self.missing:
      return "memory capacity"
    if self.input_s > self.device_s:
      return "input pipeline"
    parts = {
      "matrix products": self.products_s,
      "memory traffic of the other kernels": self.other_s,
      "network": self.network_s or 0.0,
    }
    return max(parts, key=lambda name: parts[name])


# ------------------------------------------------------------ what would fit


@dataclasses.dataclass(frozen=True)
class Way:
  """Flags that make a step smaller.

  Attributes:
    flags: of the trainer.
    share: what remains of the memory that they are about.
  """

  flags: str
  share: float


def remedy(plan: Plan, config: Any, prefix: str) -> str:
  """Flags with which, by arithmetic, a step would fit.

  Args:
    plan: of a step that does not fit.
    config: of its stage.
    prefix: of the flags, `--config.pretrain` for a stage.

  Split parameters help first where they are the larger part, else repeated
  layers; then a batch in parts. All of it is what the trainer accepts.
  """
  wide = list(_splits(plan, config))
  repeated = []
  if config.model.get("remat", "") == "none":
    repeated = [Way(f"{prefix}.model.remat=full", REMAT_SHARE)]
  parts = list(_parts(plan, config, prefix))
  one = plan.memory
  state, work = one.parameters + one.moments, one.temporary
  same = Way("", 1.0)

  def fitting(*choices: Sequence[Way]) -> list[str]:
    """Those of the splits, layers and parts that fit together."""
    return [
      " ".join(way.flags for way in ways if way.flags)
      for ways in itertools.product(*choices)
      if state * ways[0].share + one.batch
      + work * math.prod(way.share for way in ways[1:]) <= plan.capacity
    ]  # fmt: skip

  by_split = fitting(wide)
  by_work = fitting([same], repeated + parts)
  first = [by_split, by_work] if state > work else [by_work, by_split]
  both = fitting(wide, repeated + parts)
  all_three = fitting([same, *wide], [same, *repeated], parts)
  for ways in (*first, both, all_three):
    if ways:
      return ways[0]
  return "more devices, or a smaller --batch_size"


def _splits(plan: Plan, config: Any) -> Iterator[Way]:
  """Of the parameters over more devices, least first."""
  import jax

  from avjax import parallel

  now = plan.mesh["fsdp"]
  for n in range(2 * now, plan.devices + 1, now):
    axes = {"data": -1, "fsdp": n, "tensor": plan.mesh["tensor"]}
    with contextlib.suppress(InputError):
      parallel.make_mesh(axes, jax.devices()[:1] * plan.devices)
      yield Way(_changed("--config.mesh", config.mesh, axes), now / n)


def _changed(prefix: str, section: Any, values: Mapping[str, int]) -> str:
  return " ".join(
    f"{prefix}.{key}={value}"
    for key, value in values.items()
    if section[key] != value
  )


def _parts(plan: Plan, config: Any, prefix: str) -> list[Way]:
  """Of the batch, fewest first.

  grad_cache where the method has it, as it leaves a contrast what it is; else
  optimizer.accumulate.
  """
  import jax

  from avjax import methods, parallel

  mesh = parallel.make_mesh(plan.mesh, jax.devices()[:1] * plan.devices)
  method, size = methods.make(config), plan.batch_size
  most = size // parallel.ways(mesh)
  counts = [n for n in range(2, most + 1) if size % n == 0]
  whole, before = config.grad_cache or size, config.optimizer.accumulate
  caches = [
    Way(f"{prefix}.grad_cache={size // n}", size // n / whole)
    for n in counts
    if size // n < whole
    and _accepted(config, method, size, mesh, size // n, before)
  ]  # fmt: skip
  return caches or [
    Way(f"{prefix}.optimizer.accumulate={n}", before / n)
    for n in counts
    if n > before
    and _accepted(config, method, size, mesh, config.grad_cache, n)
  ]  # fmt: skip


def _accepted(
  config: Any, method: Any, size: int, mesh: Any, cache: int, accumulate: int
) -> bool:
  """Whether the trainer takes a batch of this size in such parts."""
  from avjax import experiment, grad_cache, parallel

  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.grad_cache, config.optimizer.accumulate = cache, accumulate
  try:
    experiment.check_batch(config, size, mesh, method.batch_multiple)
    grad_cache.check(config, method, size, parallel.ways(mesh))
  except InputError:
    return False
  return True


# -------------------------------------------------------------------- report


def report(plan: Plan) -> str:
  """The plan in words."""
  return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
  mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
  yield (
    f"{plan.method} on {plan.devices} x {plan.device} ({mesh}), {plan.dtype}, "
    f"batch {plan.batch_size}"
  )
  if plan.measured:
    yield "rates: one core of this machine, measured now, CPU seconds"
  else:
    yield (
      "rates: a model from data sheets and arithmetic; nobody measured this "
      "step there"
    )
  yield ""
  yield "| of one device | |"
  yield "|---|---|"
  one = plan.memory
  for what, count in (
    ("parameters", one.parameters), ("moments", one.moments),
    ("batch", one.batch), ("temporary", one.temporary),
  ):  # fmt: skip
    yield f"| {what} | {in_words(count)} |"
  room = f" of {in_words(plan.capacity)}" if plan.capacity else ""
  yield f"| together | {in_words(one.total)}{room} |"
  for kind, axes, sent, seconds in plan.traffic:
    spent = "" if seconds is None else f", {_time(seconds)}"
    yield f"| {kind} over {axes} | {in_words(sent)} sent a step{spent} |"
  yield f"| matrix products | {_flops(plan)}, {_time(plan.products_s)} |"
  yield f"| other kernels | {_time(plan.other_s)} |"
  yield ""
  summed = any(kind == "all-reduce" and "fsdp" in axes
               for kind, axes, *_ in plan.traffic)  # fmt: skip
  if summed and not plan.measured:
    yield (
      "all-reduce over fsdp is as the compiler for CPUs has it: those for GPUs "
      "and TPUs reduce and scatter the gradients, which is half"
    )
  if plan.dtype == "bfloat16" and not plan.measured:
    yield "temporary memory is that of float32, an upper bound"
  if plan.missing:
    yield (
      f"DOES NOT FIT: {in_words(plan.missing)} more than the device has; by "
      f"arithmetic it would with {plan.remedy}"
    )
  yield from _speed(plan)


def _flops(plan: Plan) -> str:
  more = plan.device_flops * plan.devices / plan.flops - 1
  repeated = f", {more:.0%} more than its share" if more > 0.03 else ""
  return f"{plan.device_flops / 1e9:,.0f} GFLOP{repeated}"


def _speed(plan: Plan) -> Iterator[str]:
  network = ""
  if plan.network_s:
    apart = max(plan.products_s + plan.other_s, plan.network_s)
    network = f" ({_time(apart)} if the network hides behind the rest)"
  elif plan.network_s is None:
    network = ", without the network, whose speed is not known"
  yield f"step: {_time(plan.device_s)}{network}"
  whole = f"{plan.flops / 1e12:,.2f} TFLOP a step"
  if plan.peak:
    used = plan.flops / (plan.peak * plan.devices * plan.step_s)
    whole += f", {used:.0%} of the peak {plan.peak / 1e12:,.0f} TFLOP/s"
  else:
    whole += f", {plan.flops / plan.devices / plan.step_s / 1e9:,.0f} GFLOP/s"
  yield f"speed: {_count(plan.clips_per_s)} clips/s; {whole}"
  yield (
    f"run: {plan.total_steps:,} steps of {plan.batch_size} (an epoch is "
    f"{plan.clips:,} clips): {plan.days:,.3g} days"
  )
  rate = plan.batch_size / plan.device_s
  there = f" of {plan.cores * plan.devices:,.0f}" if plan.cores else ""
  yield (
    f"hosts: {_count(rate / plan.clips_per_core)}{there} cores decode "
    f"{_count(rate)} clips/s, {plan.clips_per_core:,.0f} each"
  )
  yield f"limit: {plan.limit}"
  yield f"compiled in {plan.compile_s:.0f} CPU seconds"


def _count(number: float) -> str:
  return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _time(seconds: float) -> str:
  return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def as_json(plan: Plan) -> dict[str, Any]:
  """The plan as JSON types, what follows from it included."""
  more = ("devices", "step_s", "clips_per_s", "days", "missing", "limit")
  return {
    **dataclasses.asdict(plan),
    **{name: getattr(plan, name) for name in more},
    "memory_held": plan.memory.held,
    "memory_total": plan.memory.total,
  }


@dataclasses.dataclass(frozen=True)
class Check:
  """A plan beside the step itself, on one device of this machine.

  Attributes:
    predicted_s: CPU seconds of a step.
    measured_s: likewise, the least; rates and steps are measured in turn.
    predicted_bytes: held and temporary.
    measured_bytes: by which the process grew; 0 = not known.
  """

  predicted_s: float
  measured_s: float
  predicted_bytes: int
  measured_bytes: int

  @property
  def ratio(self) -> float:
    """Predicted over measured seconds."""
    return self.predicted_s / self.measured_s

  def __str__(self) -> str:
    text = (
      f"check: predicted {_time(self.predicted_s)}, measured "
      f"{_time(self.measured_s)}, ratio {self.ratio:.2f}"
    )
    if self.measured_bytes:
      text += (
        f"; memory predicted {in_words(self.predicted_bytes)}, the process "
        f"grew by {in_words(self.measured_bytes)}"
      )
    return text
