"""Accuracy, mAP and their relatives of `Method.predict` on a labelled split.

Scores by head of `config.data.heads`:

| head | scores |
|---|---|
| `label` | `top1`, `top5` |
| `label` with `data.multilabel` | `mAP`, `mAUC`, `dprime` |
| `verb`, `noun` | `verb_top1`, `verb_top5`, `noun_top1`, `noun_top5` |
| `verb` and `noun` | `action_top1`, `action_top5`, of the pair |
| `segment` | `segment_accuracy`, over the seconds of all clips |

and `loss`: cross-entropy of the same logits without smoothing, mean over heads.
Top-5 is left out where a head has fewer than 5 classes, `dprime` where it is
infinite. `mAP_left_out` counts the classes without a positive in the split.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from avjax import losses, metrics, parallel
from avjax.errors import InputError, lookup
from avjax.evaluators.base import Context, Evaluator
from avjax.methods.base import Params

Pairs = dict[str, tuple[jax.Array, jax.Array]]


class Classification(Evaluator):
  """Scores `predict`, averaged over the views of a clip.

  Options of the section: `views`; `average`, what is averaged over them,
  'logits' or 'probabilities' (CAV-MAE's family); and `modes` of `Method.modes`:
  ('av',) where the method has it, else its first. With more than one mode the
  names of the scores are prefixed, `a/top1`.
  """

  def __init__(self, context: Context, section: Any):
    super().__init__(context, section)
    known = context.method.modes
    default = ("av",) if "av" in known else known[:1]
    self.modes = tuple(section.get("modes", ()) or default)
    name = section.get("average", "logits")
    self.average = lookup(AVERAGES, name, "average of evals")
    for mode in self.modes:
      lookup(dict.fromkeys(known), mode, "mode of evals.modes")
    if not self.modes or not context.config.data.heads:
      raise InputError(
        f"evals of type {section.type!r} need a mode and a label head; there "
        f"are modes {self.modes} and heads {tuple(context.config.data.heads)}"
      )
    # One function for all batches: the last one is padded, so one compilation.
    self._step = jax.jit(self._scores)

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Scores by name over the valid examples of the split.

    Raises:
      InputError: the split holds no labelled example, or a score is not
        finite.
    """
    del step
    means = metrics.Means()
    ranked: list[dict[str, np.ndarray]] = []
    for pairs, kept in self._results(params):
      means.add(pairs)
      if kept:
        valid = kept.pop("valid")
        ranked.append({name: rows[valid] for name, rows in kept.items()})
    found = means.result()
    if not found:
      raise InputError(f"split {self.section.split!r} has no labelled example")
    if ranked:
      rows = {
        name: np.concatenate([part[name] for part in ranked])
        for name in ranked[0]
      }
      labels = rows.pop("labels")
      for prefix, scores in rows.items():
        found |= _ranking(prefix, scores, labels)
    return found

  def _results(self, params: Params) -> Iterator[tuple[Any, Any]]:
    """Host values of each batch, while the device works on the next."""
    pending = None
    for batch, _ in self.context.batches(self.section):
      result = self._step(params, batch)
      if pending is not None:
        yield parallel.to_host(pending)
      pending = result
    if pending is not None:
      yield parallel.to_host(pending)

  def _scores(
    self, params: Params, batch: Mapping[str, jax.Array]
  ) -> tuple[Pairs, dict[str, jax.Array]]:
    """(sum, normaliser) pairs; logits and labels for ranking scores."""
    data = self.context.config.data
    labels = _labels(batch, data.heads)
    size = next(iter(labels.values())).shape[0]
    valid = batch.get("valid", jnp.ones(size, bool))
    flat, views = fold_views(batch)
    inputs = self.context.prepare(flat, jax.random.key(0), False)
    pairs: Pairs = {}
    kept: dict[str, jax.Array] = {}
    for mode in self.modes:
      prefix = f"{mode}/" if len(self.modes) > 1 else ""
      logits = self.context.method.predict(params, inputs, mode=mode)
      logits = {
        head: self.average(
          rearrange(
            lookup(logits, head, "head of predict").astype(jnp.float32),
            "(b v) ... -> v b ...",
            v=views,
          ),
          data.multilabel,
        )
        for head in data.heads
      }
      for name, value in _pairs(logits, labels, valid, data.multilabel).items():
        pairs[prefix + name] = value
      if data.multilabel and "label" in logits:
        kept[prefix] = logits["label"]
    if kept:
      kept |= {"labels": labels["label"], "valid": valid}
    return pairs, kept


def mean_logits(
  logits: Float[Array, "v b *k"], multilabel: bool
) -> Float[Array, "b *k"]:
  """Mean over the views."""
  del multilabel
  return logits.mean(axis=0)


def mean_probabilities(
  logits: Float[Array, "v b *k"], multilabel: bool
) -> Float[Array, "b *k"]:
  """Logits of the mean of the views' probabilities.

  Their softmax, with `multilabel` their sigmoid, is that mean; so scores and
  loss are those of the mean, and none is lost to rounding near 0 and 1.
  """
  if not multilabel:
    # The views' number shifts all logits alike.
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0)
  yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  return jax.nn.logsumexp(yes, axis=0) - jax.nn.logsumexp(no, axis=0)


AVERAGES = {"logits": mean_logits, "probabilities": mean_probabilities}


def fold_views(
  batch: Mapping[str, jax.Array],
) -> tuple[dict[str, jax.Array], int]:
  """Views become examples: [b v …] -> [(b v) …], the rest is repeated.

  Args:
    batch: `frames` [b v t h w 3] or `waveform` [b v s] or both have views; a
      batch without views is returned as it is.

  Returns:
    The batch that `prepare` takes, and the number of views.

  Raises:
    InputError: frames and waveform have different numbers of views.
  """
  ranks = {"frames": 6, "waveform": 3}
  found = {
    name: batch[name].shape[1]
    for name, rank in ranks.items()
    if name in batch and batch[name].ndim == rank
  }
  if len(set(found.values())) > 1:
    raise InputError(f"numbers of views differ: {found}")
  if not found:
    return dict(batch), 1
  views = next(iter(found.values()))
  return {
    name: rearrange(value, "b v ... -> (b v) ...")
    if name in found
    else jnp.repeat(value, views, axis=0)
    for name, value in batch.items()
  }, views


def _labels(
  batch: Mapping[str, jax.Array], heads: tuple[str, ...]
) -> dict[str, jax.Array]:
  keys = {
    head: "label" if head == "label" else f"label/{head}" for head in heads
  }
  return {head: lookup(batch, key, "batch key") for head, key in keys.items()}


def _pairs(
  logits: Mapping[str, jax.Array],
  labels: Mapping[str, jax.Array],
  valid: jax.Array,
  multilabel: bool,
) -> Pairs:
  """Scores of one mode that are means over examples."""
  loss = losses.multi_head(logits, labels, multilabel=multilabel)
  if multilabel:
    return {"loss": metrics.pair(loss, valid)}
  # A row of zeros is no label: it is neither right nor wrong.
  known = {
    head: valid & rows.reshape(rows.shape[0], -1).any(axis=-1)
    for head, rows in labels.items()
  }
  everywhere = jnp.stack(list(known.values())).all(axis=0)
  pairs = {"loss": metrics.pair(loss, everywhere)}
  scored = {
    "" if head == "label" else f"{head}_": (rows, labels[head], known[head])
    for head, rows in logits.items()
    if head != "segment"
  }
  if "segment" in logits:
    right, labelled = metrics.segment_correct(
      logits["segment"], labels["segment"]
    )
    counted = labelled & valid[:, None]
    pairs["segment_accuracy"] = metrics.pair(right, counted)
  if "noun" in logits and "verb" in logits:
    scored["action_"] = (
      metrics.joint_logits(logits["noun"], logits["verb"]),
      metrics.joint_labels(labels["noun"], labels["verb"]),
      known["noun"] & known["verb"],
    )
  for prefix, (rows, target, counted) in scored.items():
    for top in (1, 5):
      if top <= rows.shape[-1]:
        right = metrics.in_top_k(rows, target, top)
        pairs[f"{prefix}top{top}"] = metrics.pair(right, counted)
  return pairs


def _ranking(
  prefix: str, scores: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  found = metrics.ranking(scores, labels)
  values = {
    "mAP": found.mean_ap,
    "mAUC": found.mean_auc,
    "dprime": found.d_prime,
    "mAP_left_out": float(found.left_out_ap),
  }
  return {
    prefix + name: value for name, value in values.items() if np.isfinite(value)
  }
