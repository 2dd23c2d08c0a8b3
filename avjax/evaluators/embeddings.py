"""Embeddings of a whole split, for the evaluators that compare clips."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from jaxtyping import Bool, Float, Int

from avjax import parallel
from avjax.data import augment, records
from avjax.errors import InputError, lookup
from avjax.evaluators.base import Context
from avjax.evaluators.classification import fold_views
from avjax.methods.base import Params

SAY_EVERY = 30.0  # seconds

Features = Callable[[Params, Mapping[str, jax.Array]], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Embedded:
  """Valid clips of a split.

  Attributes:
    values: name -> embeddings, float32.
    has: 'audio' and 'video' -> whether the clip has it.
    number: of the clip in the split.
  """

  values: Mapping[str, Float[np.ndarray, "b _"]]
  has: Mapping[str, Bool[np.ndarray, "b"]]
  number: Int[np.ndarray, "b"]


class Embedder:
  """`Method.embed` over splits, one compilation for each batch size.

  Args:
    context: of the evaluator.
    normalise: whether embeddings have length 1: those of the views, and again
      their mean. Without it the mean over the views is taken as it is.
    alone: 'audio' and 'video' and nothing else, each from inputs without the
      other, so that no encoder of both can let one tell of the other.
    features: (params, inputs) -> name -> [b d], instead of `Method.embed`.
  """

  def __init__(
    self,
    context: Context,
    *,
    normalise: bool,
    alone: bool = False,
    features: Features | None = None,
  ):
    self._context, self._normalise, self._alone = context, normalise, alone
    self._make = features or context.method.embed
    self._step = jax.jit(self._embed)

  def split(
    self,
    params: Params,
    section: Any,
    chosen: Bool[np.ndarray, "n"] | None = None,
  ) -> Embedded:
    """Embeds the clips of `section.split`, each as the mean of its views.

    The same in every process. Padding and clips that could not be read are
    left out.

    Args:
      params: of the method.
      section: an entry of `config.evals`.
      chosen: which clips of the split count; None = all. Batches without any
        are not computed.

    Raises:
      InputError: there is no such clip.
    """
    parts = list(self._parts(params, section, chosen))
    joined = {
      name: np.concatenate([part[name] for part in parts])
      for name in (parts[0] if parts else {})
    }
    if not len(joined.get("number", ())):
      raise InputError(f"split {section.split!r} has no example to embed")
    has = {m: joined.pop(f"has/{m}") for m in ("audio", "video")}
    number = joined.pop("number")
    values = {k.removeprefix("value/"): v for k, v in joined.items()}
    return Embedded(values, has, number)

  def _parts(
    self, params: Params, section: Any, chosen: np.ndarray | None
  ) -> Iterator[dict[str, np.ndarray]]:
    """Rows of each batch, fetched while the device works on the next."""
    pending, first = None, 0
    began = said = time.monotonic()
    for batch, _ in self._context.batches(section):
      size = batch["index"].shape[0]
      wanted = chosen is None or chosen[first : first + size].any()
      first += size
      result = self._step(params, batch) if wanted else None
      if pending is not None:
        yield _rows(pending, chosen)
      pending = result
      if time.monotonic() - said > SAY_EVERY:
        said = time.monotonic()
        rate = first / (said - began)
        logging.info(
          "%s: %d clips embedded, %.0f/s", section.split, first, rate
        )
    if pending is not None:
      yield _rows(pending, chosen)

  def _embed(
    self, params: Params, batch: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    ones = jnp.ones(batch["index"].shape[0], bool)
    found = {
      "valid": batch.get("valid", ones),
      "number": batch["index"],
      "has/audio": batch.get("has_audio", ones),
      "has/video": batch.get("has_video", ones),
    }
    flat, views = fold_views(batch)
    inputs = self._context.prepare(flat, jax.random.key(0), False)
    for name, x in self._features(params, inputs).items():
      x = rearrange(x.astype(jnp.float32), "(b v) d -> b v d", v=views)
      x = self._unit(self._unit(x).mean(axis=1))
      found[f"value/{name}"] = x
    return found

  def _features(
    self, params: Params, inputs: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    if not self._alone:
      return self._make(params, inputs)
    found = {}
    for m, other in (("audio", "video"), ("video", "audio")):
      hidden = augment.MIXED[other]
      own = {k: v for k, v in inputs.items() if k not in hidden}
      embedded = self._make(params, own)
      found[m] = lookup(embedded, m, "embedding of the method")
    return found

  def _unit(self, x: jax.Array) -> jax.Array:
    if not self._normalise:
      return x
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    # Not `maximum`, which would make numbers of what are none.
    return x / jnp.where(length == 0, 1.0, length)


def _rows(
  result: Mapping[str, jax.Array], chosen: np.ndarray | None
) -> dict[str, np.ndarray]:
  """Host rows of the clips that count."""
  rows = dict(parallel.to_host(result))
  rows["number"] = rows["number"].astype(np.int64)
  kept = rows.pop("valid")
  if chosen is not None:
    inside = np.minimum(rows["number"], len(chosen) - 1)
    kept = kept & chosen[inside]
  return {name: values[kept] for name, values in rows.items()}


def class_numbers(split: records.Split) -> list[np.ndarray]:
  """The classes of each clip of a split, those without a number left out."""
  return [row[row >= 0] for row in split.labels()]
