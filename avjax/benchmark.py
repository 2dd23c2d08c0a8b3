"""Speed as numbers: the pipeline, the step, and both together.

python -m avjax.benchmark --config=configs/avmae_vgg.py:size=B --batch_size=4

On a CPU, rates are per CPU second, the minimum of the repeats counts and the
matrix-product peak is measured in turn with the step; with `--pin` the process
is bound to one core, so that they are rates of one core. On a GPU, rates are
per second and the median counts.

python -m avjax.benchmark --compare avsiam cavmae avmae --pin

has the steps of several systems side by side instead, see avjax.throughput.

python -m avjax.benchmark --page --pin --json=speed.json

measures every paper's steps, the pipeline by kind of clip and both together,
see avjax.speed_page; what its words name is measured alone, and what is in the
file already is not measured again.

python -m avjax.benchmark --config=configs/cavmae_audioset.py --batch_size=8 \
  --options --pin --json=speed.json

has time and memory of one step with each policy of rematerialisation, with
scan, accumulation and bfloat16. `--from_json=speed.json` prints the tables
again.
"""

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from avjax import bench_configs, commands
from avjax.config import DTYPES
from avjax.errors import InputError

# How often what is timed counts, by kind of device.
REPEATS = {"cpu": 5}
REPEATS_ELSEWHERE = 20
# FLOPs of one timed call of such a product, so that the call itself costs
# nothing: some ten milliseconds of what is fast, a second of a CPU's core.
PEAK_FLOPS = {"cpu": 2e10}
PEAK_FLOPS_ELSEWHERE = 2e13
# Rows, inner and columns of the products whose best rate is called the peak.
PEAK_SHAPES = ((944, 768, 3072), (1888, 768, 768), (1024, 1024, 1024),
               (8192, 8192, 8192))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table; rates are per CPU second on a CPU."""

  what: str
  clips_per_s: float
  flops_per_s: float = 0.0
  share_of_peak: float = 0.0


def clock(device: str) -> Callable[[], float]:
  """CPU seconds of this process on a CPU, seconds elsewhere."""
  return time.process_time if device == "cpu" else time.perf_counter


def counted(device: str, wanted: int | None = None) -> int:
  """How often something is timed: as `wanted`, or as the protocol says."""
  return wanted or REPEATS.get(device, REPEATS_ELSEWHERE)


def timed(
  functions: list[Callable[[], Any]], repeats: int, device: str
) -> list[float]:
  """Seconds of each function; all are run in turn, `repeats` times.

  The minimum on a CPU, the median elsewhere; a first round does not count.
  """
  now = clock(device)
  seconds: list[list[float]] = [[] for _ in functions]
  for repeat in range(repeats + 1):
    for function, times in zip(functions, seconds, strict=True):
      began = now()
      function()
      if repeat:
        times.append(now() - began)
  pick = min if device == "cpu" else statistics.median
  return [pick(times) for times in seconds]


def default_dtype(device: str) -> str:
  """In which steps are measured where --dtype does not say it."""
  return "float32" if device == "cpu" else "bfloat16"


def peak_times(flops: int, device: str) -> int:
  """How often a product of so many FLOPs is done in one timed call."""
  return max(1, round(PEAK_FLOPS.get(device, PEAK_FLOPS_ELSEWHERE) / flops))


def peak_functions(dtype: str, device: str) -> list[tuple[int, Any]]:
  """(FLOPs, function) of the products that measure the peak."""
  from avjax import device_rates
  from avjax.step_cost import Product

  result = []
  for m, k, n in PEAK_SHAPES[: 3 if device == "cpu" else 4]:
    product = Product(dtype, (m, k), (k, n), (((1,), (0,)), ((), ())))
    times = peak_times(product.flops, device)
    loop = device_rates.product_loop(product)
    result.append((times * product.flops, functools.partial(loop, times)))
  return result


# Steps tried where what is computed is drawn anew for every step.
TRIED = 16


class Program:
  """A compiled training step.

  Attributes:
    setup: the experiment.
    compiled: (state, batch) -> (state, metrics).
    compile_seconds: that tracing and compiling took; CPU seconds on a CPU.
    clips: in the batch.
    flops: of the step's matrix products, over all devices; where steps draw
      which of several things they compute, of the dearest.
  """

  def __init__(self, setup: Any):
    import jax

    from avjax import flops

    now = clock(jax.default_backend())
    began = now()
    self.setup, traced = setup, setup.trace_step()
    self.compiled = traced.lower().compile()
    self.compile_seconds = now() - began
    self._least_flops, self.flops = flops.of_jaxpr(traced.jaxpr)
    self.clips = next(iter(setup.batch_shapes.values())).shape[0]


class Step(Program):
  """A training step on a synthetic batch that lies on the device.

  A call runs it once, to its end. Where steps draw which of several things they
  compute, it is always one step, of the dearest kind, as the FLOPs are.

  Attributes:
    state: before the next call.
  """

  def __init__(self, setup: Any):
    import jax

    from avjax import experiment

    super().__init__(setup)
    self.state = setup.init_state()
    self._batch = experiment.synthetic_batch(setup)
    self._number: int | None = None
    if self._least_flops < 0.99 * self.flops:
      self._number = self._dearest(clock(jax.default_backend()))

  def __call__(self) -> None:
    import jax

    if self._number is not None:
      step = np.int32(self._number)
      place = self.state["step"].sharding
      self.state = {**self.state, "step": jax.device_put(step, place)}
    self.state, metrics = self.compiled(self.state, self._batch)
    jax.block_until_ready(metrics)

  def _dearest(self, now: Callable[[], float]) -> int:
    """The number of the step that takes longest, of the first few.

    Each runs twice and its lesser time counts: the first of a kind is cold.
    """
    seconds = np.empty((2, TRIED))
    for again, self._number in np.ndindex(2, TRIED):
      began = now()
      self()
      seconds[again, self._number] = now() - began
    return int(np.argmax(seconds.min(0)))


def time_steps(steps: list[Step], repeats: int) -> tuple[list[float], float]:
  """Seconds of each step and the peak in FLOP/s, all measured in turn."""
  import jax

  device, setup = jax.default_backend(), steps[0].setup
  peaks = peak_functions(setup.config.dtype, device)
  times = timed([*steps, *(f for _, f in peaks)], repeats, device)
  seconds, rest = times[: len(steps)], times[len(steps) :]
  peak = max(n / t for (n, _), t in zip(peaks, rest, strict=True))
  return seconds, peak * (setup.mesh.size if device != "cpu" else 1)


def bench_step(setup: Any, repeats: int) -> tuple[list[Row], Any]:
  """The peak and the step on a synthetic batch that lies on the device.

  Returns:
    Rows, and a function (state, batch) -> (state, metrics) with the state.
  """
  step = Step(setup)
  (seconds,), peak = time_steps([step], repeats)
  rate = step.flops / seconds
  rows = [
    Row("matrix-product peak", 0.0, peak, 1.0),
    Row("step, synthetic batch", step.clips / seconds, rate, rate / peak),
  ]
  return rows, (step.compiled, step.state)


def host_batches(config: Any, batch_size: int) -> Iterator[dict[str, Any]]:
  """Training batches from the built data set."""
  from avjax.data import pipeline

  return pipeline.train_batches(
    config.data, batch_size=batch_size, seed=config.seed
  )


def bench_pipeline(config: Any, batch_size: int, repeats: int) -> Row:
  """Batches from disk, nothing else; the mean over a few hundred clips."""
  source = host_batches(config, batch_size)
  count = max(repeats, 256 // batch_size)
  # Until the threads' buffers are full, batches seem dearer than they are.
  for _ in range(max(4, count // 4)):
    next(source)
  now = clock("cpu")
  began = now()
  for _ in range(count):
    next(source)
  return Row("pipeline alone", count * batch_size / (now() - began))


def bench_together(setup: Any, batch_size: int, repeats: int, step: Any) -> Row:
  """Training as it runs: pipeline, transfer and step."""
  import jax

  from avjax import parallel
  from avjax.data import pipeline

  device = jax.default_backend()
  compiled, state = step
  stream = pipeline.device_batches(
    host_batches(setup.config, batch_size),
    parallel.batch_sharding(setup.mesh),
    setup.config.data.prefetch,
  )
  holder = {"state": state}

  def both() -> None:
    batch, _ = next(stream)
    holder["state"], metrics = compiled(holder["state"], batch)
    jax.block_until_ready(metrics)

  now = clock(device)
  both()
  began = now()
  for _ in range(repeats):
    both()
  seconds = (now() - began) / repeats
  stream.close()
  return Row("pipeline and step", batch_size / seconds)


def table(rows: list[Row], title: str) -> str:
  """Markdown."""
  lines = [
    title,
    "",
    "| what | clips/s | GFLOP/s | share of peak |",
    "|---|---|---|---|",
  ]
  for row in rows:
    cells = [
      f"{row.clips_per_s:.2f}" if row.clips_per_s else "",
      f"{row.flops_per_s / 1e9:.1f}" if row.flops_per_s else "",
      f"{row.share_of_peak:.1%}" if row.share_of_peak else "",
    ]
    lines.append(f"| {row.what} | {' | '.join(cells)} |")
  return "\n".join(lines)


def benchmark(
  config: Any, batch_size: int = 0, repeats: int | None = None
) -> list[Row]:
  """All rows for one stage's config; clips of noise where no data is built."""
  import jax

  from avjax import experiment

  repeats = counted(jax.default_backend(), repeats)
  config = bench_configs.with_groups(config, batch_size)
  batch_size = batch_size or config.batch_size
  with contextlib.ExitStack() as stack:
    config = bench_configs.with_data(config, batch_size, stack)
    setup = experiment.build(config, batch_size=batch_size)
    rows, step = bench_step(setup, repeats)
    rows.append(bench_pipeline(config, batch_size, repeats))
    rows.append(bench_together(setup, batch_size, repeats, step))
  return rows


# Of these one is given: what is measured.
MODES = ("config", "compare", "page", "from_json")
# A flag -> with which of them it goes; those not here go with all that measure.
GOES_WITH = {
  "stage": ("config",),
  "options": ("config",),
  "demo": ("compare", "page"),
  "dtype": ("compare", "page"),
}
MEASURING = ("batch_size", "repeats", "pin", "json")


def check_flags(values: Any, words: list[str]) -> None:
  """One thing is measured, with flags that go with it.

  Raises:
    InputError: none or several are, or a flag goes with another.
  """
  modes = [
    name for name in MODES if values[name].value not in (None, False, "")
  ]
  if not modes:
    raise InputError(
      "what to measure? --config=configs/avmae_vgg.py:size=B, --compare avsiam "
      "cavmae avmae, or --page; --from_json=FILE prints tables again"
    )
  if len(modes) > 1:
    first, second = modes[:2]
    raise InputError(
      f"--{first} and --{second} are two things to do: give one of the two"
    )
  if words and not (values.compare or values.page or values.options):
    raise InputError(f"unexpected argument {words[0]!r}")
  if values.compare and not words:
    raise InputError("--compare needs names of systems: --compare avsiam avmae")
  goes_with = GOES_WITH | {name: MODES[:3] for name in MEASURING}
  for name, where in goes_with.items():
    if values[name].present and modes[0] not in where:
      only = " or ".join(f"--{mode}" for mode in where)
      raise InputError(f"--{name} goes with {only} alone")


def pin() -> None:
  """Binds the process to one core; before JAX starts."""
  os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
  os.environ["NPROC"] = os.environ["OMP_NUM_THREADS"] = "1"


def refuse_pin(pinned: bool, device: str) -> None:
  """One core would feed the device, which would wait for it.

  Raises:
    InputError: pinned, and the device is no CPU.
  """
  if pinned and device != "cpu":
    raise InputError(
      f"--pin binds the process to 1 of {os.cpu_count()} cores, which would "
      f"have to feed the {device}: leave it out, or set JAX_PLATFORMS=cpu"
    )


def place(pinned: bool) -> str:
  """What was measured on, in words."""
  import jax

  kind = jax.devices()[0].device_kind
  if pinned:
    return f"{kind}, one pinned core, per CPU second"
  return f"{kind}, {jax.device_count()} device(s)"


def main(argv: list[str]) -> None:
  """Prints the table; with --json also writes it."""
  values = flags.FLAGS
  check_flags(values, argv[1:])
  if values.pin:
    pin()
  if values.page or values.options or values.from_json:
    from avjax import speed_page

    speed_page.command(values, argv[1:])
    return
  import jax

  refuse_pin(values.pin, jax.default_backend())
  if values.compare:
    from avjax import throughput

    title, text, rows = throughput.command(values, argv[1:])
  else:
    config = bench_configs.stage_of(
      commands.with_demo_data(values.config), values.stage
    )
    rows = benchmark(config, values.batch_size, values.repeats)
    title = (
      f"{config.method} on {place(values.pin)}, {config.dtype}, batch "
      f"{values.batch_size or config.batch_size}"
    )
    text = table(rows, title)
  print(text)
  if values.json:
    with open(values.json, "w") as file:
      record = {"title": title, "rows": [dataclasses.asdict(r) for r in rows]}
      json.dump(record, file, indent=2)


def define_flags(values: flags.FlagValues) -> None:
  """The command's flags."""
  config_flags.DEFINE_config_file(
    "config", None, "The config to measure.", flag_values=values
  )
  own = {"flag_values": values}
  flags.DEFINE_integer(
    "batch_size",
    0,
    "Instead of the config's, of 12, or of the page's.",
    0,
    **own,
  )
  flags.DEFINE_integer(
    "repeats", None, "Counted; default 5, on a GPU 20.", 1, **own
  )
  flags.DEFINE_bool("pin", False, "Bind the process to one core.", **own)
  flags.DEFINE_string(
    "stage", "", "Of a staged config; default the first.", **own
  )
  flags.DEFINE_string("json", "", "Also write the table there.", **own)
  flags.DEFINE_bool(
    "compare", False, "Measure the systems named after it.", **own
  )
  flags.DEFINE_bool(
    "page", False, "Measure all, or the rows and kinds named after it.", **own
  )
  flags.DEFINE_bool(
    "options", False, "With --config: remat, scan, … or those named.", **own
  )
  flags.DEFINE_string("from_json", "", "Print its tables again.", **own)
  flags.DEFINE_bool("demo", False, "Of --compare, --page: demo size.", **own)
  words = "Of --compare, --page; default float32 on a CPU, bfloat16 elsewhere."
  flags.DEFINE_enum("dtype", None, DTYPES, words, **own)


if __name__ == "__main__":
  define_flags(flags.FLAGS)
  commands.run(main, words=True, cache=False)  # compiling is timed
