"""Scale of whole runs: full-size states, depth, compilations, processes."""

import functools
import logging
import math
import re
import time

import jax
import pytest

from avjax import experiment, train
from tests import runs

# One config of each model; the others have the same arrays.
CONFIGS = (
  "avmae_vgg",
  "avmae_vgg_finetune",
  "avsiam_audioset",
  "cavmae_vgg",
  "coavt_audioset",
  "uavm_vgg",
  "uavm_extractor_vgg",
)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_of_eight_devices_holds_an_eighth(name):
  """Parameters, moments and averages of the full size, over fsdp."""
  config = runs.load(name)
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 8, 1
  # A multiple of what any method takes together, on each device, and of the
  # 30 examples of CAV-MAE's groups.
  setup = experiment.build(
    runs.plain(config), batch_size=8 * 6 * 12 * 5, steps_per_epoch=10_000
  )
  whole = share = 0
  for leaf in jax.tree.leaves(setup.state_shapes):
    width = leaf.dtype.itemsize
    whole += width * math.prod(leaf.shape)
    share += width * math.prod(leaf.sharding.shard_shape(leaf.shape))
  assert share <= 1.02 * whole / 8


# --- Depth -------------------------------------------------------------------

SCANNED = {
  "avmae": ("avmae_vgg", ("depth",)),
  "mbt": ("avmae_vgg_finetune", ("depth",)),
  "cavmae": ("cavmae_vgg", ("depth",)),
  "avsiam": ("avsiam_audioset", ("depth",)),
  "coavt": ("coavt_audioset", ("depth", "text_depth")),
}


def lowered(name, depth):
  """The program of a step that scans its layers, not compiled yet."""
  config, keys = SCANNED[name]
  model = {f"model__{key}": depth for key in keys}
  config = runs.stage(
    config, evals={}, model__scan=True, **runs.CONSTANT, **model
  )
  setup = experiment.build(runs.plain(config), batch_size=8, steps_per_epoch=10)
  step = jax.jit(functools.partial(experiment.train_step, setup))
  return step.lower(setup.state_shapes, setup.batch_shapes)


@pytest.mark.parametrize("name", SCANNED)
def test_program_does_not_grow_with_depth(name):
  programs = [lowered(name, depth) for depth in (4, 12)]
  low, high = (len(x.as_text().splitlines()) for x in programs)
  assert high <= 1.15 * low
  if name == "mbt":  # The quickest to compile.
    sizes, seconds = [], []
    for program in programs:
      began = time.process_time()
      compiled = program.compile()
      seconds.append(time.process_time() - began)
      sizes.append(len(compiled.as_text().splitlines()))
    assert sizes[1] <= 1.15 * sizes[0]
    # Noise of a shared machine and the first use of the compiler included.
    assert seconds[1] <= 2 * seconds[0] + 2


# --- Compilations ------------------------------------------------------------


def test_one_compilation_in_a_run(demo_data, tmp_path, caplog):
  """Of the step and of the evaluation, whose last batch is not full."""
  config = runs.stage(
    "avmae_vgg_finetune", data__dir=demo_data, batch_size=10, total_steps=6,
    **runs.CONSTANT,
  )  # fmt: skip
  for section in config.evals.values():
    section.every_steps, section.limit = 3, 20  # 8 + 8 + 4 clips
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    train.train_and_evaluate(runs.plain(config), tmp_path)
  found = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
  assert found.count("train_step") == found.count("_scores") == 1
  steps = [line for line in runs.metrics(tmp_path) if "loss" in line]
  assert len(steps) == 6


# --- Processes ---------------------------------------------------------------

SHARES = """
import sys
import jax
import numpy as np
process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, process)
from jax.experimental import multihost_utils
from avjax.data import pipeline, records
from tests import runs
data = runs.stage("avmae_vgg_finetune", data__dir=folder).data
read = []
init = records.Record.__init__
def counted(self, data):
  read.append(len(data))
  init(self, data)
records.Record.__init__ = counted
def batches(index, count):
  read.clear()
  found = list(pipeline.eval_batches(
    data, split="test", batch_size=8, limit=16, process_index=index,
    process_count=count,
  ))
  return found, np.array([len(read), sum(read)])
whole, total = batches(0, 1)
parts, share = batches(process, 2)
assert total[0] == 16 and share[0] == 8
for one, part in zip(whole, parts, strict=True):
  mine = slice(4 * process, 4 * process + 4)
  assert part["id"] == one["id"][mine]
  np.testing.assert_array_equal(part["frames"], one["frames"][mine])
shares = multihost_utils.process_allgather(share)
np.testing.assert_array_equal(shares.sum(0), total)
"""


def test_each_process_reads_its_own_share(demo_data):
  runs.two_processes(SHARES, demo_data)
