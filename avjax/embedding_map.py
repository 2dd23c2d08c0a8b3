"""Sounds and pictures on one map: t-SNE of both (AVSiam, figure 4).

Every clip is two points of its class's colour, its sound and its picture, as
the model embeds them. A map shows what lies together, not how far apart the
rest is; `same_class` measures in the embeddings themselves.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from avjax import plots

SEED = 0
POINTS = 1_000  # clips at most
PERPLEXITY = 30.0
BLOCK = 1_024  # queries at a time

Labels = Sequence[Int[np.ndarray, "_"]]  # of each clip, the main one first


def choose(
  labels: Labels, classes: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
  """Clips whose main class is among the `classes` most frequent ones.

  Of more than `POINTS` clips as many are drawn, the same at every call.

  Returns:
    Their numbers, ascending, and their main classes.
  """
  main = np.array([row[0] if len(row) else -1 for row in labels], np.int64)
  found, counts = np.unique(main[main >= 0], return_counts=True)
  common = found[np.argsort(-counts, kind="stable")[:classes]]
  clips = np.flatnonzero(np.isin(main, common))
  if len(clips) > POINTS:
    drawn = np.random.default_rng(SEED).choice(clips, POINTS, replace=False)
    clips = np.sort(drawn)
  return clips, main[clips]


def same_class(
  queries: Float[np.ndarray, "n d"],
  gallery: Float[np.ndarray, "n d"],
  labels: Labels,
) -> float:
  """How often the item nearest to a query shares a class with it.

  Item i is query i's own clip, which counts. Clips without a class neither ask
  nor answer; not a number where none has one.

  Args:
    queries: embeddings of length 1.
    gallery: embeddings of length 1.
    labels: classes of each clip.
  """
  kept = np.array([i for i, row in enumerate(labels) if len(row)], np.int64)
  sets = [frozenset(labels[i].tolist()) for i in kept]
  queries, gallery = queries[kept], gallery[kept]
  hits = []
  for at in range(0, len(kept), BLOCK):
    nearest = (queries[at : at + BLOCK] @ gallery.T).argmax(axis=1)
    hits += [bool(sets[at + i] & sets[j]) for i, j in enumerate(nearest)]
  return float(np.mean(hits)) if hits else float("nan")


def tsne(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
  """Places on a map, by cosine distance; the same at every call.

  At least four points.
  """
  from sklearn.manifold import TSNE
  from threadpoolctl import threadpool_limits

  model = TSNE(
    metric="cosine",
    init="random",
    perplexity=min(PERPLEXITY, (len(points) - 1) / 3),
    random_state=SEED,
  )
  # So few points are done in a second by one thread; more would wait for each
  # other a thousand times, for long on a busy machine.
  with threadpool_limits(limits=1):
    return model.fit_transform(points.astype(np.float32))


def draw(
  models: Mapping[
    str, tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]
  ],
  labels: Int[np.ndarray, "n"],
  names: Sequence[str],
  *,
  title: str = "",
) -> plots.Picture:
  """A map for each model.

  Args:
    models: heading -> embeddings of the sounds and of the pictures.
    labels: class of each clip.
    names: of all classes.
    title: above all.
  """
  shown, colour = np.unique(labels, return_inverse=True)
  panels = {}
  for heading, (audio, video) in models.items():
    places = tsne(np.concatenate([audio, video]))
    panels[heading] = {
      "sound": places[: len(audio)],
      "picture": places[len(audio) :],
    }
  return plots.scatter_panels(
    panels, colour, [str(names[i]) for i in shown], title=title
  )
