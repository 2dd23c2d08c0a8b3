"""Rows of the page of speed, each measured in a process of its own.

avjax.speed_page says what the page has and keeps the record. Here a `Task`
becomes numbers: one training step, the same with the pipeline that feeds it,
the pipeline alone, or the log-mel. See avjax.benchmark for how is timed.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from avjax import bench_configs, benchmark, errors
from avjax import config as config_lib
from avjax.errors import InputError

# Words of a device's name -> FLOP/s of dense 16-bit matrix products, as the
# vendor's data sheets have them (bfloat16; of V100 float16). The longest that
# fit count.
VENDOR_PEAKS = {
  "H100": 989e12,
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "H200": 989e12,
  "H200 NVL": 835e12,
  "A100": 312e12,
  "V100": 125e12,
  "RTX A5000": 111e12,
}
# Words of devices of the same name that have less.
LESSER = ("laptop", "mig")
ROUNDS = 5  # of the pipeline's rows
CLIPS = 256  # in such a round
VIEWS = 10


@dataclasses.dataclass(frozen=True)
class Task:
  """A row to measure; goes to another process.

  Attributes:
    kind: of MEASURES.
    name: of the row.
    config: a plain config of one stage.
    batch_size: on a CPU, and elsewhere if `fixed`; else the config's counts,
      halved until it fits.
    repeats: counted ones; 0 = as the device is.
    fixed: the batch size was asked for.
  """

  kind: str
  name: str
  config: Mapping[str, Any]
  batch_size: int
  repeats: int = 0
  fixed: bool = False

  def batch(self, device: str) -> int:
    """The batch to begin with on a kind of device."""
    own = self.fixed or device == "cpu"
    return self.batch_size if own else self.config["batch_size"]


def place() -> dict[str, Any]:
  """What this process measures on."""
  import jax

  kind, backend = jax.devices()[0].device_kind, jax.default_backend()
  cpu = backend == "cpu"
  return {
    "backend": backend,
    "device": processor() if cpu else kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
    **({} if cpu else {"host": processor()}),
  }


def processor() -> str:
  """The CPU's name."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return "CPU"


def vendor_peak(device: str) -> float:
  """FLOP/s of VENDOR_PEAKS; 0 where the device is not there."""
  words = device.lower().replace("-", " ").split()
  text = f" {' '.join(words)} "
  found = [name for name in VENDOR_PEAKS if f" {name.lower()} " in text]
  if set(words) & set(LESSER):
    return 0.0
  return VENDOR_PEAKS[max(found, key=len)] if found else 0.0


def mfu(flops_per_s: float, device: str, devices: int, dtype: str) -> float:
  """Model FLOP utilisation; 0 where the vendor's figure is not of this dtype.

  Args:
    flops_per_s: of the model's products, three times the forward pass; what
      rematerialisation computes again does not count.
    device: its name.
    devices: how many.
    dtype: of the computation.
  """
  peak = vendor_peak(device) if dtype == "bfloat16" else 0.0
  return flops_per_s / (peak * devices) if peak else 0.0


def measure(task: Task) -> dict[str, Any]:
  """The numbers of a row.

  Raises:
    InputError: the config cannot be measured.
  """
  function = errors.lookup(MEASURES, task.kind, "kind of row")
  with contextlib.ExitStack() as stack:
    # What is printed here is no table.
    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
    return function(task, config_lib.from_plain(task.config), stack)


# -------------------------------------------------------------------- steps


def step_row(
  task: Task, config: Any, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """A training step on a batch that lies on the device."""
  import jax

  from avjax import memory, throughput

  device = jax.default_backend()
  config = bench_configs.with_scores(config, stack)
  step, measured = fitting(config, task.batch(device), task.fixed)
  repeats = benchmark.counted(device, task.repeats)
  (seconds,), peak = benchmark.time_steps([step], repeats)
  needed = memory.analysis(step.compiled) or memory.Bytes(0, 0)
  model = 3 * forward_flops(step.setup)
  devices = step.setup.mesh.size
  used = place()["device"]
  return {
    "batch": step.clips,
    "group": step.setup.config.model.get("group_size", 0),
    "repeats": repeats,
    "step_s": seconds,
    "clips_per_s": step.clips / seconds,
    "flops_per_clip": step.flops / step.clips,
    "flops_per_s": step.flops / seconds,
    "peak_flops_per_s": peak,
    "share_of_peak": step.flops / seconds / peak,
    "model_flops_per_clip": model / step.clips,
    "mfu": mfu(model / seconds, used, devices, config.dtype),
    "vendor_peak": vendor_peak(used),
    "parameters": throughput.trained(step.setup),
    "held_bytes": needed.held,
    "temporary_bytes": needed.temporary,
    "measured_bytes": measured,
    "compile_s": step.compile_seconds,
  }


def fitting(
  config: Any, batch_size: int, fixed: bool
) -> tuple[benchmark.Step, int]:
  """A step, its batch halved until the device holds it; with `tried`'s bytes.

  Raises:
    InputError: a fixed batch, or the smallest one, does not fit.
  """
  while True:
    setup = bench_configs.experiment_of(config, batch_size)
    found = tried(setup)
    if found:
      return found
    smaller = halved(setup, batch_size)
    if fixed or not smaller:
      raise InputError(
        f"a batch of {batch_size} does not fit into the device's memory"
      )
    print(f"a batch of {batch_size} does not fit: {smaller}", file=sys.stderr)
    batch_size = smaller


def tried(setup: Any) -> tuple[benchmark.Step, int] | None:
  """The step, on an accelerator once it ran beside what measures the peak.

  Returns:
    It and the most bytes that it used (0 where the device does not tell), or
    None: the device does not hold it. Then nothing of it is left there.
  """
  import jax

  from avjax import memory

  device = jax.default_backend()
  try:
    step = benchmark.Step(setup)
    if device == "cpu":
      return step, 0
    step()
    measured = memory.measured_peak()
    for _, product in benchmark.peak_functions(setup.config.dtype, device):
      product()
    return step, measured
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
  return None


def halved(setup: Any, batch_size: int) -> int:
  """About half a batch, such as the method takes it; 0 = there is none.

  Mixup pairs neighbours: it is even.
  """
  parts = setup.config.optimizer.accumulate * setup.mesh.size
  multiple = math.lcm(2, setup.method.batch_multiple) * parts
  return batch_size // 2 // multiple * multiple


def forward_flops(setup: Any) -> int:
  """FLOPs of the loss's matrix products for a batch, without its gradients."""
  import jax
  import jax.numpy as jnp

  from avjax import experiment, flops

  rng = jax.random.key(0)
  inputs = jax.eval_shape(
    lambda batch: setup.prepare(batch, rng, True), setup.batch_shapes
  )

  def loss(params: Any, inputs: Any) -> Any:
    params = experiment.cast(params, setup.config.dtype)
    return setup.method.loss(params, inputs, rng, jnp.int32(0))[0]

  return flops.count(loss, setup.state_shapes["params"], inputs)


# ------------------------------------------------- the pipeline and the step


def together_row(
  task: Task, config: Any, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """The step fed by the pipeline beside the step on a batch on the device."""
  import jax

  from avjax import parallel
  from avjax.data import pipeline

  device = jax.default_backend()
  repeats = benchmark.counted(device, task.repeats)
  step, _ = fitting(config, task.batch(device), task.fixed)
  config = on_noise(config, step.clips, stack)
  stream = stack.enter_context(
    contextlib.closing(
      pipeline.device_batches(
        benchmark.host_batches(config, step.clips),
        parallel.batch_sharding(step.setup.mesh),
        config.data.prefetch,
      )
    )
  )

  def both() -> None:
    batch, _ = next(stream)
    step.state, metrics = step.compiled(step.state, batch)
    jax.block_until_ready(metrics)

  if device == "cpu":
    alone, fed = benchmark.timed([step, both], repeats, device)
  else:
    # In turn, the pipeline would have the time of two steps for each batch.
    (alone,) = benchmark.timed([step], repeats, device)
    fed = _mean_of_later(both, repeats)
  return {
    "batch": step.clips,
    "repeats": repeats,
    "clips_per_s": step.clips / fed,
    "step_s": alone,
    "fed_step_s": fed,
    "step_to_both": alone / fed,
  }


def _mean_of_later(function: Callable[[], None], repeats: int) -> float:
  """Seconds of a call once as many went before, whose batches were ready."""
  for _ in range(repeats):
    function()
  began = time.perf_counter()
  for _ in range(repeats):
    function()
  return (time.perf_counter() - began) / repeats


def on_noise(config: Any, batch_size: int, stack: contextlib.ExitStack) -> Any:
  """The config on synthetic clips, whether or not its data set is built."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.mixture = ()
    if config.data.features:  # no pictures are read: the smaller records
      config.data.features, config.data.variant = "noise", "frames10"
  return bench_configs.with_noise(config, batch_size, stack)


# ------------------------------------------------------------- the pipeline


def feed_row(
  task: Task, config: Any, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """The pipeline alone, in CPU seconds of all its threads."""
  views, host_mel = task.name == "ten_views", task.name == "host_mel"
  config = on_noise(config, task.batch_size, stack)
  source = stack.enter_context(
    contextlib.closing(batches(config, task.batch_size, views))
  )
  rate = config.data.audio.rate

  def one() -> None:
    batch = next(source)
    if host_mel:
      fbanks(batch["waveform"], config.data.fbank, rate)

  count = max(1, CLIPS // task.batch_size)
  # Until the threads' buffers are full, batches seem dearer than they are.
  for _ in range(max(4, count // 4)):
    one()
  rounds = [_cpu_seconds(one, count) for _ in range(task.repeats or ROUNDS)]
  rate = task.batch_size / statistics.median(rounds)
  return {
    "batch": task.batch_size,
    "repeats": len(rounds),
    "clips_per_s": rate,
    "ms_per_clip": 1e3 / rate,
    **sizes(config, views),
  }


def _cpu_seconds(function: Callable[[], None], count: int) -> float:
  now = benchmark.clock("cpu")
  began = now()
  for _ in range(count):
    function()
  return (now() - began) / count


def batches(
  config: Any, batch_size: int, views: bool
) -> Iterator[dict[str, Any]]:
  """Endless training batches, or evaluation's with VIEWS views of a clip."""
  from avjax.data import pipeline

  if not views:
    yield from benchmark.host_batches(config, batch_size)
  for _ in itertools.count():
    yield from pipeline.eval_batches(
      config.data, split=config.data.split, batch_size=batch_size, views=VIEWS
    )


def sizes(config: Any, views: bool) -> dict[str, Any]:
  """What is read of a clip, and how large it is as stored."""
  from avjax.data import records

  data = config.data
  if data.features:
    read = f"{data.feature_frames} x {data.feature_width} features"
    return {"read": read, "jpeg_kb": 0.0, "record_kb": 0.0}
  record = records.Split(data, data.split)[0]
  pictures = [len(blob) for blob in record.blobs("frames")]
  sound = sum(len(blob) for blob in record.blobs("waveform"))
  words = []
  if "v" in data.modality:
    count = data.video.num_frames * (VIEWS if views else 1)
    words.append(f"{count} of {len(pictures)} pictures")
  if "a" in data.modality:
    words.append(f"{data.audio.seconds:g} s of sound")
  if data.text.vocabulary:
    words.append("a caption")
  return {
    "read": ", ".join(words),
    "jpeg_kb": float(np.mean(pictures)) / 1e3 if pictures else 0.0,
    "record_kb": (sum(pictures) + sound) / 1e3,
  }


def fbanks(waveform: Any, section: Any, rate: int) -> None:
  """Log-mel of every clip of a batch on the host."""
  from avjax.data import audio

  for clip in waveform:
    audio.fbank(clip, section, rate, np)


def mel_row(
  task: Task, config: Any, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """Log-mel alone: `mel_host` by numpy, `mel_device` by JAX."""
  import jax

  from avjax.data import audio

  data = config.data
  length = round(data.audio.seconds * data.audio.rate)
  draw = np.random.default_rng(0).integers
  waveform = draw(-3_000, 3_000, (task.batch_size, length)).astype(np.int16)
  device = jax.default_backend() if task.name == "mel_device" else "cpu"
  repeats = benchmark.counted(device, task.repeats)
  if task.name == "mel_device":
    on_device = jax.device_put(waveform)
    made = jax.jit(lambda x: audio.fbank(x, data.fbank, data.audio.rate))
    functions = [lambda: made(on_device).block_until_ready()]
  else:
    functions = [lambda: fbanks(waveform, data.fbank, data.audio.rate)]
  (seconds,) = benchmark.timed(functions, repeats, device)
  return {
    "batch": task.batch_size,
    "repeats": repeats,
    "clips_per_s": task.batch_size / seconds,
    "ms_per_clip": 1e3 * seconds / task.batch_size,
    "read": f"{data.audio.seconds:g} s of sound",
    "jpeg_kb": 0.0,
    "record_kb": 0.0,
  }


MEASURES = {
  "steps": step_row,
  "options": step_row,
  "together": together_row,
  "pipeline": feed_row,
  "mel": mel_row,
}
