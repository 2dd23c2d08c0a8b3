"""How fast devices are: data sheets with a model of how much of them is had, or
this machine's core, measured now.

A data sheet's device: `Published` has its figures, `published_seconds` is the
model. The shares of the figures that a step reaches (SHARES to ADAM_BYTES) come
from the sizes of ViTs and one measurement of large products and copies on an
H100; nobody has measured the steps that are predicted.

A CPU: `Meter` times the products and convolutions that a program does, each
with its own shapes, and one kernel each for memory, arithmetic, exponentials
and layout. The sum over a program's kernels is the prediction.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from avjax.errors import lookup
from avjax.step_cost import Convolution, Kernel, Product

GB = 1e9
# Of memory: the rest is the runtime's and what lies between arrays.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Published:
  """A device by its maker's data sheet.

  Attributes:
    peak: dense FLOP/s by the dtype of the computation as JAX does it: float32
      is TF32 on an A100 and later, bfloat16 passes on a TPU.
    memory: bytes.
    bandwidth: bytes/s of it.
    link: bytes/s out of a device to those beside it.
    beside: devices that such links join.
    network: bytes/s out of a device's share of its host's network.
    cores: of the host, for each device; typical machines.
  """

  peak: Mapping[str, float]
  memory: float
  bandwidth: float
  link: float
  beside: int
  network: float
  cores: float


def _gpu(half: float, single: float, *rest: float) -> Published:
  return Published({"bfloat16": half, "float32": single}, *rest)


def _tpu(half: float, *rest: float) -> Published:
  return Published({"bfloat16": half, "float32": half}, *rest)


# Columns: peak in bfloat16 (and float32), memory, its bandwidth, link one way,
# devices joined, network one way, host cores. V100 has no bfloat16 products.
DEVICES: dict[str, Published] = {
  "h100": _gpu(989e12, 495e12, 80e9, 3.35e12, 450e9, 8, 50e9, 13),
  "h200": _gpu(989e12, 495e12, 141e9, 4.8e12, 450e9, 8, 50e9, 13),
  "a100": _gpu(312e12, 156e12, 80e9, 2.04e12, 300e9, 8, 25e9, 12),
  "a100-40gb": _gpu(312e12, 156e12, 40e9, 1.56e12, 300e9, 8, 25e9, 12),
  "v100": _gpu(15.7e12, 15.7e12, 32e9, 0.9e12, 150e9, 8, 12.5e9, 6),
  "a5000": _gpu(111e12, 55.5e12, 24e9, 0.768e12, 25e9, 4, 12.5e9, 8),
  "tpu-v4": _tpu(275e12, 32e9, 1.228e12, 150e9, 4_096, 25e9, 60),
  "tpu-v5e": _tpu(197e12, 16e9, 0.819e12, 100e9, 256, 25e9, 28),
  "tpu-v5p": _tpu(459e12, 95e9, 2.765e12, 300e9, 8_960, 25e9, 52),
  "tpu-v6e": _tpu(918e12, 32e9, 1.64e12, 224e9, 256, 25e9, 22),
}
NAMES = (*DEVICES, "cpu")

# Shares of the peak that products reach, by the least of rows, inner and
# columns: 650, 680 and 700 of 989 TFLOP/s at the widths of ViT-B, -L and -H.
WIDTHS = (64, 256, 512, 768, 1_024, 1_280)
SHARES = (0.2, 0.45, 0.62, 0.657, 0.688, 0.708)
# Attention of heads of 32 to 128: 200 to 300 of 989, softmax included.
HEAD_SHARE = 0.25
HEAD_WIDTH = 128
# Copies on an H100: 3.0 of 3.35 TB/s. Collectives: as NCCL's own tests say.
BANDWIDTH_SHARE = 0.9
LINK_SHARE = 0.8
# Other kernels (norms, GELU, biases, residuals; forward and backward) move 45
# values a token and layer for each 16 that its products give, which is without
# kernels that join them. Adam reads four and writes three values of 4 bytes; a
# running mean is two read and one written.
VALUES_PER_RESULT = 45 / 16
ADAM_BYTES = 30
MEAN_BYTES = 12


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Of one step on one device, by what takes them.

  Attributes:
    products: matrix products and convolutions.
    other: kernels that move memory.
    network: what devices send each other, as if nothing else ran meanwhile.
  """

  products: float
  other: float
  network: float = 0.0

  @property
  def total(self) -> float:
    """One after the other."""
    return self.products + self.other + self.network


def find(name: str) -> Published | None:
  """A device of DEVICES; None for 'cpu', which is measured.

  Raises:
    InputError: unknown, the nearest is named.
  """
  return lookup({**DEVICES, "cpu": None}, name, "device")


def published_seconds(
  device: Published,
  kernels: Iterable[Kernel],
  *,
  dtype: str,
  parameters: int,
  gradients: frozenset[tuple[int, ...]],
  averaged: int = 0,
) -> Seconds:
  """A model of one step's time; without the network.

  Args:
    device: of DEVICES.
    kernels: of the program of one device.
    dtype: of the computation.
    parameters: numbers that the device's optimiser updates.
    gradients: shapes of parameters: products with such a result are not
      followed by other kernels.
    averaged: numbers of the device's running mean.
  """
  peak = device.peak[dtype]
  products, results = 0.0, 0.0
  for kernel in kernels:
    for one in kernel.convolutions:
      products += kernel.times * one.flops / (peak * SHARES[0])
    for product in kernel.products:
      products += kernel.times * product.flops / (peak * share(product))
      many, rows, _, columns = product.sizes
      if many == 1 and not {(rows, columns), (columns, rows)} & gradients:
        results += kernel.times * rows * columns
  width = 2 if dtype == "bfloat16" else 4
  moved = VALUES_PER_RESULT * width * results
  moved += ADAM_BYTES * parameters + MEAN_BYTES * averaged
  return Seconds(products, moved / (BANDWIDTH_SHARE * device.bandwidth))


def share(product: Product) -> float:
  """Of the peak that a product reaches on a device of DEVICES."""
  many, rows, inner, columns = product.sizes
  least = min(rows, inner, columns)
  if many > 1 and least <= HEAD_WIDTH:
    return HEAD_SHARE
  return float(np.interp(least, WIDTHS, SHARES))


def link_rate(device: Published, devices: Iterable[int]) -> float:
  """Bytes/s out of each device of a group.

  Args:
    device: of DEVICES.
    devices: positions in the mesh; those beside each other come first.

  A group that leaves its host uses as many of the host's network cards as it
  has devices there.
  """
  hosts = [position // device.beside for position in devices]
  if len(set(hosts)) <= 1:
    return LINK_SHARE * device.link
  here = hosts.count(hosts[0])
  return LINK_SHARE * min(device.link, here * device.network)


def slowest_rate(device: Published, groups: Iterable[Iterable[int]]) -> float:
  """Bytes/s out of each device of the group, or pair, with the least.

  Args:
    device: of DEVICES.
    groups: see `link_rate`; not empty.
  """
  return min(link_rate(device, group) for group in groups)


# --------------------------------------------------------------- this machine

# Bytes that a kernel touches -> its kind of bandwidth: in the cache or beyond.
SIZES = (1 << 20, 1 << 23, 1 << 26)
# Arrays of the probe that measures what starting a kernel costs.
SMALL = 128
# A measurement lasts at least this long.
LEAST_SECONDS = 3e-3


@dataclasses.dataclass
class Measured:
  """Rates of one core; seconds are CPU seconds, the least of all rounds.

  Attributes:
    products: seconds of each product and convolution.
    plain: bytes/s of sums of arrays, by SIZES.
    moving: bytes/s where the layout changes.
    operations: of single numbers a second, in the cache.
    transcendentals: exponentials a second.
    fresh: seconds a byte that memory from the system costs beyond its use;
      none where the process keeps what it frees.
    kernel: seconds to start one.
  """

  products: dict[Product | Convolution, float]
  plain: list[float]
  moving: float
  operations: float
  transcendentals: float
  fresh: float
  kernel: float

  def seconds(self, kernels: Iterable[Kernel], fresh: float) -> Seconds:
    """Of a program.

    Args:
      kernels: of the program.
      fresh: bytes that it takes from the system in each step.
    """
    products, other = 0.0, fresh * self.fresh
    for kernel in kernels:
      parts = (*kernel.products, *kernel.convolutions)
      products += kernel.times * sum(self.products[part] for part in parts)
      other += kernel.times * self._other(kernel)
    return Seconds(products, other)

  def _other(self, kernel: Kernel) -> float:
    """Of all but the products."""
    arithmetic = kernel.operations / self.operations
    arithmetic += kernel.transcendentals / self.transcendentals
    if kernel.products or kernel.convolutions:
      return self.kernel + arithmetic
    rate = float(
      np.interp(math.log(kernel.bytes + 1), np.log(SIZES), self.plain)
    )
    if kernel.kind in ("moving", "scatter", "sort"):
      rate = min(rate, self.moving)
    return self.kernel + max(kernel.bytes / rate, arithmetic)


class Meter:
  """Measures a core for a program; `round` may be called again and again.

  Args:
    kernels: of the program whose products are measured.
    clock: in seconds.
  """

  def __init__(
    self,
    kernels: Iterable[Kernel],
    clock: Callable[[], float] = time.process_time,
  ):
    self._clock, self._kernels = clock, list(kernels)
    wanted = {
      part: None
      for kernel in self._kernels
      for part in (*kernel.products, *kernel.convolutions)
    }
    self._products = {part: product_loop(part) for part in wanted}
    self._probes = _probes()
    self._turns: dict[Any, int] = {}
    self._rounds: list[Measured] = []

  def round(self) -> None:
    """Measures all once more."""
    products = {p: self._time(p, run) for p, run in self._products.items()}
    rates = {
      name: work / self._time(name, run)
      for name, (work, run) in self._probes.items()
    }
    self._rounds.append(
      Measured(
        products,
        [rates[f"plain {size}"] for size in SIZES],
        rates["moving"],
        rates["operations"],
        rates["transcendentals"],
        max(0.0, 1 / rates["fresh"] - 1 / rates["filled"]),
        1 / rates["kernel"],
      )
    )

  def least(self, fresh: float) -> Seconds:
    """Of the program, by the round with the least.

    Not by the least of each rate: no step is as lucky in all that it does.

    Args:
      fresh: bytes that the program takes from the system in each step.
    """
    found = [one.seconds(self._kernels, fresh) for one in self._rounds]
    return min(found, key=lambda seconds: seconds.total)

  def _time(self, name: Any, run: Callable[[int], Any]) -> float:
    """Seconds of one turn; the first time finds out how many to run."""
    if name not in self._turns:
      run(1)
      began = self._clock()
      run(1)
      once = max(self._clock() - began, 1e-7)
      self._turns[name] = max(1, math.ceil(LEAST_SECONDS / once))
    turns = self._turns[name]
    began = self._clock()
    run(turns)
    return (self._clock() - began) / turns


def _looped(
  body: Callable[..., Any], carry: Any, *values: Any
) -> Callable[[int], Any]:
  """A function of the number of turns: `carry = body(carry, *values)`.

  All turns are one program and the carry, which must be nobody else's, stays
  where it lies, so nothing but the body takes time. What does not depend on the
  carry the compiler takes out of the loop.
  """
  import jax

  def turns(count: Any, carry: Any, *values: Any) -> Any:
    return jax.lax.fori_loop(0, count, lambda _, x: body(x, *values), carry)

  run, held = jax.jit(turns, donate_argnums=1), [carry]

  def go(count: int) -> None:
    held[0] = jax.block_until_ready(run(count, held[0], *values))

  return go


def function(product: Product | Convolution) -> Callable[..., Any]:
  """A function (left, right) that does it."""
  import jax

  def body(left: Any, right: Any) -> Any:
    if isinstance(product, Product):
      return jax.lax.dot_general(left, right, product.dimensions)
    return jax.lax.conv_general_dilated(
      left,
      right,
      product.strides,
      product.padding,
      *product.dilations,
      jax.lax.ConvDimensionNumbers(*product.axes),
      *product.groups,
    )

  return body


def product_loop(product: Product | Convolution) -> Callable[[int], Any]:
  """A function of the number of times to do it, one after the other.

  One number of each result replaces one of the next left side; without that
  the compiler would compute the product once.
  """
  import jax
  import jax.numpy as jnp

  once = function(product)

  def body(carry: Any, right: Any) -> Any:
    left, result = carry
    first = jax.lax.slice(result, (0,) * result.ndim, (1,) * result.ndim)
    first = first.reshape((1,) * left.ndim)
    left = jax.lax.dynamic_update_slice(left, first, (0,) * left.ndim)
    return left, once(left, right)

  # Not zeros: products of nothing might be cheap.
  left = jnp.full(product.left, 0.5, product.dtype)
  right = jnp.full(product.right, 0.5, product.dtype)
  shape = jax.eval_shape(once, left, right)
  return _looped(body, (left, jnp.zeros(shape.shape, shape.dtype)), right)


def _probes() -> dict[str, tuple[float, Callable[[int], Any]]]:
  """Name -> work of one turn, and the function of the number of turns."""
  import jax.numpy as jnp

  found: dict[str, tuple[float, Callable[[int], Any]]] = {}
  for size in SIZES:
    numbers = size // 12
    values = jnp.ones(numbers), jnp.ones(numbers)
    found[f"plain {size}"] = size, _looped(lambda s, a: s * 0.5 + a, *values)
  shape = (512, 12, 64, 4)
  found["moving"] = (
    8.0 * math.prod(shape),
    _looped(lambda s: jnp.flip(s, 3).transpose(2, 1, 0, 3).reshape(shape),
            jnp.ones(shape)),
  )  # fmt: skip
  small = 1 << 14

  def polynomial(s: Any, a: Any) -> Any:
    for _ in range(16):
      s = s * a + 0.25
    return s

  values = jnp.full(small, 0.5), jnp.full(small, 0.5)
  found["operations"] = 32.0 * small, _looped(polynomial, *values)
  found["transcendentals"] = (
    float(small), _looped(lambda s: jnp.exp(s * -0.5), jnp.full(small, 0.5)),
  )  # fmt: skip
  found["kernel"] = float(SMALL), _small_kernels()
  size = 1 << 27
  found["fresh"] = (
    float(size),
    lambda n: [np.empty(size, np.uint8).fill(1) for _ in range(n)],
  )
  held = np.empty(size, np.uint8)
  found["filled"] = float(size), lambda n: [held.fill(1) for _ in range(n)]
  return found


def _small_kernels() -> Callable[[int], Any]:
  """Kernels with next to no work, an array each, as biases are updated."""
  import jax
  import jax.numpy as jnp

  update = jax.jit(lambda xs: [x * 0.5 for x in xs], donate_argnums=0)
  holder = [jnp.ones(500 + number) for number in range(SMALL)]

  def run(count: int) -> None:
    for _ in range(count):
      holder[:] = update(list(holder))
    jax.block_until_ready(holder)

  return run
