"""What is measured follows the batch that is asked for."""

import contextlib
import json

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from avjax import (
  bench_configs,
  benchmark,
  device_rates,
  experiment,
  throughput,
)
from avjax.data import object_scores, text
from avjax.errors import InputError
from configs import cavmae_audioset
from data_prep import synthetic
from tests import runs


@pytest.mark.parametrize("asked, group", [(0, 27), (54, 27), (4, 0), (30, 0)])
def test_groups_that_do_not_divide_the_batch(asked, group, capsys):
  config = runs.plain(cavmae_audioset.get_config())
  found = bench_configs.with_groups(config, asked)
  assert found.model.group_size == group
  said = capsys.readouterr().out
  assert ("model.group_size=27" in said) == (group == 0)
  assert said.count("\n") == (group == 0)
  assert config.model.group_size == 27


def test_a_small_batch_of_a_config_with_groups_is_measured(
  demo_data, monkeypatch
):
  """The step is traced, not compiled: what a group does not fit stops there."""

  def trace(setup, repeats):
    jax.eval_shape(
      lambda s, b: experiment.train_step(setup, s, b),
      setup.state_shapes,
      setup.batch_shapes,
    )
    return [benchmark.Row("step", float(repeats))], None

  monkeypatch.setattr(benchmark, "bench_step", trace)
  monkeypatch.setattr(
    benchmark, "bench_together", lambda *_: benchmark.Row("both", 1.0)
  )
  config = runs.stage(
    "cavmae_audioset", data__dir=demo_data, model__group_size=27
  )
  rows = benchmark.benchmark(runs.plain(config), batch_size=4, repeats=1)
  assert all(row.clips_per_s > 0 for row in rows)


def test_noise_stands_in_for_object_scores(tmp_path):
  found = object_scores.read(synthetic.scores(tmp_path, clips=3))
  assert set(found) == {"audio", "video"}
  for scores in found.values():
    assert scores.values.shape == (3, 601) and scores.done().all()
    assert scores.clips[2] == synthetic.clip_id(2)


def test_made_up_pieces_stand_in_for_a_vocabulary(tmp_path):
  tokens = text.Tokenizer(str(synthetic.vocabulary(tmp_path, 1_000)))
  assert tokens.size == 1_000
  assert tokens.unk not in tokens.ids("a camera moves over noise, clip 1", 32)


def parse(*words):
  """Flags of the command, and the words that are none."""
  values = flags.FlagValues()
  benchmark.define_flags(values)
  return values, values(["benchmark", *words])


# ml_collections reads config files in a way that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
  "words, error",
  [
    ((), "what to measure"),
    (("--compare",), "needs names"),
    (("--compare", "avmae", "--stage=pretrain"), "--stage goes with --config"),
    (
      ("--config=configs/cavmae_audioset.py", "--compare", "avmae"),
      "give one of the two",
    ),
    (
      ("--config=configs/cavmae_audioset.py", "--demo"),
      "--demo goes with --compare",
    ),
  ],
)
def test_flags_that_do_not_go_together(words, error, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  values, argv = parse(*words)
  with pytest.raises(InputError, match=error):
    benchmark.check_flags(values, argv[1:])


def test_an_unknown_system_is_refused_with_the_nearest():
  with pytest.raises(InputError, match="'avsaim'. Did you mean 'avsiam'"):
    throughput.config_of("avsaim", contextlib.ExitStack())


@pytest.mark.parametrize("name", throughput.SYSTEMS)
def test_systems_are_base_models(name):
  """Of paper size in bfloat16, and one for all of the demo's batch size."""
  with contextlib.ExitStack() as stack:
    config = throughput.config_of(name, stack, dtype="bfloat16")
    assert (config.model.size, config.dtype) == ("B", "bfloat16")
    assert not config.model.scan
    demo = throughput.config_of(name, stack, demo=True)
    assert demo.data.name == "av_demo" and demo.model.width < 768


def test_systems_side_by_side(tmp_path, monkeypatch, capsys):
  """The command on tiny systems, no data set being built."""

  def config_of(name, stack, *, dtype, demo):
    assert (dtype, demo) == ("float32", True)
    return runs.plain(runs.stage(throughput.SYSTEMS[name][0]))

  monkeypatch.setattr(throughput, "config_of", config_of)
  values, argv = parse(
    "--compare", "cavmae", "avsiam", "--demo", "--batch_size=8", "--repeats=1",
    f"--json={tmp_path / 'rows.json'}",
  )  # fmt: skip
  monkeypatch.setattr(flags, "FLAGS", values)
  benchmark.main(argv)
  record = json.loads((tmp_path / "rows.json").read_text())
  title, _, head, _, *lines = capsys.readouterr().out.splitlines()
  assert title == record["title"]
  for words in ("float32", "batch 8", "least of 1", "demo models"):
    assert words in title
  first, second = record["rows"]
  assert [r["system"] for r in record["rows"]] == ["cavmae", "avsiam"]
  assert len(lines) == 2 and all(x.count("|") == head.count("|") for x in lines)
  assert lines[0].startswith("| cavmae | 1, 3 | ")
  assert first["ratio"] == 1
  assert second["ratio"] == pytest.approx(
    second["clips_per_s"] / first["clips_per_s"]
  )
  for found in record["rows"]:
    assert min(v for k, v in found.items() if k != "system") > 0
    # Parameters and two moments of float32 at least.
    assert found["held_bytes"] > 12 * found["parameters"]
    assert found["flops_per_s"] == pytest.approx(
      found["flops_per_clip"] * found["clips_per_s"]
    )


def test_frozen_parameters_are_not_counted():
  config = runs.plain(runs.stage("cavmae_audioset"))
  setup = experiment.build(config, batch_size=8, steps_per_epoch=1)
  every = sum(x.size for x in jax.tree.leaves(setup.state_shapes["params"]))
  moved = sum(
    x.size for x in jax.tree.leaves(setup.state_shapes["opt_state"]["mu"])
  )
  assert 0 < throughput.trained(setup) == moved < every


def test_a_step_that_draws_what_it_computes_is_timed_at_its_dearest():
  step, done = object.__new__(benchmark.Step), []

  def compiled(state, batch):
    done.append(int(state["step"]))
    return {"step": state["step"] + 1}, ()

  step.compiled, step.state, step._batch = compiled, {"step": jnp.int32(0)}, {}
  # The first step is dear, too, being the first.
  step._number = step._dearest(lambda: 10 * done.count(5) + len(done[:1]) * 99)
  assert step._number == 5
  step()
  step()
  assert done[-2:] == [5, 5]


def test_the_dearest_step_is_no_cold_one():
  """The first of each kind takes longer, whatever it computes."""
  step, done = object.__new__(benchmark.Step), []

  def compiled(state, batch):
    done.append(int(state["step"]))
    return state, ()

  def now():
    dear, cold = done.count(5), len(set(done) & {5, 9})
    return 10 * dear + 50 * cold + 30 * (9 in done)

  step.compiled, step.state, step._batch = compiled, {"step": jnp.int32(0)}, {}
  assert step._dearest(now) == 5


@pytest.mark.parametrize(
  "device, shapes, count", [("cpu", 3, 2e10), ("gpu", 4, 2e13)]
)
def test_products_of_the_peak_fill_the_device(
  monkeypatch, device, shapes, count
):
  """One call of them takes far longer than a call takes to begin."""

  def product_loop(product):
    return lambda times: times * product.flops

  monkeypatch.setattr(device_rates, "product_loop", product_loop)
  found = benchmark.peak_functions("bfloat16", device)
  assert len(found) == shapes
  for flops, loop in found:
    assert flops == loop() == pytest.approx(count, rel=0.2)


# ml_collections reads config files in a way that Python will drop.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
  "words", [("--compare", "avmae"), ("--config=configs/uavm_vgg.py",)]
)
def test_no_pinned_core_feeds_a_gpu(words, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  monkeypatch.setattr(benchmark, "pin", lambda: None)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(throughput, "command", None)
  monkeypatch.setattr(benchmark, "benchmark", None)
  values, argv = parse(*words, "--pin")
  monkeypatch.setattr(flags, "FLAGS", values)
  with pytest.raises(InputError, match="have to feed the gpu"):
    benchmark.main(argv)


def test_systems_side_by_side_on_a_gpu_are_in_bfloat16(monkeypatch):
  asked = []

  def config_of(name, stack, *, dtype, demo):
    asked.append(dtype)

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(throughput, "config_of", config_of)
  monkeypatch.setattr(throughput, "compare", lambda *_: ([], 1.0))
  for words, dtype in ((), "bfloat16"), (("--dtype=float32",), "float32"):
    values, argv = parse("--compare", "avmae", *words)
    title, _, _ = throughput.command(values, argv[1:])
    assert asked[-1] == dtype and f"{dtype}, batch 12" in title
