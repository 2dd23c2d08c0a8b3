"""What a masked autoencoder makes of masked clips: pictures and errors.

`Method.reconstruct(params, inputs, rng)` returns a dict with `<m>/input` for
m in audio and video, and for each view (`joint`: both modalities masked;
`inpaint`: one removed and rebuilt from the other) `<view>/<m>/output` of the
input's shape and `<view>/<m>/mask`, true where the model had to guess.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax import metrics, parallel, plots
from avjax.errors import InputError
from avjax.evaluators.base import Context, Evaluator
from avjax.evaluators.classification import fold_views
from avjax.methods.base import Params
from avjax.nn.cav_encoder import INPUTS

COLUMNS = 8  # frames of a clip shown, at most
VIEWS = {"joint": "joint", "inpaint": "inpainted"}


class Reconstruction(Evaluator):
  """Mean squared errors of a split and pictures of its first clips.

  Options of the section: `pictures`, how many clips are drawn (4).

  Scores: `mse/video` and `mse/audio`, the mean over all removed pixels or cells
  of the clips that have the modality, in the units of the normalised inputs. A
  second view of a modality is `mse/<m>_<view>`. Masks do not differ between
  evaluations: the key is fixed, the examples' numbers vary.
  """

  def __init__(self, context: Context, section: Any):
    super().__init__(context, section)
    if not hasattr(context.method, "reconstruct"):
      name = type(context.method).__name__
      raise InputError(f"method {name} has no reconstruct to evaluate")
    self.count = section.get("pictures", 4)
    self._step = jax.jit(self._batch)

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Writes pictures through the context; returns errors by name.

    A model that removes nothing (a ratio of 0) has no errors.

    Raises:
      InputError: the split holds no valid example.
    """
    means = metrics.Means()
    drawn = 0
    for pairs, clips in self._results(params):
      means.add(pairs)
      for clip in _rows(clips):
        if drawn < self.count and clip.pop("valid"):
          name = f"{self.section.split}_clip_{drawn:02d}"
          self.context.picture(name, self._draw(clip, step), step)
          drawn += 1
    found = means.result()
    if not found.pop("valid", 0.0):
      raise InputError(f"split {self.section.split!r} has no valid example")
    return found

  def _results(self, params: Params) -> Iterator[tuple[Any, Any]]:
    """Errors of every batch; clips until enough of them are there."""
    drawn = 0
    for batch, _ in self.context.batches(self.section):
      pairs, clips = self._step(params, batch)
      pairs = parallel.to_host(pairs)
      clips = parallel.to_host(clips) if drawn < self.count else {}
      drawn += int(np.sum(clips.get("valid", 0)))
      yield pairs, clips

  def _batch(
    self, params: Params, batch: Mapping[str, jax.Array]
  ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """(sum, normaliser) pairs and the first clips of a batch."""
    size = batch["index"].shape[0]
    valid = batch.get("valid", jnp.ones(size, bool))
    flat, views = fold_views(batch)
    valid = jnp.repeat(valid, views)
    inputs = self.context.prepare(flat, jax.random.key(0), False)
    made = self.context.method.reconstruct(params, inputs, jax.random.key(1))
    pairs = {"valid": metrics.pair(jnp.ones(valid.shape), valid)}
    for view, m in _views(made):
      # What is inpainted comes from the other modality.
      needed = INPUTS if view == "inpaint" else (m,)
      shown = valid
      for name in needed:
        shown &= inputs.get(f"has_{name}", True)
      name = f"mse/{m}" if f"mse/{m}" not in pairs else f"mse/{m}_{view}"
      pairs[name] = _error(made, view, m, shown)
    clips = {name: rows[: self.count] for name, rows in made.items()}
    return pairs, {**clips, "valid": valid[: self.count]}

  def _draw(self, clip: Mapping[str, np.ndarray], step: int) -> np.ndarray:
    """One picture of all views and modalities of a clip."""
    data = self.context.config.data
    title = f"{self.section.split}, step {step}: "
    parts = []
    if "video/input" in clip:
      mean, std = np.asarray(data.video.mean), np.asarray(data.video.std)
      shown = _shown(len(clip["video/input"]))
      parts.append(
        plots.image_grid(
          _video_rows(clip, shown, mean, std),
          columns=[f"frame {frame}" for frame in shown],
          title=title + f"frames, {len(clip['video/input'])} in all",
        )
      )
    if "audio/input" in clip:
      frames = clip["audio/input"].shape[0]
      parts.append(
        plots.spectrograms(
          _labelled(clip, "audio"),
          seconds=frames * data.fbank.hop_ms / 1000,
          title=title + "log-mel",
        )
      )
    return plots.stack(parts)


def _views(made: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(view, modality) of every output, joint before the others."""
  found = [
    tuple(name.rsplit("/", 2)[:2]) for name in made if name.endswith("/output")
  ]
  return sorted(found, key=lambda pair: (pair[0] != "joint", *pair))


def _error(
  made: Mapping[str, jax.Array], view: str, m: str, shown: jax.Array
) -> tuple[jax.Array, jax.Array]:
  output = made[f"{view}/{m}/output"].astype(jnp.float32)
  mask = made[f"{view}/{m}/mask"]
  squared = jnp.square(output - made[f"{m}/input"])
  counted = mask & shown.reshape(-1, *[1] * (mask.ndim - 1))
  return metrics.pair(squared, counted)


def _rows(clips: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
  count = len(clips["valid"]) if clips else 0
  for row in range(count):
    yield {name: values[row] for name, values in clips.items()}


def _labelled(clip: Mapping[str, np.ndarray], m: str) -> dict[str, np.ndarray]:
  """Input, then per view what the model saw and what it made of it.

  Removed places are not-a-number. Outputs are shown there only: elsewhere they
  are not trained.
  """
  given = clip[f"{m}/input"]
  rows = {"input": given}
  for view, modality in _views(clip):
    if modality != m:
      continue
    mask = clip[f"{view}/{m}/mask"]
    name = VIEWS.get(view, view)
    rows[f"{name}: masked"] = np.where(mask, np.nan, given)
    rows[f"{name}: output"] = np.where(mask, clip[f"{view}/{m}/output"], given)
  return rows


def _shown(frames: int) -> list[int]:
  """Numbers of the frames in the picture, spread over the clip."""
  places = np.linspace(0, frames - 1, min(frames, COLUMNS))
  return places.round().astype(int).tolist()


def _video_rows(
  clip: Mapping[str, np.ndarray],
  shown: list[int],
  mean: np.ndarray,
  std: np.ndarray,
) -> dict[str, list[np.ndarray]]:
  rows = {}
  for label, values in _labelled(clip, "video").items():
    pixels = (values[shown] * std + mean) * 255
    pixels = np.where(np.isnan(pixels), plots.REMOVED, pixels)
    rows[label] = list(np.clip(pixels.round(), 0, 255).astype(np.uint8))
  return rows
