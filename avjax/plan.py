"""What a training will need, before any device is rented.

python -m avjax.plan --config=configs/avmae_vgg.py:size=L --devices=64
    --device=h100 --config.mesh.fsdp=8 --config.dtype=bfloat16

compiles the real step for a mesh of that many simulated devices and reads from
the program what one device holds, sends and computes; nothing is computed. The
time is a model: see avjax.device_rates. No data set is needed: an epoch is the
published number of clips, or --clips.

--device=cpu predicts CPU seconds on one core of this machine, whose rates are
measured first; --check then runs the step and compares:

python -m avjax.plan --config=configs/cavmae_audioset.py --device=cpu
    --batch_size=4 --check --pin

The program is that of JAX's compiler for CPUs. Others place the same
collectives, with two exceptions, which make a plan too careful: gradients of
parameters that are split (fsdp) are reduced and scattered there, half the bytes
of the sum here; and what several passes, or several parts of a batch
(accumulate, grad_cache), add to a gradient is summed first and sent once.

With bfloat16 that compiler computes in float32: temporary memory is that of
float32, an upper bound. It also gathers split parameters in float32; those that
the step casts are counted with half the bytes, which is what others send.
Attention is the target's own, but where that would be cuDNN's, which takes no
memory for scores either, it is in blocks (see avjax.nn.attention).
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

from absl import flags
from ml_collections import config_flags

from avjax import bench_configs, commands, plan_report
from avjax.errors import InputError

# Host milliseconds for a clip, log-mel made on the device: reading and sound,
# and each decoded frame; stored features. From docs/speed.json, one core of an
# AMD EPYC: 1.281 for one picture is READ + FRAME, 9.445 for sixteen READ + 16
# FRAME, 0.192 for stored features.
READ_MS, FRAME_MS, FEATURES_MS = 0.737, 0.544, 0.192
# More keys than any implementation for short inputs is chosen for.
MANY_KEYS = 1 << 20


# ------------------------------------------------------------------- program


def simulate(devices: int, quick: bool) -> None:
  """So many CPU devices; before JAX starts.

  Args:
    devices: of the mesh.
    quick: the program is only read, not run: machine code may be slow.
  """
  import jax

  present = os.environ.get("XLA_FLAGS", "").split()
  ours = {"--xla_force_host_platform_device_count": devices}
  if quick:
    ours["--xla_backend_optimization_level"] = 0
  kept = [flag for flag in present if flag.split("=")[0] not in ours]
  kept += [f"{name}={value}" for name, value in ours.items()]
  os.environ["XLA_FLAGS"] = " ".join(kept)
  jax.config.update("jax_platforms", "cpu")
  if jax.device_count() < devices:
    raise InputError(
      f"--devices={devices}, but JAX had started with {jax.device_count()}"
    )


def clips_of(data: Any, asked: int) -> int:
  """Clips of an epoch: asked for, as built, or as published.

  Raises:
    InputError: neither is known.
  """
  from avjax.data import datasets, mixture, pipeline

  if asked:
    return asked
  with contextlib.suppress(InputError):
    return pipeline.num_examples(data)
  parts = [(data.name, data.split)]
  if data.mixture:
    parts = [part[:2] for part in mixture.parse(data.mixture)]
  total = 0
  for name, split in parts:
    known = datasets.lookup(datasets.DATASETS, name, "data set").splits
    count = datasets.lookup(known, split, f"split of {name}")
    if not count:
      raise InputError(
        f"how many clips {name}:{split} has is not published and it is not "
        "built: --clips=NUMBER says it"
      )
    total += count
  return min(total, data.limit or total)


def memory_of(setup: Any, compiled: Any) -> plan_report.Memory:
  """What one device holds of the state and the batch, and works with."""
  from avjax import memory

  state = setup.state_shapes
  found = memory.analysis(compiled)
  return plan_report.Memory(
    own(state["params"]) + own(state["average"]),
    own(state["opt_state"]),
    own(setup.batch_shapes),
    found.temporary if found else 0,
  )


def own(tree: Any) -> int:
  """Bytes of arrays (ShapeDtypeStructs with shardings) on one device."""
  from avjax import trees

  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in trees.flatten(tree).values()
  )


def narrow(setup: Any) -> frozenset[tuple[int, ...]]:
  """Sizes of the parameters that `fsdp` gathers in half precision.

  As `step_cost.sizes` gives them, of a whole stack of layers and of one;
  nothing where the computation is in float32.
  """
  from avjax import parallel, step_cost, trees

  if setup.config.dtype == "float32":
    return frozenset()
  tensor, found = setup.mesh.shape["tensor"], set()
  for name, leaf in trees.flatten(setup.state_shapes["params"]).items():
    spec = parallel.spec_of(name, leaf.shape, setup.mesh)
    if "fsdp" not in spec or "norm" in name:
      continue
    shape = [
      size // tensor if axis == "tensor" else size
      for size, axis in zip(leaf.shape, spec, strict=True)
    ]
    found.add(step_cost.sizes(shape))
    if "blocks" in name.split("/"):
      found.add(step_cost.sizes(shape[1:]))
  return frozenset(found)


def gradients(setup: Any) -> frozenset[tuple[int, ...]]:
  """Shapes of matrices among one device's parameters, of one layer each."""
  from avjax import trees

  return frozenset(
    tuple(int(n) for n in leaf.sharding.shard_shape(leaf.shape)[-2:])
    for leaf in trees.flatten(setup.state_shapes["params"]).values()
    if leaf.ndim > 1
  ) | frozenset(
    tuple(int(n) for n in leaf.shape[-2:])
    for leaf in trees.flatten(setup.state_shapes["params"]).values()
    if leaf.ndim > 1
  )


def clips_per_core(config: Any) -> float:
  """Of the input pipeline, a second."""
  if config.data.features:
    return 1_000 / FEATURES_MS
  frames = config.data.video.num_frames if "v" in config.data.modality else 0
  return 1_000 / (READ_MS + FRAME_MS * frames)


# ------------------------------------------------------------------ the plan


def make(
  config: Any, device: str, *, batch_size: int = 0, clips: int = 0,
  cores: float = 0.0, prefix: str = "--config", rounds: int = 3,
) -> plan_report.Plan:  # fmt: skip
  """Compiles a stage's step for the mesh and counts.

  Args:
    config: one stage; its mesh takes all of JAX's devices.
    device: a name in `device_rates.DEVICES`, or cpu.
    batch_size: instead of the config's.
    clips: of an epoch; 0 = see `clips_of`.
    cores: of the host for each device; 0 = typical ones.
    prefix: of flags that the report suggests.
    rounds: of measurements, where the device is a CPU.

  Raises:
    InputError: an unknown device, or the config cannot be built.
  """
  from avjax import benchmark, device_rates, step_cost

  device_rates.find(device)
  with contextlib.ExitStack() as stack:
    setup = prepared(config, batch_size, clips, stack, device)
    program = benchmark.Program(setup)
    kernels = step_cost.kernels(program.compiled)
    meter = None
    if device == "cpu":
      meter = device_rates.Meter(kernels)
      for _ in range(rounds):
        meter.round()
    return assemble(
      program, kernels, device, meter, clips=clips, cores=cores, prefix=prefix
    )


def prepared(
  config: Any, batch_size: int, clips: int, stack: contextlib.ExitStack,
  device: str = "cpu",
) -> Any:  # fmt: skip
  """The experiment on the simulated devices, as `device` would compute it.

  Raises:
    InputError: the config cannot be built, or an epoch has no whole batch.
  """
  size = batch_size or config.batch_size
  count = clips_of(config.data, clips)
  if count < size:
    raise InputError(f"{count} clips are fewer than the batch size {size}")
  config = with_attention(bench_configs.with_scores(config, stack), device)
  return bench_configs.experiment_of(config, batch_size, count // size)


def with_attention(config: Any, device: str) -> Any:
  """The config; plain attention where `auto` means that on the device.

  CPUs take blocks instead, which need far less memory. Where the device has
  cuDNN's fused kernel, blocks stand in for it.
  """
  import jax.numpy as jnp

  from avjax.nn import attention

  if device == "cpu" or config.model.get("attention", "") != "auto":
    return config
  backend = "tpu" if device.startswith("tpu") else "gpu"
  width, heads = config.model.get("width", 0), config.model.get("heads", 0)
  # Of ViTs of named sizes, which have neither here.
  head = width // heads if width and heads else 64
  q = jnp.zeros((1, 1, 1, head), config.dtype)
  if attention.choose(backend, MANY_KEYS, q) != "plain":
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.attention = "plain"
  return config


def assemble(
  program: Any, kernels: Any, device: str, meter: Any, *,
  clips: int = 0, cores: float = 0.0, prefix: str = "--config",
) -> plan_report.Plan:  # fmt: skip
  """The plan of a compiled step.

  Args:
    program: `benchmark.Program`.
    kernels: of it.
    device: a name, see `make`.
    meter: `device_rates.Meter` where the device is a CPU.
    clips: see `make`.
    cores: see `make`.
    prefix: see `make`.
  """
  from avjax import device_rates

  setup, compiled = program.setup, program.compiled
  sheet = device_rates.find(device)
  config, mesh = setup.config, dict(setup.mesh.shape)
  needed = memory_of(setup, compiled)
  if sheet is None:
    fresh = needed.temporary + _fresh_results(compiled)
    seconds = meter.least(fresh)
    capacity, peak = host_memory(), 0.0
  else:
    seconds = device_rates.published_seconds(
      sheet, kernels, dtype=config.dtype, gradients=gradients(setup),
      parameters=own(setup.state_shapes["params"]) // 4,
      averaged=own(setup.state_shapes["average"]) // 4,
    )  # fmt: skip
    capacity = device_rates.USABLE * sheet.memory
    peak = sheet.peak[config.dtype]
    cores = cores or sheet.cores
  traffic = _traffic(program, sheet)
  known = sheet is not None or not traffic
  plan = plan_report.Plan(
    method=config.method, device=device, mesh=mesh, dtype=config.dtype,
    batch_size=program.clips, clips=clips_of(config.data, clips),
    total_steps=setup.total_steps, memory=needed, capacity=capacity,
    traffic=traffic, flops=program.flops,
    device_flops=sum(kernel.flops for kernel in kernels),
    products_s=seconds.products, other_s=seconds.other,
    network_s=sum(t[3] or 0.0 for t in traffic) if known else None,
    clips_per_core=clips_per_core(config), cores=cores, peak=peak,
    compile_s=program.compile_seconds, measured=sheet is None,
  )  # fmt: skip
  if plan.missing:
    found = plan_report.remedy(plan, config, prefix)
    plan = dataclasses.replace(plan, remedy=found)
  return plan


def _traffic(program: Any, sheet: Any) -> tuple[Any, ...]:
  """(kind, axes, bytes sent, seconds) of a step; None = rate not known."""
  from avjax import device_rates, step_cost

  found, mesh = [], dict(program.setup.mesh.shape)
  less = narrow(program.setup) if sheet else frozenset()
  for one in step_cost.transfers(program.compiled, mesh, less):
    rate = sheet and device_rates.slowest_rate(sheet, one.groups)
    spent = one.sent_bytes / rate if rate else None
    found.append((one.kind, one.axes, one.sent_bytes, spent))
  return tuple(found)


def _fresh_results(compiled: Any) -> int:
  """Bytes of results that do not lie where the arguments lay."""
  stats = compiled.memory_analysis()
  if stats is None:
    return 0
  return stats.output_size_in_bytes - stats.alias_size_in_bytes


def host_memory() -> float:
  """Bytes of this machine; 0 where it does not tell."""
  path = pathlib.Path("/proc/meminfo")
  found = path.exists() and re.search(r"MemTotal:\s+(\d+)", path.read_text())
  return 1024.0 * int(found[1]) if found else 0.0


# --------------------------------------------------------------------- check


def check(
  config: Any, *, batch_size: int = 0, clips: int = 0, rounds: int = 5
) -> tuple[plan_report.Plan, plan_report.Check]:
  """Predicts a step's CPU seconds and memory, and runs it.

  Args:
    config: one stage.
    batch_size: instead of the config's.
    clips: of an epoch; 0 = see `clips_of`.
    rounds: of rates and step in turn, after one that does not count.
  """
  from avjax import benchmark, device_rates, step_cost

  with contextlib.ExitStack() as stack:
    step = benchmark.Step(prepared(config, batch_size, clips, stack))
    kernels = step_cost.kernels(step.compiled)
    meter = device_rates.Meter(kernels)
    grown = growth(step)
    measured_s, _ = benchmark.timed([step, meter.round], rounds, "cpu")
    plan = assemble(step, kernels, "cpu", meter, clips=clips)
  return plan, plan_report.Check(
    plan.device_s, measured_s, plan.memory.total, grown
  )


def growth(step: Any) -> int:
  """Bytes by which the process grows with the state and one step; 0 where the
  system does not tell."""
  import gc

  refs = pathlib.Path("/proc/self/clear_refs")
  if not refs.exists():
    return 0
  step.state = None
  gc.collect()
  before = _status("VmRSS")
  try:
    refs.write_text("5")  # the peak starts again from here
  except OSError:
    return 0
  step.state = step.setup.init_state()
  step()
  return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(rf"{key}:\s+(\d+)", text)[1])


# ------------------------------------------------------------------- command


def check_flags(values: Any) -> None:
  """Before anything is compiled.

  Raises:
    InputError: an unknown device, or flags that do not go together.
  """
  from avjax import device_rates

  device_rates.find(values.device)
  if values.check and (values.device != "cpu" or values.devices != 1):
    raise InputError(
      f"--check runs the step here: it goes with --device=cpu --devices=1, not "
      f"--device={values.device} --devices={values.devices}"
    )
  if values.clips and values.steps_per_epoch:
    raise InputError("--clips and --steps_per_epoch say the same: give one")


def main(argv: list[str]) -> None:
  """Prints the plan; with --json also writes it."""
  from avjax import benchmark

  del argv
  values = flags.FLAGS
  check_flags(values)
  if values.pin:
    benchmark.pin()
  config, prefix = values.config, "--config"
  if config.stages:
    prefix = f"--config.{values.stage or config.stages[0]}"
  config = bench_configs.stage_of(config, values.stage)
  simulate(values.devices, quick=values.device != "cpu")
  clips = values.clips or values.steps_per_epoch * (
    values.batch_size or config.batch_size
  )
  checked = None
  if values.check:
    plan, checked = check(
      config, batch_size=values.batch_size, clips=clips, rounds=values.repeats
    )
  else:
    plan = make(
      config, values.device, batch_size=values.batch_size, clips=clips,
      cores=values.host_cores, prefix=prefix, rounds=values.repeats,
    )  # fmt: skip
  print(plan_report.report(plan))
  if checked:
    print(checked)
  if values.json:
    record = plan_report.as_json(plan)
    if checked:
      record["check"] = dataclasses.asdict(checked)
    with open(values.json, "w") as file:
      json.dump(record, file, indent=2)


def define_flags(values: flags.FlagValues) -> None:
  """The command's flags."""
  from avjax import device_rates

  config_flags.DEFINE_config_file(
    "config", None, "The config to plan.", flag_values=values
  )
  own = {"flag_values": values}
  flags.DEFINE_string(
    "device", "h100", f"One of {', '.join(device_rates.NAMES)}.", **own
  )
  flags.DEFINE_integer("devices", 1, "Of the mesh.", 1, **own)
  flags.DEFINE_integer("batch_size", 0, "Instead of the config's.", 0, **own)
  flags.DEFINE_string(
    "stage", "", "Of a staged config; default the first.", **own
  )
  flags.DEFINE_integer("clips", 0, "Of an epoch; 0 = as published.", 0, **own)
  flags.DEFINE_integer("steps_per_epoch", 0, "Instead of --clips.", 0, **own)
  flags.DEFINE_float(
    "host_cores", 0.0, "For each device; 0 = typical ones.", 0.0, **own
  )
  flags.DEFINE_bool(
    "check", False, "With --device=cpu: also run the step.", **own
  )
  flags.DEFINE_integer("repeats", 5, "Rounds of measurements.", 1, **own)
  flags.DEFINE_bool("pin", False, "Bind the process to one core.", **own)
  flags.DEFINE_string("json", "", "Also write the plan there.", **own)


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  # Compiling is timed.
  commands.run(main, required=("config",), cache=False)
