"""What is planned is what the program says, and what is measured."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import types

import jax
import pytest
from absl import flags

from avjax import (
  bench_configs,
  benchmark,
  collectives,
  device_rates,
  experiment,
  flops,
  grad_cache,
  memory,
  methods,
  parallel,
  plan,
  plan_report,
  step_cost,
  trees,
)
from avjax.errors import InputError
from tests import runs

# The prediction and the step are of milliseconds here, on a machine that others
# use: a few times either way. Full-size steps are within a fifth.
FACTOR = 4.0


def small(**overrides):
  """A tiny model whose matrices divide by eight."""
  return runs.plain(runs.stage("cavmae_audioset", **overrides))


@pytest.fixture(scope="module")
def compiled():
  """(data, fsdp) -> the program; each compiled once."""
  found = {}

  def get(data, fsdp):
    if (data, fsdp) not in found:
      config = small(mesh__data=data, mesh__fsdp=fsdp)
      setup = plan.prepared(config, 0, 1_000, contextlib.ExitStack())
      found[data, fsdp] = benchmark.Program(setup)
    return found[data, fsdp]

  return get


def parameters(setup):
  return sum(
    4 * math.prod(leaf.shape)
    for leaf in trees.flatten(setup.state_shapes["params"]).values()
  )


def moved(setup):
  """Bytes of the parameters that the optimiser moves."""
  leaves = trees.flatten(setup.state_shapes["opt_state"]["mu"]).values()
  return sum(4 * math.prod(leaf.shape) for leaf in leaves)


def test_products_are_those_that_the_trace_has(compiled):
  program = compiled(1, 1)
  found = plan.assemble(
    program, step_cost.kernels(program.compiled), "h100", None, clips=1_000
  )
  assert found.device_flops == pytest.approx(found.flops, rel=0.02)
  assert not found.traffic and found.network_s == 0


def test_data_parallel_sends_the_gradients_once(compiled):
  program = compiled(8, 1)
  setup, step = program.setup, program.compiled
  sent = step_cost.transfers(step, dict(setup.mesh.shape))
  (reduced,) = [one for one in sent if one.kind == "all-reduce"]
  assert reduced.axes == "data" and reduced.devices == tuple(range(8))
  # Twice 7/8 of the gradients, and what else is summed over the clips.
  least, most = 1.75 * moved(setup), 1.25 * 1.75 * parameters(setup)
  assert least < reduced.sent_bytes < most
  totals = {}
  for one in sent:
    totals[one.kind] = totals.get(one.kind, 0) + one.sent_bytes
  assert totals == pytest.approx(collectives.traffic(step))


def test_split_parameters_need_an_eighth():
  """All but what no matrix holds; nothing has to be compiled for that."""
  silent = types.SimpleNamespace(memory_analysis=lambda: None)
  found = {}
  for data, fsdp in ((8, 1), (1, 8)):
    config = small(mesh__data=data, mesh__fsdp=fsdp)
    setup = plan.prepared(config, 0, 1_000, contextlib.ExitStack())
    found[fsdp] = plan.memory_of(setup, silent)
  whole, split = found[1], found[8]
  assert whole.parameters == parameters(setup)
  matrices = sum(
    4 * math.prod(leaf.shape)
    for leaf in trees.flatten(setup.state_shapes["params"]).values()
    if "fsdp" in str(leaf.sharding.spec)
  )
  rest = whole.parameters - matrices
  assert split.parameters == rest + matrices / 8
  assert split.moments < whole.moments and split.batch == whole.batch


def a_plan(**changes):
  """Eight devices; a day is a thousand steps of 86.4 s."""
  values = plan_report.Plan(
    method="cavmae", device="h100", mesh={"data": 4, "fsdp": 2, "tensor": 1},
    dtype="bfloat16", batch_size=64, clips=640, total_steps=1_000,
    memory=plan_report.Memory(20 << 30, 40 << 30, 1 << 30, 10 << 30),
    capacity=80 << 30,
    traffic=(("all-reduce", "data", 1e9, 6.4),), flops=8 * 10**15,
    device_flops=10**15, products_s=50.0, other_s=30.0, network_s=6.4,
    clips_per_core=1.0, cores=1.0, peak=1e15, compile_s=1.0, measured=False,
  )  # fmt: skip
  return dataclasses.replace(values, **changes)


def test_days_are_steps_times_seconds():
  found = a_plan()
  assert found.step_s == pytest.approx(86.4)
  assert found.days == pytest.approx(1.0)
  assert found.clips_per_s == pytest.approx(64 / 86.4)
  text = plan_report.report(found)
  for words in (
    "nobody measured", "run: 1,000 steps of 64 (an epoch is 640 clips): 1 days",
    "all-reduce over data", "limit: matrix products", "1% of the peak",
    "hosts: 0.741 of 8 cores",
  ):  # fmt: skip
    assert words in text, text
  assert plan_report.as_json(found)["days"] == found.days


@pytest.mark.parametrize(
  "changes, limit",
  [
    ({"products_s": 1.0}, "memory traffic of the other kernels"),
    ({"network_s": 60.0}, "network"),
    ({"cores": 0.05}, "input pipeline"),
    ({"capacity": 70 << 30}, "memory capacity"),
  ],
)
def test_what_limits(changes, limit):
  assert a_plan(**changes).limit == limit


@pytest.mark.parametrize(
  "gib, held, work, words",
  [
    # The state is the larger part: split it further.
    (60, 60, 10, "--config.mesh.fsdp=4"),
    # Activations are: layers again, then a batch in parts, then both.
    (40, 15, 40, "--config.pretrain.model.remat=full"),
    (26, 15, 40, "--config.pretrain.grad_cache=16"),
    (14, 20, 20, "--config.mesh.fsdp=4 --config.pretrain.grad_cache=8"),
    (1, 20, 20, "more devices, or a smaller --batch_size"),
  ],
)  # fmt: skip
def test_what_does_not_fit(gib, held, work, words):
  config = runs.plain(runs.stage("cavmae_audioset", mesh__data=-1))
  needed = plan_report.Memory(held << 30, 0, 1 << 20, work << 30)
  found = a_plan(memory=needed, capacity=float(gib << 30))
  assert plan_report.remedy(found, config, "--config.pretrain") == words
  text = plan_report.report(dataclasses.replace(found, remedy=words))
  missing = memory.in_words(needed.total - (gib << 30))
  assert f"DOES NOT FIT: {missing} more than the device has" in text
  assert words in text


def on(devices, batch_size, tensor=1):
  """A plan whose memory is a few GiB of state and 200 of work, of 72."""
  return a_plan(
    mesh={"data": devices // tensor, "fsdp": 1, "tensor": tensor},
    batch_size=batch_size, capacity=float(72 << 30),
    memory=plan_report.Memory(1 << 30, 2 << 30, 1 << 30, 200 << 30),
  )  # fmt: skip


def accepted(found, config, words):
  """The config with the proposed flags, by what the trainer checks."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for word in words.split():
      key, value = word.split("=")
      *path, last = key.removeprefix("--config.").split(".")
      place = config
      for part in path:
        place = place[part]
      place[last] = int(value) if value.lstrip("-").isdigit() else value
  one = jax.devices()[:1]
  mesh = parallel.make_mesh(config.mesh, one * found.devices)
  assert mesh.size == found.devices
  method, size = methods.make(config), found.batch_size
  experiment.check_batch(config, size, mesh, method.batch_multiple)
  grad_cache.check(config, method, size, parallel.ways(mesh))
  return config


@pytest.mark.parametrize(
  "name, devices, changes, words",
  [
    # Each of 64 devices takes 6 clips together.
    ("avsiam_audioset", 64, {}, "--config.grad_cache=384"),
    ("cavmae_audioset", 1, {}, "--config.grad_cache=36"),
    ("cavmae_audioset", 1, {"grad_cache": 12}, "--config.grad_cache=4"),
    # Which grad_cache refuses; the contrast's groups of 27 stay whole.
    (
      "cavmae_audioset", 1, {"data.augment.mixup": 0.5},
      "--config.optimizer.accumulate=4",
    ),
    ("cavmae_vgg_finetune", 2, {}, "--config.optimizer.accumulate=3"),
  ],
)  # fmt: skip
def test_a_batch_in_parts_that_the_trainer_accepts(
  name, devices, changes, words
):
  config = bench_configs.load(name)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
    if "remat" in config.model:
      config.model.remat = "full"
  found = on(devices, config.batch_size)
  assert plan_report.remedy(found, config, "--config") == words
  made = accepted(found, config, words)
  if config.model.get("group_size", 0):
    part = made.batch_size // made.optimizer.accumulate
    assert part % config.model.group_size == 0


def test_splits_are_of_meshes_that_there_are():
  """Twelve devices are no 4 x 2 x any."""
  config = bench_configs.load("cavmae_audioset")
  with config.unlocked():
    config.mesh.tensor = 2
  found = on(12, 108, tensor=2)
  for gib, words in ((80, 2), (150, 3), (250, 6)):
    state = plan_report.Memory(gib << 30, 0, 1 << 30, 10 << 30)
    large = dataclasses.replace(found, memory=state)
    flag = f"--config.mesh.fsdp={words}"
    assert plan_report.remedy(large, config, "--config") == flag
    accepted(large, config, flag)
  # An axis that was given gives way.
  with config.unlocked():
    config.mesh.data = 6
  words = plan_report.remedy(large, config, "--config")
  assert words == "--config.mesh.data=-1 --config.mesh.fsdp=6"
  accepted(large, config, words)


def test_an_unknown_device_is_refused_with_the_nearest():
  with pytest.raises(InputError, match="device 'h10'. Did you mean 'h100'"):
    device_rates.find("h10")
  assert device_rates.find("cpu") is None


def test_published_clips_stand_in_for_a_data_set(tmp_path):
  data = runs.load("cavmae_audioset").data
  data.dir = str(tmp_path)
  assert plan.clips_of(data, 0) == 1_857_210
  assert plan.clips_of(data, 12) == 12
  data.mixture = ("audioset:train_20k:2", "vggsound:train:1")
  assert plan.clips_of(data, 0) == 20_361 + 172_427
  data.mixture, data.name, data.split = (), "clotho", "train"
  with pytest.raises(InputError, match="--clips=NUMBER"):
    plan.clips_of(data, 0)


def test_links_within_a_host_and_beyond():
  h100 = device_rates.DEVICES["h100"]
  rate = lambda *group: device_rates.link_rate(h100, group) / 0.8  # noqa: E731
  assert rate(0, 1, 7) == 450e9
  assert rate(0, 8, 16) == 50e9
  assert rate(*range(16)) == 400e9


RING = """HloModule ring, num_partitions=16
ENTRY %main (x: f32[64,4]) -> f32[64,4] {{
  %x = f32[64,4]{{1,0}} parameter(0)
  ROOT %p = f32[64,4]{{1,0}} collective-permute(%x), source_target_pairs={{{}}}
}}
"""


@pytest.mark.parametrize(
  "step, axes, rate",
  [
    (1, "data x fsdp", 0.8 * 50e9),  # 7 to 8 and 15 to 0: a card each
    (8, "data", 0.8 * 50e9),
  ],
)
def test_a_ring_is_as_fast_as_its_slowest_pair(step, axes, rate):
  pairs = ",".join(f"{{{n},{(n + step) % 16}}}" for n in range(16))
  mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 8, "tensor": 1})
  config = types.SimpleNamespace(dtype="float32")
  program = types.SimpleNamespace(
    compiled=RING.format(pairs),
    setup=types.SimpleNamespace(mesh=mesh, config=config),
  )
  (found,) = plan._traffic(program, device_rates.DEVICES["h100"])
  assert found[:3] == ("collective-permute", axes, 1_024)
  assert found[3] == pytest.approx(1_024 / rate)


@pytest.mark.parametrize(
  "device, dtype, name",
  [
    ("cpu", "float32", "auto"),
    ("tpu-v5e", "float32", "plain"),
    ("tpu-v5e", "bfloat16", "plain"),
    ("h100", "float32", "plain"),
    ("h100", "bfloat16", "auto"),
  ],
)
def test_attention_is_that_of_the_device(device, dtype, name, monkeypatch):
  """Where it is cuDNN's, auto leaves blocks, which need as little memory."""

  class Stop(Exception):
    pass

  def program(setup):
    assert setup.config.model.attention == name
    raise Stop

  monkeypatch.setattr(benchmark, "Program", program)
  config = small(dtype=dtype)
  assert config.model.attention == "auto"
  with pytest.raises(Stop):
    plan.make(config, device, clips=1_000)
  assert config.model.attention == "auto"


def test_heads_that_cudnn_does_not_know():
  config = small(dtype="bfloat16", model__width=36, model__heads=3)
  assert plan.with_attention(config, "h100").model.attention == "plain"
  # UAVM's have 256 numbers; a ViT of a named size has 64 to 80.
  for name, found in (("uavm_vgg", "plain"), ("avmae_vgg", "auto")):
    config = bench_configs.load(name, dtype="bfloat16")
    assert plan.with_attention(config, "h100").model.attention == found


def test_split_parameters_travel_in_half_precision():
  """The compiler for CPUs has float32 in both programs."""
  sheet, sent, plain = device_rates.DEVICES["h100"], {}, {}
  for dtype in ("float32", "bfloat16"):
    config = small(mesh__data=2, mesh__fsdp=4, dtype=dtype)
    setup = plan.prepared(config, 0, 1_000, contextlib.ExitStack())
    program = benchmark.Program(setup)
    for found, device in ((sent, sheet), (plain, None)):
      rows = plan._traffic(program, device)
      found[dtype] = {row[:2]: row[2] for row in rows}
  gathered = ("all-gather", "fsdp")
  assert plain["bfloat16"][gathered] == plain["float32"][gathered]
  assert sent["bfloat16"][gathered] == sent["float32"][gathered] / 2
  # What is reduced and what is gathered of the batch stays.
  for rows in (sent["bfloat16"], plain["bfloat16"]):
    rows.pop(gathered)
  assert sent["bfloat16"] == plain["bfloat16"]


def test_a_mean_is_not_what_the_optimiser_updates(compiled):
  """Twelve bytes a number, not Adam's."""
  program, seconds = compiled(1, 1), []
  state = program.setup.state_shapes
  for average in ({}, {"mean": state["params"]}):
    setup = dataclasses.replace(
      program.setup, state_shapes={**state, "average": average}
    )
    changed = types.SimpleNamespace(**{**vars(program), "setup": setup})
    found = plan.assemble(changed, [], "h100", None, clips=1_000)
    seconds.append(found.other_s)
  count = parameters(program.setup) // 4
  speed = 0.9 * device_rates.DEVICES["h100"].bandwidth
  assert seconds[0] == pytest.approx(30 * count / speed)
  assert seconds[1] - seconds[0] == pytest.approx(12 * count / speed)


@pytest.mark.parametrize(
  "row, config, argument",
  [
    ("one_frame", "cavmae_audioset", ""),
    ("sixteen_frames", "avmae_vgg", "size=B"),
    ("features", "uavm_vgg", ""),
  ],
)
def test_clips_a_core_are_those_measured(row, config, argument):
  rows = json.loads((runs.ROOT / "docs" / "speed.json").read_text())
  (measured,) = [
    one
    for one in rows["rows"]
    if one["kind"] == "pipeline" and one["name"] == row
  ]
  found = plan.clips_per_core(bench_configs.load(config, argument))
  assert found == pytest.approx(measured["clips_per_s"], rel=0.01)


def test_half_precision_has_the_memory_of_float32():
  words = "temporary memory is that of float32, an upper bound"
  assert words in plan_report.report(a_plan())
  assert words not in plan_report.report(a_plan(dtype="float32"))
  assert words not in plan_report.report(a_plan(measured=True))


def test_devices_are_named_by_the_help():
  values = flags.FlagValues()
  plan.define_flags(values)
  for name in device_rates.NAMES:
    assert name in values["device"].help


LOOP = """HloModule step, num_partitions=4
%fused (p.1: f32[8,4], p.2: f32[4,2]) -> f32[8,2] {
  %p.1 = f32[8,4]{1,0} parameter(0)
  %p.2 = f32[4,2]{0,1} parameter(1)
  ROOT %dot.1 = f32[8,2]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (b: (f32[8,4], f32[4,2])) -> (f32[8,4], f32[4,2]) {
  %b = (f32[8,4]{1,0}, f32[4,2]{0,1}) parameter(0)
  %b.0 = f32[8,4]{1,0} get-tuple-element(%b), index=0
  %b.1 = f32[4,2]{0,1} get-tuple-element(%b), index=1
  %f = f32[8,2]{1,0} fusion(%b.0, %b.1), kind=kLoop, calls=%fused
  %r = f32[8,2]{1,0} all-reduce(%f), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %t = (f32[8,4]{1,0}, f32[4,2]{0,1}) tuple(%b.0, %b.1)
}
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
ENTRY %main (a: (f32[8,4], f32[4,2])) -> (f32[8,4], f32[4,2]) {
  %a = (f32[8,4]{1,0}, f32[4,2]{0,1}) parameter(0)
  ROOT %w = (f32[8,4]{1,0}, f32[4,2]{0,1}) while(%a), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_loops_layouts_and_groups():
  found = {kernel.kind: kernel for kernel in step_cost.kernels(LOOP)}
  one, two = found["product"], found["collective"]
  assert (one.kind, one.times) == ("product", 3)
  (product,) = one.products
  # The right one lies transposed in memory.
  assert product.right == (2, 4) and product.dimensions[0] == ((1,), (1,))
  assert product.sizes == (1, 8, 4, 2) and product.flops == 128
  assert one.bytes == 4 * (32 + 8 + 16)
  assert (two.kind, two.times) == ("collective", 3)
  (sent,) = step_cost.transfers(LOOP, {"data": 2, "fsdp": 2})
  assert (sent.axes, sent.devices) == ("data", (0, 2))
  assert sent.sent_bytes == 3 * 64


@pytest.mark.parametrize("groups", [1, 8])
def test_convolutions_are_those_of_the_program(groups):
  """Read from the program of one, and of its gradients, and made again."""

  def f(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (2, 1), ((1, 2), (3, 3)), feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  shapes = ((2, 9, 12, 8), (3, 7, 8 // groups, 16))
  x, w = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
  kernels = step_cost.kernels(jax.jit(f).lower(x, w).compile())
  (found,) = [one for kernel in kernels for one in kernel.convolutions]
  assert found.result == jax.eval_shape(f, x, w).shape
  assert sum(k.flops for k in kernels) == flops.count(f, x, w)
  loss = jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))
  kernels = step_cost.kernels(jax.jit(loss).lower(x, w).compile())
  found = [one for kernel in kernels for one in kernel.convolutions]
  assert len(found) == 3
  for one in found:
    again = device_rates.function(one)
    made = jax.eval_shape(again, *(
      jax.ShapeDtypeStruct(shape, one.dtype) for shape in (one.left, one.right)
    ))  # fmt: skip
    assert made.shape == one.result


def test_a_loop_does_each_of_its_products():
  """None is computed once for all turns."""
  sides = ((64, 4096), (4096, 16), (((1,), (0,)), ((), ())))
  run = device_rates.product_loop(step_cost.Product("float32", *sides))
  seconds = {count: [] for count in (1, 2_000)}
  for _ in range(5):
    for count, found in seconds.items():
      began = time.process_time()
      run(count)
      found.append(time.process_time() - began)
  assert min(seconds[2_000]) > 100 * min(seconds[1])


def test_flags_that_do_not_go_together():
  values = types.SimpleNamespace(
    device="h100", devices=1, check=True, clips=0, steps_per_epoch=0
  )
  with pytest.raises(InputError, match="--device=h100 --devices=1"):
    plan.check_flags(values)


# ml_collections reads config files in a way that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(runs.ROOT)
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # and back
  values = flags.FlagValues()
  plan.define_flags(values)
  words = [
    "plan", "--config=configs/cavmae_audioset.py:demo", "--devices=8",
    "--device=v100", "--clips=960", f"--json={tmp_path / 'plan.json'}",
    *(f"--config.model.{k}={v}" for k, v in runs.MODEL.items()),
    "--config.batch_size=8",
  ]  # fmt: skip
  monkeypatch.setattr(sys, "argv", words)  # where overrides are read from
  argv = values(words)
  monkeypatch.setattr(flags, "FLAGS", values)
  plan.main(argv)
  text = capsys.readouterr().out
  assert text.startswith("cavmae on 8 x v100 (data 8 x fsdp 1 x tensor 1)")
  record = json.loads((tmp_path / "plan.json").read_text())
  assert record["total_steps"] == 25 * 960 // 8
  assert record["days"] * plan_report.DAY == pytest.approx(
    record["total_steps"] * record["step_s"]
  )


def test_the_prediction_beside_the_step(tmp_path):
  """In a process of its own: one pinned core, one device, fast machine code."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = subprocess.run(
    [
      sys.executable, "-m", "avjax.plan", "--device=cpu", "--check", "--pin",
      "--config=configs/cavmae_audioset.py:demo", "--batch_size=8",
      "--clips=960", "--repeats=3", f"--json={tmp_path / 'plan.json'}",
    ],
    env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2_000:]
  assert "check: predicted" in done.stdout
  record = json.loads((tmp_path / "plan.json").read_text())
  found = record["check"]
  ratio = found["predicted_s"] / found["measured_s"]
  assert 1 / FACTOR < ratio < FACTOR
  assert record["measured"] and record["limit"]


def test_devices_that_jax_does_not_have(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # and back
  assert jax.device_count() == 8
  with pytest.raises(InputError, match="--devices=9999"):
    plan.simulate(9_999, quick=True)
