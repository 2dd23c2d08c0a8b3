"""How many clips a second systems pre-train on, side by side.

python -m avjax.benchmark --compare avsiam cavmae avmae --pin

AVSiam (arXiv:2403.19638, §5.3, table 3b) compares "processed samples per
second" on one GPU, without the batch, the precision or what is done to a
sample. Here it is a whole step of pre-training: preparation of the clips
(log-mel too), forward, backward and optimiser, of Base models as their papers'
configs have them, with one batch size and one precision for all. The clips are
noise and lie on the device: nothing is read or decoded. Every system sees its
own inputs (AV-MAE 16 frames, the others one), which the table states. MAViL,
the third in the paper, is not among the systems.

The systems' steps and the products that measure the peak run in turn in one
process, so whatever else the machine does hits all alike; see avjax.benchmark
for what of the repeats counts. All states are held at once: about 12 bytes a
parameter.

Memory is that of one device, by the compiler: the step's arrays and what it
needs for a while. A device that tells what it used most has that in a line
below: of all systems together, as it cannot be told apart.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from avjax import bench_configs, benchmark, memory, trees
from avjax.errors import lookup

# Name -> configs/<name>.py and its argument.
SYSTEMS = {
  "avsiam": ("avsiam_audioset", ""),
  "avsep": ("avsiam_audioset", "encoder=separate"),
  "cavmae": ("cavmae_audioset", ""),
  "deteclap": ("deteclap_vgg", ""),
  "avmae": ("avmae_audioset", "size=B"),
}
BATCH_SIZE = 12  # AVSiam has six ratios

COLUMNS = (
  "system", "frames, s of sound", "clips/s", "ratio", "GFLOP/clip", "GFLOP/s",
  "share of peak", "trained", "memory by the compiler (held + temporary)",
  "compiled in s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """One system; rates are per CPU second on a CPU.

  Attributes:
    system: its name.
    frames: of a clip.
    sound_s: seconds of sound of a clip.
    clips_per_s: of pre-training, over all devices.
    ratio: to the first row's clips_per_s.
    flops_per_clip: of matrix products, forward and backward.
    flops_per_s: likewise.
    share_of_peak: of the measured peak of matrix products.
    parameters: that are trained.
    held_bytes: state and batch on one device; 0 = not known.
    temporary_bytes: what the step needs beside them.
    compile_s: of tracing and compiling the step.
  """

  system: str
  frames: int
  sound_s: float
  clips_per_s: float
  ratio: float
  flops_per_clip: float
  flops_per_s: float
  share_of_peak: float
  parameters: int
  held_bytes: int
  temporary_bytes: int
  compile_s: float


def command(values: Any, names: Iterable[str]) -> tuple[str, str, list[Row]]:
  """Title, table and rows for the flags of avjax.benchmark."""
  device = jax.default_backend()
  dtype = values.dtype or benchmark.default_dtype(device)
  with contextlib.ExitStack() as stack:
    configs = {
      name: config_of(name, stack, dtype=dtype, demo=values.demo)
      for name in names
    }
    batch_size = values.batch_size or BATCH_SIZE
    repeats = benchmark.counted(device, values.repeats)
    rows, peak = compare(configs, batch_size, repeats)
  size = "demo" if values.demo else "Base"
  best = "least" if device == "cpu" else "median"
  title = (
    f"Pre-training steps of {size} models on {benchmark.place(values.pin)}, "
    f"{dtype}, batch {batch_size}, {best} of {repeats}; peak "
    f"{peak / 1e9:.1f} GFLOP/s"
  )
  return title, table(rows, title, memory.measured_peak()), rows


def config_of(
  name: str,
  stack: contextlib.ExitStack,
  *,
  dtype: str = "float32",
  demo: bool = False,
) -> Any:
  """The config of a system's pre-training.

  Args:
    name: of SYSTEMS.
    stack: removes what stands in for a data set's files.
    dtype: of the computation.
    demo: a small model on small clips.

  Raises:
    InputError: no such system, the nearest is named; or no `configs` here.
  """
  file, argument = lookup(SYSTEMS, name, "system to compare")
  config = bench_configs.load(file, argument, dtype=dtype, demo=demo)
  return bench_configs.with_scores(config, stack)


def compare(
  configs: Mapping[str, Any], batch_size: int, repeats: int
) -> tuple[list[Row], float]:
  """Measures the steps of several configs in turn.

  Args:
    configs: one stage each, by the name that the row gets; of one dtype.
    batch_size: global, for all.
    repeats: counted rounds.

  Returns:
    Rows in this order, and the peak in FLOP/s.

  Raises:
    InputError: a config cannot have this batch size.
  """
  setups = [
    bench_configs.experiment_of(config, batch_size)
    for config in configs.values()
  ]
  steps = [benchmark.Step(setup) for setup in setups]
  seconds, peak = benchmark.time_steps(steps, repeats)
  first = steps[0].clips / seconds[0]
  rows = [
    row(name, *measured, peak=peak, first=first)
    for name, *measured in zip(configs, steps, seconds, strict=True)
  ]
  return rows, peak


def row(
  name: str, step: benchmark.Step, seconds: float, *, peak: float, first: float
) -> Row:
  """A system's numbers beside the peak and the first one's clips a second."""
  needed = memory.analysis(step.compiled) or memory.Bytes(0, 0)
  data = step.setup.config.data
  return Row(
    system=name,
    frames=data.video.num_frames,
    sound_s=float(data.audio.seconds),
    clips_per_s=step.clips / seconds,
    ratio=step.clips / seconds / first,
    flops_per_clip=step.flops / step.clips,
    flops_per_s=step.flops / seconds,
    share_of_peak=step.flops / seconds / peak,
    parameters=trained(step.setup),
    held_bytes=needed.held,
    temporary_bytes=needed.temporary,
    compile_s=step.compile_seconds,
  )


def trained(setup: Any) -> int:
  """Parameters that the optimiser moves."""
  plan = setup.optimizer.plan
  return sum(
    math.prod(leaf.shape)
    for path, leaf in trees.flatten(setup.state_shapes["params"]).items()
    if plan[path].group not in setup.optimizer.frozen
  )


def table(rows: list[Row], title: str, measured_peak: int = 0) -> str:
  """Markdown.

  Args:
    rows: from `compare`.
    title: the line above.
    measured_peak: bytes; of the line below, 0 = none.
  """
  lines = [title, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
  lines += [f"| {' | '.join(cells(row))} |" for row in rows]
  if measured_peak:
    lines += ["", f"Most used of the first device, with the states of all "
                  f"systems: {memory.in_words(measured_peak)}"]  # fmt: skip
  return "\n".join(lines)


def cells(row: Row) -> list[str]:
  """A row in words."""
  held, temporary = row.held_bytes, row.temporary_bytes
  parts = f"{memory.in_words(held)} + {memory.in_words(temporary)}"
  return [
    row.system,
    f"{row.frames}, {row.sound_s:g}",
    f"{row.clips_per_s:.3g}",
    f"{row.ratio:.2f}",
    f"{row.flops_per_clip / 1e9:.4g}",
    f"{row.flops_per_s / 1e9:.1f}",
    f"{row.share_of_peak:.1%}",
    f"{row.parameters / 1e6:.4g} M",
    f"{memory.in_words(held + temporary)} ({parts})" if held else "not known",
    f"{row.compile_s:.1f}",
  ]
