"""Linear probe: logistic regression on frozen embeddings.

Trained on one split and scored on another; what the method learns from labels
is what its features hold. Scores by name of `Method.embed`, and `av`, the
concatenation of 'audio' and 'video' where the method gives no 'av':

| labels | score |
|---|---|
| one per clip (the main one) | `audio/top1`, `video/top1`, `av/top1` |
| `data.multilabel` | `audio/mAP`, …: one regression per class |

`left_out` counts the scored clips that lack a modality or a label.
"""

import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from avjax import metrics
from avjax.data import records
from avjax.errors import InputError, lookup
from avjax.evaluators.base import Context, Evaluator
from avjax.evaluators.embeddings import (
  SAY_EVERY,
  Embedded,
  Embedder,
  class_numbers,
)
from avjax.methods.base import Params


class LinearProbe(Evaluator):
  """Scores of a probe for each embedding; the same at every call.

  Labels are those of the head `label` as the data set holds them, so a
  pretraining config that reads none can be probed. Views are averaged.

  Options of the section:
    train_split: what the probe learns from ('train').
    train_limit: its first clips only (0 = all).
    limit: the first clips only that are scored (0 = all).
    names: of the embeddings; () = all.
    inverse_l2: scikit-learn's C (1.0), on features standardised by the
      training split.
    iterations: of L-BFGS at most (1,000).
  """

  def __init__(self, context: Context, section: Any):
    super().__init__(context, section)
    self.names = tuple(section.get("names", ()))
    self.inverse_l2 = float(section.get("inverse_l2", 1.0))
    self.iterations = section.get("iterations", 1_000)
    self._train_section = section.copy_and_resolve_references().unlock()
    self._train_section.split = section.get("train_split", "train")
    self._train_section.limit = section.get("train_limit", 0)
    self._embedder = Embedder(context, normalise=False)

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Scores by name.

    Raises:
      InputError: the data set has no labels, the training split has fewer than
        two classes, or an embedding is not finite.
    """
    del step
    data = self.context.config.data
    classes = len(records.class_names(data))
    sides = []
    for section in (self._train_section, self.section):
      found = self._embedder.split(params, section)
      split = records.Split(data, section.split, section.limit)
      labels = _one_hot(class_numbers(split), classes, data.multilabel)
      sides.append((found, labels[found.number]))
    (train, train_labels), (test, test_labels) = sides
    scores, counted = {}, np.ones(len(test.number), bool)
    available = _names(train)
    for name in self.names or available:
      lookup(dict.fromkeys(available), name, "embedding of the method")
      x, y, _ = _side(train, train_labels, name, data.multilabel)
      x_test, y_test, used = _side(test, test_labels, name, data.multilabel)
      counted &= used
      x, x_test = _standardise(name, x, x_test)
      if data.multilabel:
        logits = self._one_by_one(name, x, y, x_test)
        scores[f"{name}/mAP"] = metrics.ranking(logits, y_test).mean_ap
      else:
        guess = self._fit(name, x, y.argmax(axis=1)).predict(x_test)
        scores[f"{name}/top1"] = float((guess == y_test.argmax(axis=1)).mean())
    return {**scores, "left_out": float((~counted).sum())}

  def _fit(self, name: str, x: np.ndarray, y: np.ndarray) -> Any:
    """A fitted regression; says where it has not converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(y)) < 2:
      raise InputError(
        f"linear probe of {name!r}: split {self._train_section.split!r} holds "
        f"{len(np.unique(y))} class in {len(y)} labelled clips; 2 are needed"
      )
    model = LogisticRegression(C=self.inverse_l2, max_iter=self.iterations)
    with warnings.catch_warnings(record=True) as found:
      warnings.simplefilter("always", ConvergenceWarning)
      model.fit(x, y)
    if any(w.category is ConvergenceWarning for w in found):
      logging.warning(
        "linear probe of %s: not converged after %d iterations",
        name, self.iterations,
      )  # fmt: skip
    return model

  def _one_by_one(
    self, name: str, x: np.ndarray, y: np.ndarray, x_test: np.ndarray
  ) -> Float[np.ndarray, "b k"]:
    """Logits of one regression per class; 0 where training has no contrast."""
    logits = np.zeros((len(x_test), y.shape[1]), np.float32)
    said = time.monotonic()
    for k in range(y.shape[1]):
      if y[:, k].any() and not y[:, k].all():
        logits[:, k] = self._fit(name, x, y[:, k]).decision_function(x_test)
      if time.monotonic() - said > SAY_EVERY:
        said = time.monotonic()
        logging.info("linear probe of %s: class %d of %d", name, k, y.shape[1])
    return logits


def _one_hot(
  numbers: list[Int[np.ndarray, "_"]], classes: int, multilabel: bool
) -> Int[np.ndarray, "n k"]:
  """0 or 1 of all clips; the main one alone where there is one per clip."""
  labels = np.zeros((len(numbers), classes), np.int64)
  for row, mine in enumerate(numbers):
    labels[row, mine if multilabel else mine[:1]] = 1
  return labels


def _names(found: Embedded) -> list[str]:
  names = list(found.values)
  both = {"audio", "video"} <= set(names)
  return names + ["av"] * (both and "av" not in names)


def _side(
  found: Embedded, labels: np.ndarray, name: str, multilabel: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Features and labels of the clips that count, and which these are."""
  needs = (name,) if name in found.has else tuple(_modalities(found))
  used = np.all([found.has[m] for m in needs], axis=0)
  if not multilabel:
    used = used & labels.any(axis=1)
  if not used.any():
    raise InputError(
      f"linear probe of {name!r}: none of {len(used)} clips has "
      f"{' and '.join(needs)} and a label"
    )
  if name in found.values:
    x = found.values[name]
  else:
    x = np.concatenate([found.values["audio"], found.values["video"]], axis=1)
  return x[used], labels[used], used


def _modalities(found: Embedded) -> list[str]:
  """Those that the method embeds; both where their names do not tell."""
  return [m for m in found.has if m in found.values] or list(found.has)


def _standardise(
  name: str, x: Float[np.ndarray, "b d"], x_test: Float[np.ndarray, "n d"]
) -> tuple[Float[np.ndarray, "b d"], Float[np.ndarray, "n d"]]:
  """Mean 0 and variance 1 (biased) over the training clips."""
  broken = int((~np.isfinite(x)).any(axis=1).sum())
  broken += int((~np.isfinite(x_test)).any(axis=1).sum())
  if broken:
    raise InputError(
      f"linear probe of {name!r}: {broken} of {len(x) + len(x_test)} "
      "embeddings are not finite"
    )
  mean, std = x.mean(axis=0), x.std(axis=0)
  std = np.where(std > 1e-6, std, 1.0)
  return (x - mean) / std, (x_test - mean) / std
