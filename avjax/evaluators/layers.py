"""What every layer of a model makes of sounds and pictures (UAVM, §III-C to E).

For methods that have `representations` and `attention_maps` (`uavm`). k counts
as there: 0 is what enters the first block, k what block k gives, and `logits`:

| score | |
|---|---|
| `<k>/modality` | accuracy of a regression that tells sound from picture |
| `<k>/a2v_R1`, `R5`, `R10` | recall of a sound's picture, by cosine |
| `<k>/attention` | mean difference between both maps of block k |

`last/…` repeats those of the last block, whatever its number. Clips that lack a
modality are left out. Pictures: the scores by layer (figures 3B, 4, 5), the
sorted coefficients of the last block's regression (3C), t-SNE of every layer
(3D), temporal attention of the last block (5).

As published, the regression (L1 penalty, no standardisation) learns from the
first half of the sounds and of the pictures and is scored on the others, and
recall is that of sounds among pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from avjax import embedding_map, plots, ranking
from avjax.data import records
from avjax.errors import InputError
from avjax.evaluators.base import Context, Evaluator
from avjax.evaluators.embeddings import Embedded, Embedder, class_numbers
from avjax.methods.base import Params

SIDES = {"audio": "sound", "video": "picture"}
LOGITS = "logits"
LAST = "last"
SHOWN = 6  # clips whose attention is drawn


class Layers(Evaluator):
  """Scores by layer; the same at every call.

  Options of the section:
    per_class: the first so many clips of each main class take part in the
      retrieval (published: 5); 0 = all.
    published_maps: attention as the published figures have it, of a block's
      input without its first LayerNorm; False = as the model uses it.
    tsne: so many clips are drawn on maps, evenly spread; 0 = none.
  """

  def __init__(self, context: Context, section: Any):
    super().__init__(context, section)
    method = context.method
    for name in ("representations", "attention_maps"):
      if not hasattr(method, name):
        raise InputError(
          f"evals of type {section.type!r} need a method with {name}, such as "
          f"uavm; it is {context.config.method!r}"
        )
    self.per_class = section.get("per_class", 0)
    self.published = section.get("published_maps", False)
    self.tsne = section.get("tsne", 0)
    self._embedder = Embedder(context, normalise=False, features=self._traced)

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Scores by name; draws pictures through the context.

    Raises:
      InputError: fewer than four clips have both modalities, or a layer's
        values are not finite.
    """
    found = both(self._embedder.split(params, self.section))
    if len(found.number) < 4:
      raise InputError(
        f"split {self.section.split!r} has {len(found.number)} clips with both "
        "modalities; the analysis of layers needs 4"
      )
    names = [
      n.removeprefix("audio/") for n in found.values if n[:6] == "audio/"
    ]
    chosen = self._gallery(found.number)
    scores, sizes = {}, {}
    for k in names:
      sides = [found.values[f"{m}/{k}"] for m in SIDES]
      check(k, *sides)
      accuracy, sizes[k] = tell_apart(*sides)
      ranks = ranking.ranks(*(unit(x[chosen]) for x in sides))
      recalls = ranking.scores(ranks.forward, ranks.forward_tied)
      scores[f"{k}/modality"] = accuracy
      scores |= {f"{k}/a2v_R{n}": recalls[f"R{n}"] for n in ranking.TOPS}
    for name, values in found.values.items():
      if name.startswith("attention/"):
        scores[f"{name.removeprefix('attention/')}/attention"] = float(
          values.mean()
        )
    last = [k for k in names if k != LOGITS][-1]
    scores |= {
      f"{LAST}/{name.split('/')[1]}": value
      for name, value in scores.items()
      if name.split("/")[0] == last
    }
    if jax.process_index() == 0:
      self._draw(found, scores, sizes[last], names, last, step)
    return {**scores, "clips": float(len(found.number))}

  def _gallery(self, number: Int[np.ndarray, "n"]) -> Int[np.ndarray, "_"]:
    """Rows that take part in the retrieval."""
    if not self.per_class:
      return np.arange(len(number))
    data, section = self.context.config.data, self.section
    split = records.Split(data, section.split, section.limit)
    labels = class_numbers(split)
    counts: dict[int, int] = {}
    chosen = []
    for row, clip in enumerate(number):
      main = int(labels[clip][0]) if len(labels[clip]) else -1
      counts[main] = counts.get(main, 0) + 1
      if main >= 0 and counts[main] <= self.per_class:
        chosen.append(row)
    return np.array(chosen, np.int64)

  def _traced(
    self, params: Params, inputs: Mapping[str, jax.Array]
  ) -> dict[str, Float[Array, "b _"]]:
    """'<m>/<k>' of the layers, 'attention/<k>' and 'heat/<m>'."""
    method, found = self.context.method, {}
    layers = method.representations(params, inputs)
    maps = method.attention_maps(params, inputs, published=self.published)
    for m in SIDES:
      names = [str(k) for k in range(method.num_layers + 1)]
      names += [LOGITS] * (len(layers[m]) > len(names))
      found |= {f"{m}/{k}": x for k, x in zip(names, layers[m], strict=True)}
    pairs = zip(maps["audio"], maps["video"], strict=True)
    for k, (a, v) in enumerate(pairs, start=1):
      difference = jnp.abs(a - v).mean(axis=(1, 2, 3))
      found[f"attention/{k}"] = difference[:, None]
    for m in SIDES:
      # The cross-modal model's shared blocks have no map of one modality.
      if maps[m]:
        heat = heat_map(maps[m][-1])
        found[f"heat/{m}"] = heat.reshape(len(heat), -1)
    return found

  def _draw(
    self,
    found: Embedded,
    scores: Mapping[str, float],
    sizes: Float[np.ndarray, "d"],
    names: Sequence[str],
    last: str,
    step: int,
  ) -> None:
    split, title = self.section.split, f"{self.section.split}, step {step}"

    def show(name: str, picture: plots.Picture) -> None:
      self.context.picture(f"{split}_{name}", picture, step)

    def curve(metric: str) -> tuple[list[int], list[float]]:
      there = [(k, scores[f"{k}/{metric}"]) for k in names
               if f"{k}/{metric}" in scores]  # fmt: skip
      # The logits come after the last block.
      places = [int(last) + 1 if k == LOGITS else int(k) for k, _ in there]
      return places, [value for _, value in there]

    axis = "layer (0: projected input; after the last block: logits)"
    for name, metrics, label in (
      ("modality", ("modality",), "accuracy of telling the modality"),
      ("retrieval", ("a2v_R5", "a2v_R10"), "recall of a sound's picture"),
      ("attention", ("attention",), "difference of the attention maps"),
    ):
      series = {metric: curve(metric) for metric in metrics}
      if all(len(x) for x, _ in series.values()):
        show(
          f"layers_{name}",
          plots.line_plot(series, title=title, x_label=axis, y_label=label),
        )
    series = {f"layer {last}": (np.arange(len(sizes)), np.sort(sizes)[::-1])}
    show(
      "modality_coefficients",
      plots.line_plot(
        series,
        title=title,
        x_label="dimension, sorted",
        y_label="|coefficient|",
      ),
    )
    if "heat/audio" in found.values:
      show("attention_heat", draw_heat(found, self.context.method.model.heads))
    if self.tsne:
      show("layers_tsne", draw_maps(found, names, self.tsne, title))


def both(found: Embedded) -> Embedded:
  """The clips that have both modalities."""
  kept = found.has["audio"] & found.has["video"]
  return Embedded(
    {name: x[kept] for name, x in found.values.items()},
    {m: x[kept] for m, x in found.has.items()},
    found.number[kept],
  )


def check(k: str, *sides: Float[np.ndarray, "n d"]) -> None:
  """Raises InputError where a layer's values are not finite."""
  broken = sum(int((~np.isfinite(x)).any(axis=1).sum()) for x in sides)
  if broken:
    raise InputError(
      f"layer {k}: {broken} of {sum(map(len, sides))} representations are not "
      "finite"
    )


def unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Rows of length 1; rows of zeros stay."""
  length = np.linalg.norm(x, axis=1, keepdims=True)
  return x / np.where(length > 0, length, 1)


def tell_apart(
  audio: Float[np.ndarray, "n d"], video: Float[np.ndarray, "n d"]
) -> tuple[float, Float[np.ndarray, "d"]]:
  """Modality classification (§III-C, figure 3).

  Returns:
    Accuracy on the second halves of a regression fitted to the first, and the
    absolute values of its coefficients.
  """
  from sklearn.linear_model import LogisticRegression

  half = len(audio) // 2
  model = LogisticRegression(l1_ratio=1.0, solver="liblinear", random_state=0)
  label = np.repeat([0, 1], half)
  model.fit(np.concatenate([audio[:half], video[:half]]), label)
  rest = np.concatenate([audio[half:], video[half:]])
  truth = np.repeat([0, 1], len(audio) - half)
  accuracy = float((model.predict(rest) == truth).mean())
  return accuracy, np.abs(model.coef_[0])


def heat_map(maps: Float[Array, "b h q k"]) -> Float[Array, "b h k"]:
  """How much each token is looked at: rows by their maximum, summed."""
  return (maps / maps.max(axis=-1, keepdims=True)).sum(axis=2)


def draw_heat(found: Embedded, heads: int) -> plots.Picture:
  """Temporal attention of a few clips: a row of cells for each head."""
  count = min(SHOWN, len(found.number))
  rows = {}
  for m, side in SIDES.items():
    heat = found.values[f"heat/{m}"][:count].reshape(count, heads, -1)
    # Heads as broad as their name, so that they can be seen.
    pictures = [plots.heat(np.repeat(x, 4, axis=0).T) for x in heat]
    rows[f"{side}: {heads} heads"] = pictures
  columns = [f"clip {number}" for number in found.number[:count]]
  title = "attention of the last block; time to the right"
  return plots.image_grid(rows, columns=columns, title=title)


def draw_maps(
  found: Embedded, names: Sequence[str], count: int, title: str
) -> plots.Picture:
  """t-SNE of every layer, coloured by modality (figure 3D)."""
  step = -(-len(found.number) // count)
  panels = {}
  for k in names:
    sides = [found.values[f"{m}/{k}"][::step] for m in SIDES]
    places = embedding_map.tsne(np.concatenate(sides))
    panels[k if k == LOGITS else f"layer {k}"] = {"": places}
  group = np.repeat([0, 1], len(sides[0]))
  return plots.scatter_panels(panels, group, tuple(SIDES.values()), title=title)
