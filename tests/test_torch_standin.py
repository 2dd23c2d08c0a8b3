"""What speed is compared with does the same work, to the same values."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avjax import flops, methods, optim, speed_ratio, throughput, torch_standin
from avjax.errors import InputError
from avjax.nn import cav_encoder, sizes, transformer

torch = torch_standin.torch
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
KEY, STEP = jax.random.key(0), jnp.int32(0)


@functools.cache
def system(name, batch_size):
  """Config, method, parameters and inputs with all noise of a demo."""
  with contextlib.ExitStack() as stack:
    config = throughput.config_of(name, stack, demo=True)
  method = methods.make(config)
  inputs = speed_ratio.noise(config, batch_size)
  params = speed_ratio.drawn(jax.eval_shape(method.init, KEY, inputs))
  rng = np.random.default_rng(1)
  for m, (rows, columns) in cav_encoder.grids(inputs, config.model).items():
    shape = (batch_size, rows * columns)
    inputs[f"noise/{m}"] = rng.random(shape, np.float32)
    inputs[f"noise_ratio/{m}"] = rng.random(batch_size, np.float32)
  return config, method, params, inputs


def in_torch(config, params, inputs):
  """The module with these parameters, and its inputs."""
  grids = cav_encoder.grids(inputs, config.model)
  module = torch_standin.SYSTEMS[config.method](config.model, grids)
  torch_standin.load(module, params)
  return module, {k: torch.from_numpy(x) for k, x in inputs.items()}


SYSTEMS = pytest.mark.parametrize(
  "name, batch_size", [("cavmae", 4), ("avsiam", 6)]
)


@SYSTEMS
def test_loss_gradient_and_step_are_equal(name, batch_size):
  config, method, params, inputs = system(name, batch_size)
  optimizer = optim.make(
    config.optimizer,
    lambda step: 1e-3,
    params,
    method.param_info,
    method.num_layers,
  )

  @jax.jit
  def step(params, inputs):
    loss, grads = speed_ratio.gradient(config, method, params, inputs, KEY)
    moved, _, norms = optimizer.update(grads, optimizer.init(params), params)
    return loss, norms["grad_norm"], moved

  loss, norm, moved = step(params, inputs)
  module, there = in_torch(config, params, inputs)
  found = torch_standin.step(module, config.optimizer, 1e-3)(there)
  np.testing.assert_allclose(loss, found.item(), **TOLERANCE)
  grads = [p.grad for p in module.parameters() if p.grad is not None]
  total = torch.nn.utils.get_total_norm(grads).item()
  np.testing.assert_allclose(norm, total, **TOLERANCE)
  expected, _ = in_torch(config, moved, inputs)
  both = zip(
    module.state_dict().values(), expected.state_dict().values(), strict=True
  )
  close = [np.isclose(x, y, rtol=1e-4, atol=2e-5).ravel() for x, y in both]
  # Adam's first step is the sign of a gradient, also where that is nothing but
  # rounding (the bias of keys).
  assert np.concatenate(close).mean() > 0.999
  trained = sum(x.size for x in jax.tree.leaves(optimizer.init(params)["mu"]))
  assert torch_standin.trained(module) == trained


@SYSTEMS
def test_as_many_products_are_computed(name, batch_size):
  config, method, params, inputs = system(name, batch_size)
  plain = config.copy_and_resolve_references()
  plain.model.attention = "plain"
  ours = flops.count(
    functools.partial(speed_ratio.gradient, plain, methods.make(plain)),
    params,
    inputs,
    KEY,
  )
  module, there = in_torch(config, params, inputs)
  counter = FlopCounterMode(display=False)
  with counter, sdpa_kernel(SDPBackend.MATH):
    module(there).backward()
  assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


@SYSTEMS
def test_a_step_is_one_graph(name, batch_size, monkeypatch):
  """torch.compile would run what lies between several as it is written."""
  # Without the tests' checks of shapes, which it does not understand.
  spec = importlib.util.spec_from_file_location(
    "standin", torch_standin.__file__
  )
  standin = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, "standin", standin)
  spec.loader.exec_module(standin)
  num_kept = inspect.unwrap(cav_encoder.num_kept)
  monkeypatch.setattr(standin, "num_kept", num_kept)
  config, _, params, inputs = system(name, batch_size)
  grids = cav_encoder.grids(inputs, config.model)
  module = standin.SYSTEMS[name](config.model, grids)
  there = {k: torch.from_numpy(x) for k, x in inputs.items()}
  found = torch._dynamo.explain(module)(there)
  assert found.graph_break_count == 0, found.break_reasons


def test_the_stack_is_equal():
  size = sizes.Size(32, 2, 4, 64)
  module = transformer.Transformer(2, 4, 64, 1e-5, "erf", norm=False)
  x = np.random.default_rng(0).standard_normal((2, 7, 32), np.float32)
  params = module.init(KEY, jnp.asarray(x))["params"]

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=1)
  def ours(params, x):
    return jnp.mean(module.apply({"params": params}, x) ** 2)

  loss, gradient = ours(params, jnp.asarray(x))
  other = torch_standin.Stack(2, size, 1e-5)
  torch_standin.load(other, params)
  tokens = torch.from_numpy(x).requires_grad_()
  found = torch_standin.stack_step(other, tokens)()
  np.testing.assert_allclose(loss, found.item(), **TOLERANCE)
  np.testing.assert_allclose(gradient, tokens.grad.numpy(), **TOLERANCE)


def test_pytorch_is_asked_for_where_it_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  monkeypatch.delitem(sys.modules, "avjax.torch_standin")
  with pytest.raises(InputError, match=r"pip install -e '\.\[torch\]'"):
    importlib.import_module("avjax.torch_standin")


def test_a_batch_without_all_ratios_is_refused():
  with pytest.raises(InputError, match="batch_size=4: avsiam takes 6"):
    speed_ratio.pretraining("avsiam", 4, 0)


def test_a_wrong_system_is_named():
  with pytest.raises(InputError, match="cavmea"):
    speed_ratio.measure("cavmea", 2, 1, 0)
