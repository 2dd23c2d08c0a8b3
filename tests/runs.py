"""Runs of test size on real (tiny) clips."""

import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

# Two clips per class to train on and one to test on.
DEMO = {"clips_per_class": 2, "test_per_class": 1, "seed": 3}
ROOT = pathlib.Path(__file__).parent.parent


def xla_flags(devices=1):
  """Simulated devices. Programs run once here: compiling is what takes time."""
  found = [
    f"--xla_force_host_platform_device_count={devices}",
    "--xla_backend_optimization_level=0",
  ]
  # Halve it. XLA ends where it does not know a flag, and later ones may not.
  if jax.version.__version_info__ < (0, 11):
    found += [
      "--xla_cpu_use_fusion_emitters=false",
      "--xla_cpu_parallel_codegen_split_count=1",
    ]
  return " ".join(found)


def load(name, argument=""):
  """configs/<name>.py, of several stages the first."""
  config = importlib.import_module(f"configs.{name}").get_config(argument)
  if config.stages:
    config = config[config.stages[0]].copy_and_resolve_references()
  return config


def value(config, path):
  """Of a config's key such as data.video.size."""
  for key in path.split("."):
    config = config[key]
  return config


def inputs(config, batch_size=2):
  """ShapeDtypeStructs of what a method is given."""
  # Not before conftest.py has installed its checks.
  from avjax.data import augment, pipeline

  shapes = pipeline.batch_shapes(config.data, batch_size)
  batch = {k: jax.ShapeDtypeStruct(*shape) for k, shape in shapes.items()}
  return jax.eval_shape(
    lambda b: augment.prepare(b, config.data, jax.random.key(0), True), batch
  )


def params(config):
  """The parameters' shapes."""
  # Not before conftest.py has installed its checks.
  from avjax import methods

  init = methods.make(config).init
  return jax.eval_shape(init, jax.random.key(0), inputs(config))


def assert_fits(config):
  """It survives being written, and suits its method and optimiser."""
  # Not before conftest.py has installed its checks.
  from avjax import config as config_lib
  from avjax import methods, optim

  written = config_lib.plain(config)
  assert config_lib.plain(config_lib.from_plain(written)) == written
  method = methods.make(config)
  # Refuses multipliers of groups that are not there.
  optim.make(
    config.optimizer,
    lambda _: 0.0,
    params(config),
    method.param_info,
    method.num_layers,
  )


def stage(name, argument="demo", **overrides):
  """One stage of configs/<name>.py at test size, ready for the trainer."""
  return shrink(load(name, argument), **overrides)


# A rate that does not depend on the number of steps, and so leaves programs
# alike that the compilation cache then holds once.
CONSTANT = {"schedule__name": "constant", "schedule__warmup_epochs": 0.0}

# Two layers: what takes time in these tests is compiling.
MODEL = {"width": 32, "depth": 2, "heads": 2, "mlp": 64}
# Where AV-MAE and MBT, which it starts, need the same.
STAGES = {**MODEL, "depth": 3}
PER_METHOD = {
  "avmae": {
    "fusion_layers": 1,
    "decoder_width": 24,
    "decoder_depth": 1,
    "decoder_heads": 3,
    "decoder_mlp": 48,
  },
  "mbt": {"fusion_layer": 1, "n_bottlenecks": 2},
  "cavmae": {
    "decoder_width": 24,
    "decoder_depth": 1,
    "decoder_heads": 3,
    "decoder_mlp": 48,
  },
  "cavmae_finetune": {},
}
PER_METHOD["deteclap"] = PER_METHOD["cavmae"]  # fmt: skip
# Eight clips hold every ratio.
PER_METHOD["avsiam"] = {
  **PER_METHOD["cavmae"], "ratios": (0.0, 0.5), "depth": 1,
  "multimodal_depth": 1,
}  # fmt: skip
PER_METHOD["convnext"] = {"width": 4, "depths": (1, 1, 1, 1)}
PER_METHOD["uavm"] = {
  "specific_layers": 1, "shared_layers": 1, "shared_width": 16,
}  # fmt: skip
PER_METHOD["avsiam_finetune"] = {"depth": 1, "multimodal_depth": 1}
PER_METHOD["coavt_finetune"] = {
  "text_width": 32, "text_depth": 1, "text_heads": 2, "text_mlp": 64,
  "queries": 2,
}  # fmt: skip
PER_METHOD["coavt"] = {**PER_METHOD["coavt_finetune"], "projection": 16}

# Warm-ups of demos that are longer than two steps.
LONG_WARMUP = (
  "cavmae", "deteclap", "avsiam", "avsiam_finetune", "coavt", "coavt_finetune",
)  # fmt: skip


def shrink(config, **overrides):
  """Two steps on eight clips, a tiny model, evaluations on eight clips."""
  config.model.update({k: v for k, v in MODEL.items() if k in config.model})
  config.model.update(PER_METHOD[config.method])
  config.total_steps, config.total_epochs = 2, 0.0
  if config.method in LONG_WARMUP:
    config.schedule.warmup_epochs = 0.0
  config.batch_size = 8
  config.log_every = 1
  config.mesh.data = 1
  config.checkpoint.every_steps = 1
  config.data.demo.update(DEMO)
  for section in config.evals.values():
    section.every_epochs, section.batch_size, section.limit = 0.0, 8, 8
    section.views = min(section.views, 2)
    if "pictures" in section:
      section.pictures = min(section.pictures, 1)
  for key, value in overrides.items():
    place = config
    *path, last = key.split("__")
    for part in path:
      place = place[part]
    place[last] = value
  if config.data.object_scores == "truth":
    from data_prep import demo_objects

    folder = demo_objects.ensure(config.data, pathlib.Path(config.data.dir))
    config.data.object_scores = str(folder)
  if config.data.features == "demo":
    config.data.features = str(noise(config.data))
  return config


def noise(data):
  """A folder of stored features of av_demo that mean nothing."""
  from avjax.data import records
  from data_prep import synthetic

  # One of each process: only one may write to it.
  folder = pathlib.Path(data.dir) / f"noise_{os.getpid()}"
  if not folder.exists():
    splits = [records.Split(data, name) for name in ("train", "test")]
    ids = [str(i) for split in splits for i in split.column("id")]
    synthetic.features(folder, data, ids=ids)
  return folder / "features"


_COMPILED = {}  # (step, first state) by all of a config but its data set


def first_step(config):
  """Trains one step without the loop around it; the batch and the loss."""
  # Not before conftest.py has installed its checks.
  from avjax import experiment, parallel
  from avjax.data import pipeline

  setup = experiment.build(plain(config))
  batches = pipeline.train_batches(
    setup.config.data, batch_size=config.batch_size, seed=0
  )
  batch = next(batches)
  batches.close()
  arrays = {k: batch[k] for k in setup.batch_shapes}
  arrays = jax.device_put(arrays, parallel.batch_sharding(setup.mesh))
  facts = config.copy_and_resolve_references()
  facts.data.update(name="", dir="", split="")
  key = repr((facts, jax.tree.map(str, setup.batch_shapes)))
  if key not in _COMPILED:
    _COMPILED[key] = setup.compile_step(), setup.init_state()
  step, state = _COMPILED[key]
  _, metrics = step(jax.tree.map(jnp.copy, state), arrays)
  return batch, float(metrics["loss"])


def metrics(workdir):
  """Lines of metrics.jsonl."""
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def losses(workdir):
  """Step -> training loss."""
  return {m["step"]: m["loss"] for m in metrics(workdir) if "loss" in m}


def command(name, workdir, *flags, argument="demo", devices=1):
  """The main program's argument list and environment at test size."""
  args = [
    sys.executable, "-m", "avjax.main",
    f"--config=configs/{name}.py:{argument}", f"--workdir={workdir}",
    "--config.total_epochs=0.0", "--config.batch_size=8",
    "--config.log_every=1", "--config.checkpoint.every_steps=1",
    "--config.mesh.data=-1", "--config.schedule.name=constant",
    "--config.schedule.warmup_epochs=0.0",
    *(f"--config.data.demo.{k}={v}" for k, v in DEMO.items()),
    *(f"--config.model.{k}={v}" for k, v in MODEL.items()),
    "--config.model.fusion_layer=1", *flags,
  ]  # fmt: skip
  env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
  return args, {**os.environ, **env}


def run(name, workdir, *flags, **options):
  """Runs the main program; returns the finished process with its output."""
  args, env = command(name, workdir, *flags, **options)
  return subprocess.run(
    args, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
  )


def start(name, workdir, *flags, **options):
  """Starts the main program; its output goes to workdir/log.txt."""
  args, env = command(name, workdir, *flags, **options)
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  with (pathlib.Path(workdir) / "log.txt").open("w") as log:
    return subprocess.Popen(args, env=env, cwd=ROOT, stdout=log, stderr=log)


def stop_at(process, workdir, step, number=signal.SIGTERM, timeout=240):
  """Sends a signal once metrics of `step` are written; the exit status."""
  until = time.time() + timeout
  while time.time() < until and process.poll() is None:
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if path.exists() and f'"step": {step},' in path.read_text():
      process.send_signal(number)
      break
    time.sleep(0.02)
  return process.wait(timeout=60)


def wait_until(condition, timeout):
  """Returns once `condition()` holds, which must be within so many seconds."""
  until = time.time() + timeout
  while not condition():
    assert time.time() < until, f"not within {timeout} s"
    time.sleep(0.02)


def two_processes(code, folder):
  """Runs Python code in two processes of two devices, which must both succeed.

  Its arguments are the number of the process, a free port and the folder.
  """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  flags = "--xla_force_host_platform_device_count=2"
  children = [
    subprocess.Popen(
      [sys.executable, "-c", code, str(i), port, str(folder)],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    errors = [child.communicate(timeout=120)[1] for child in children]
  finally:
    for child in children:
      child.kill()
  for child, error in zip(children, errors, strict=True):
    assert child.returncode == 0, error[-3000:]


def plain(config):
  """A resolved, locked config as the trainer gets it."""
  # Not before conftest.py has installed its checks.
  from avjax import config as config_lib

  return config_lib.from_plain(config_lib.plain(config))


def over_devices(inputs):
  """A batch spread over all simulated devices, equally many examples each."""
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  return jax.device_put(inputs, place)
