"""How fast training steps are beside the same steps in PyTorch.

python -m avjax.speed_ratio --pin
python -m avjax.speed_ratio cavmae --batch_size=2 --pin

`cavmae` and `avsiam` are whole steps of pre-training (loss, gradients, Adam) of
the Base models of configs/cavmae_audioset.py and configs/avsiam_audioset.py;
`stack` is forward and backward of a ViT-B's blocks, 118 tokens a sequence. The
other side is avjax.torch_standin: the same tokens kept, passes, losses and
numbers of parameters, written as one writes PyTorch. Both start from
spectrograms and normalised frames of noise that lie on the device; both draw
their masks and cut their patches. Here, the step also has the gradient's norm.

Both sides and the matrix products that measure the peak run in turn in one
process, so whatever else the machine does hits all alike. On a CPU all is
float32 on one thread and the least CPU time of the repeats counts. On a GPU
both compute in bfloat16 (PyTorch by autocast and compiled), the median of the
wall times counts, each until the device is done.

The share of the peak counts the same products for both: those of this side's
step, none of which attention computes again. The peak is the best rate that
either library has.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from absl import flags

from avjax import bench_configs, benchmark, commands
from avjax.errors import InputError, lookup

# By kind of device; small ones would not fill a GPU.
BATCH_SIZES = {"cpu": {"cavmae": 4, "avsiam": 6, "stack": 8}}
BATCH_SIZES_ELSEWHERE = {"cavmae": 64, "avsiam": 96, "stack": 128}
TOKENS = 118  # of a sequence of the stack
RATE = 1e-4
COLUMNS = ("system", "batch", "parameters", "GFLOP/clip", "ours, clips/s",
           "PyTorch, clips/s", "ratio", "ours, share of peak",
           "PyTorch, share of peak")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
  """A system's two steps; a call runs one to its end.

  Attributes:
    ours: of avjax.
    theirs: of avjax.torch_standin.
    clips: in the batch.
    flops: of the matrix products of a step.
    parameters: that are trained, ours and theirs.
  """

  ours: Callable[[], Any]
  theirs: Callable[[], Any]
  clips: int
  flops: int
  parameters: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Row:
  """One system; rates are per CPU second on a CPU.

  Attributes:
    system: its name.
    batch: clips.
    parameters: that are trained.
    flops_per_clip: of matrix products, forward and backward.
    ours, theirs: clips a second.
    ratio: ours to theirs.
    ours_share, theirs_share: of the peak.
    ours_peak, theirs_peak: best FLOP/s of matrix products in either library.
  """

  system: str
  batch: int
  parameters: int
  flops_per_clip: float
  ours: float
  theirs: float
  ratio: float
  ours_share: float
  theirs_share: float
  ours_peak: float
  theirs_peak: float


# --- Systems -----------------------------------------------------------------


def batch_of(name: str, batch_size: int, device: str) -> int:
  """What is asked for, or the system's own on a kind of device where it is 0.

  Raises:
    InputError: no such system, the nearest is named; or it does not take it.
  """
  make = lookup(SYSTEMS, name, "system")
  sizes = BATCH_SIZES.get(device, BATCH_SIZES_ELSEWHERE)
  batch_size = batch_size or sizes[name]
  if make is pretraining:
    checked(name, batch_size, device)
  return batch_size


def checked(name: str, batch_size: int, device: str) -> tuple[Any, Any]:
  """Config and method of a system that takes such a batch.

  Raises:
    InputError: it does not.
  """
  from avjax import methods, throughput

  dtype = benchmark.default_dtype(device)
  with contextlib.ExitStack() as stack:
    config = throughput.config_of(name, stack, dtype=dtype)
  method = methods.make(config)
  if batch_size % method.batch_multiple:
    raise InputError(
      f"--batch_size={batch_size}: {name} takes {method.batch_multiple} "
      "examples together"
    )
  return config, method


def pretraining(name: str, batch_size: int, depth: int) -> Pair:
  """Whole steps of a system's pre-training."""
  import jax

  from avjax import flops, methods

  config, _ = checked(name, batch_size, jax.default_backend())
  if depth:
    config.model.update(depth=depth, decoder_depth=depth)
  config = bench_configs.with_groups(config, batch_size)
  method = methods.make(config)
  inputs = noise(config, batch_size)
  params = drawn(jax.eval_shape(method.init, jax.random.key(0), inputs))
  count, theirs = torch_step(name, config, params, inputs)
  plain = config.copy_and_resolve_references()
  plain.model.attention = "plain"  # computes nothing twice
  products = flops.count(
    functools.partial(gradient, plain, methods.make(plain)),
    params, inputs, jax.random.key(0),
  )  # fmt: skip
  mine, ours = step(config, method, params, inputs)
  return Pair(ours, theirs, batch_size, products, (mine, count))


def noise(config: Any, batch_size: int) -> dict[str, np.ndarray]:
  """A spectrogram and a normalised frame per clip."""
  rng, data = np.random.default_rng(0), config.data
  size = data.video.size
  shapes = {
    "fbank": (batch_size, data.fbank.frames, data.fbank.num_mels),
    "frames": (batch_size, 1, size, size, 3),
  }
  return {
    key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()
  }


def drawn(shapes: Any) -> Any:
  """Small random parameters; compiling `init` takes longer than a step."""
  import jax

  rng = np.random.default_rng(1)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    start = 1 if path[-1].key == "scale" else 0  # of a LayerNorm
    return start + 0.02 * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def gradient(
  config: Any, method: Any, params: Any, inputs: Any, key: Any
) -> tuple[Any, Any]:
  """Loss and gradients, in the dtype of the config."""
  import jax
  import jax.numpy as jnp

  from avjax import experiment

  def loss(params: Any) -> Any:
    cast = experiment.cast(params, config.dtype)
    return method.loss(cast, inputs, key, jnp.int32(0))[0].astype(jnp.float32)

  return jax.value_and_grad(loss)(params)


def step(
  config: Any, method: Any, params: Any, inputs: Any
) -> tuple[int, Callable[[], None]]:
  """Numbers that are trained, and our step."""
  import jax
  import optax

  from avjax import optim

  optimizer = optim.make(
    config.optimizer,
    optax.constant_schedule(RATE),
    params,
    method.param_info,
    method.num_layers,
  )

  def run(state: Any, inputs: Any, key: Any) -> tuple[Any, Any]:
    params, moments = state
    key = jax.random.fold_in(key, moments["step"])
    loss, grads = gradient(config, method, params, inputs, key)
    params, moments, norms = optimizer.update(grads, moments, params)
    return (params, moments), (loss, norms)

  moments = optimizer.init(params)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(moments["mu"]))
  place = jax.tree.map(jax.device_put, ((params, moments), inputs))
  holder, inputs, key = {"state": place[0]}, place[1], jax.random.key(1)
  compiled = jax.jit(run, donate_argnums=0)
  compiled = compiled.lower(holder["state"], inputs, key).compile()

  def call() -> None:
    holder["state"], found = compiled(holder["state"], inputs, key)
    jax.block_until_ready(found)

  return count, call


def torch_step(
  name: str, config: Any, params: Any, inputs: Any
) -> tuple[int, Callable[[], None]]:
  """Numbers that are trained, and PyTorch's step, from the same parameters."""
  from avjax import torch_standin
  from avjax.nn import cav_encoder

  torch, device = torch_standin.torch, torch_device()
  grids = cav_encoder.grids(inputs, config.model)
  module = torch_standin.SYSTEMS[name](config.model, grids)
  torch_standin.load(module, params)
  run = torch_standin.step(module, config.optimizer, RATE, device)
  there = {k: torch.from_numpy(x).to(device) for k, x in inputs.items()}
  return torch_standin.trained(module), synchronised(lambda: run(there))


def blocks(name: str, batch_size: int, depth: int) -> Pair:
  """Forward and backward of the blocks of a ViT-B."""
  import jax
  import jax.numpy as jnp

  from avjax import flops, torch_standin
  from avjax.nn import cav_encoder, sizes, transformer

  del name
  size, torch = sizes.SIZES["B"], torch_standin.torch
  size = dataclasses.replace(size, depth=depth or size.depth)
  module = transformer.Transformer(
    size.depth, size.heads, size.mlp, cav_encoder.EPS, "erf", norm=False
  )
  dtype = benchmark.default_dtype(jax.default_backend())
  shape = (batch_size, TOKENS, size.width)
  x = np.random.default_rng(0).standard_normal(shape, np.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  params = drawn(params)

  def loss(params: Any, x: Any, module: Any = module) -> Any:
    from avjax import experiment

    params = experiment.cast(params, dtype)
    y = module.apply({"params": params}, x.astype(dtype))
    return jnp.mean(y.astype(jnp.float32) ** 2)

  both = jax.value_and_grad(loss, argnums=(0, 1))
  placed = jax.device_put((params, x))
  compiled = jax.jit(both).lower(*placed).compile()
  device = torch_device()
  other = torch_standin.Stack(size.depth, size, cav_encoder.EPS)
  torch_standin.load(other, params)
  run = torch_standin.stack_step(other, torch.from_numpy(x), device)
  plain = module.clone(attention="plain")
  count = flops.count(
    jax.value_and_grad(functools.partial(loss, module=plain), argnums=(0, 1)),
    params, x,
  )  # fmt: skip
  mine = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
  return Pair(
    lambda: jax.block_until_ready(compiled(*placed)),
    synchronised(run),
    batch_size,
    count,
    (mine, torch_standin.trained(other)),
  )


SYSTEMS = {"cavmae": pretraining, "avsiam": pretraining, "stack": blocks}


# --- Measurement -------------------------------------------------------------


def torch_device() -> str:
  """'cpu' or 'cuda', where JAX computes, too.

  Raises:
    InputError: PyTorch does not see JAX's device.
  """
  import jax

  from avjax import torch_standin

  backend = jax.default_backend()
  device = {"cpu": "cpu", "gpu": "cuda"}.get(backend, backend)
  if device != "cpu" and not torch_standin.torch.cuda.is_available():
    raise InputError(
      f"JAX computes on {backend!r}, which this PyTorch does not see: set "
      "JAX_PLATFORMS=cpu, or install another PyTorch"
    )
  return device


def synchronised(function: Callable[[], Any]) -> Callable[[], None]:
  """Ends when the device has."""
  from avjax import torch_standin

  torch, wait = torch_standin.torch, torch_device() != "cpu"

  def call() -> None:
    function()
    if wait:
      torch.cuda.synchronize()

  return call


def torch_peaks(device: str) -> list[tuple[int, Callable[[], None]]]:
  """As benchmark.peak_functions, in PyTorch."""
  from avjax import torch_standin

  torch, found = torch_standin.torch, []
  dtype = torch.float32 if device == "cpu" else torch.bfloat16
  for m, k, n in benchmark.PEAK_SHAPES[: 3 if device == "cpu" else 4]:
    left = torch.ones(m, k, device=device, dtype=dtype)
    right = torch.ones(k, n, device=device, dtype=dtype)
    times = benchmark.peak_times(2 * m * k * n, device)

    def run(left: Any = left, right: Any = right, times: int = times) -> None:
      for _ in range(times):
        torch.mm(left, right)

    found.append((2 * m * k * n * times, synchronised(run)))
  return found


def measure(name: str, batch_size: int, repeats: int, depth: int) -> Row:
  """One system.

  Raises:
    InputError: as `batch_of`; or both sides have not the same number of
      parameters.
  """
  import jax

  device = jax.default_backend()
  batch_size = batch_of(name, batch_size, device)
  pair = SYSTEMS[name](name, batch_size, depth)
  mine, other = pair.parameters
  if mine != other:
    raise InputError(f"{name} trains {mine} numbers, in PyTorch {other}")
  dtype = benchmark.default_dtype(device)
  peaks = benchmark.peak_functions(dtype, device), torch_peaks(torch_device())
  functions = [pair.ours, pair.theirs]
  functions += [f for side in peaks for _, f in side]
  ours, theirs, *rest = benchmark.timed(functions, repeats, device)
  rates = [n / t for (n, _), t in zip(sum(peaks, []), rest, strict=True)]
  here, there = max(rates[: len(peaks[0])]), max(rates[len(peaks[0]) :])
  peak = max(here, there)
  return Row(
    system=name,
    batch=pair.clips,
    parameters=mine,
    flops_per_clip=pair.flops / pair.clips,
    ours=pair.clips / ours,
    theirs=pair.clips / theirs,
    ratio=theirs / ours,
    ours_share=pair.flops / ours / peak,
    theirs_share=pair.flops / theirs / peak,
    ours_peak=here,
    theirs_peak=there,
  )


def table(rows: Iterable[Row], title: str) -> str:
  """Markdown."""
  lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
  for row in rows:
    cells = (
      row.system, f"{row.batch}", f"{row.parameters / 1e6:.4g} M",
      f"{row.flops_per_clip / 1e9:.4g}", f"{row.ours:.3g}",
      f"{row.theirs:.3g}", f"{row.ratio:.2f}", f"{row.ours_share:.1%}",
      f"{row.theirs_share:.1%}",
    )  # fmt: skip
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def title(rows: list[Row], pinned: bool, repeats: int) -> str:
  """What was measured, and on what."""
  import jax

  from avjax import torch_standin

  cpu = jax.default_backend() == "cpu"
  kind = "float32, least" if cpu else "bfloat16, median"
  peaks = max(r.ours_peak for r in rows), max(r.theirs_peak for r in rows)
  return (
    f"Steps beside PyTorch {torch_standin.torch.__version__} on "
    f"{benchmark.place(pinned)}, {kind} of {repeats}; matrix products "
    f"{peaks[0] / 1e9:.1f} GFLOP/s, PyTorch's {peaks[1] / 1e9:.1f}"
  )


def main(argv: list[str]) -> None:
  """Prints the table; with --json also writes it, after each system."""
  values = flags.FLAGS
  names = argv[1:] or list(SYSTEMS)
  for name in names:
    lookup(SYSTEMS, name, "system")
  if values.pin:
    benchmark.pin()
  # Both libraries share the device's memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  import jax

  from avjax import torch_standin

  device = jax.default_backend()
  benchmark.refuse_pin(values.pin, device)
  for name in names:
    batch_of(name, values.batch_size, device)
  if device == "cpu":
    torch_standin.torch.set_num_threads(1)
  repeats = benchmark.counted(device, values.repeats)
  rows: list[Row] = []
  try:
    for number, name in enumerate(names, 1):
      rows.append(measure(name, values.batch_size, repeats, values.depth))
      found = f"[{number}/{len(names)}] {name}: ratio {rows[-1].ratio:.2f}"
      print(found, file=sys.stderr, flush=True)
      if values.json:
        head = title(rows, values.pin, repeats)
        record = {"title": head, "rows": [dataclasses.asdict(r) for r in rows]}
        pathlib.Path(values.json).write_text(json.dumps(record, indent=2))
  finally:  # what is measured is not lost with a later system
    if rows:
      print(table(rows, title(rows, values.pin, repeats)), flush=True)


def define_flags(values: flags.FlagValues) -> None:
  """The command's flags."""
  own = {"flag_values": values}
  flags.DEFINE_integer(
    "batch_size",
    0,
    f"Of all systems; default {BATCH_SIZES['cpu']}, on a GPU "
    f"{BATCH_SIZES_ELSEWHERE}.",
    0,
    **own,
  )
  flags.DEFINE_integer(
    "repeats", None, "Counted; default 5, on a GPU 20.", 1, **own
  )
  flags.DEFINE_integer(
    "depth", 0, "Of all stacks, instead of the papers'.", 0, **own
  )
  flags.DEFINE_bool("pin", False, "Bind the process to one core.", **own)
  flags.DEFINE_string("json", "", "Also write the table there.", **own)


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  commands.run(main, words=True)
