"""Text retrieval: does a caption find its clip, and a clip its captions.

For each mode of the method (`a`: the sound answers, `v`: the pictures, `av`:
both), by the largest cosine of a caption with one of the clip's queries, and
again with the first candidates re-ranked by the matching score (CoAVT
§IV-C1). Scores, those of captions that ask for sounds also for other modes and
ways (`a2t`: a sound asks for its captions, of which the best counts):

| score | meaning |
|---|---|
| `t2a_R1`, `t2a_R5`, `t2a_R10` | fraction of queries within the first |
| `t2a_median_rank` | counted from 1 |
| `t2a_tied` | fraction of queries with another item exactly as good |
| `a_sum_R` | R1, R5 and R10 of both directions added up, 0 to 6 |
| `reranked_t2a_R1`, … | all these after re-ranking |
| `gallery` | clips that are asked for by captions, and ask themselves |
| `queries` | captions that ask, and are asked for by clips |
| `texts` | different ones among these |
| `left_out` | clips without a caption or a modality of one of the modes |
| `reranked_clips`, `reranked_texts` | candidates of a caption, of a clip |

All captions of a clip are queries. The clips are the same for all modes. How
ties and broken embeddings count: `avjax.text_ranking.Table.ranks`.

What the method has for it: `retrieval_modes`; `encode_media(params, inputs,
mode)` -> 'feature' [b q p] of length 1 and, if it can re-rank, 'tokens'
[b s w]; `encode_text(params, ids [n l], mask [n l])` -> [n p] of length 1;
`match(params, tokens [n s w], ids [n l], mask [n l])` -> [n].
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from avjax import parallel, ranking, text_ranking
from avjax.evaluators import text_pictures
from avjax.evaluators.base import Context
from avjax.evaluators.captioned import Captioned
from avjax.evaluators.retrieval import chosen_ids
from avjax.methods.base import Params

NEEDED = ("retrieval_modes", "encode_media", "encode_text")


@dataclasses.dataclass(frozen=True)
class Clips:
  """What is embedded of the clips that count.

  Attributes:
    number: of the clip in the split.
    features: mode -> of each query.
    ids: of the captions of all clips in their order.
    mask: true = a token.
    clip: of each caption, the place of its clip in `number`.
    left_out: clips of the split that do not count.
  """

  number: Int[np.ndarray, "n"]
  features: Mapping[str, Float[np.ndarray, "n q p"]]
  ids: Int[np.ndarray, "c l"]
  mask: Bool[np.ndarray, "c l"]
  clip: Int[np.ndarray, "c"]
  left_out: int


@dataclasses.dataclass(frozen=True)
class Found:
  """What a model finds.

  Attributes:
    number: of each clip in the split.
    ids: of the different texts.
    tables: mode -> by similarity.
    reranked: mode -> re-ranked, for the modes with a matching score.
    left_out: clips that do not count.
  """

  number: Int[np.ndarray, "n"]
  ids: Int[np.ndarray, "u l"]
  tables: Mapping[str, text_ranking.Table]
  reranked: Mapping[str, text_ranking.Table]
  left_out: int

  def best(self, mode: str) -> text_ranking.Table:
    """The re-ranked table where there is one."""
    return self.reranked.get(mode, self.tables[mode])


class TextRetrieval(Captioned):
  """Recall of captions and of clips.

  Options of the section:
    modes: () = all of the method for which `data.modality` has the tracks.
    captions: c; a clip may have fewer.
    rerank: candidates of a query that are re-ranked, k: clips, or different
      texts; 0 = none. Where there are fewer, all are.
    rerank_add: whether the similarity is added to their matching score.
    match_batch: pairs that are matched at a time, rounded up to whole batches.
    subset: as for `retrieval`.
    pictures: how many of the best and of the worst queries are drawn for each
      mode and direction, with the five found first (0 = none).
  """

  def __init__(self, context: Context, section: Any):
    modes = section.get("modes", ())
    super().__init__(context, section, needed=NEEDED, modes=modes)
    self._step = jax.jit(self._features)
    self._tokens = jax.jit(self._media_tokens)
    self._texts = jax.jit(context.method.encode_text)
    self._match = jax.jit(self._pairs)

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Scores by name; draws pictures through the context.

    Raises:
      InputError: see `find`.
    """
    found = self.find(params)
    values: dict[str, float] = {}
    for prefix, tables in (("", found.tables), ("reranked_", found.reranked)):
      for mode, table in tables.items():
        values |= ranking.both_ways(
          table.ranks,
          (f"t2{mode}", f"{mode}2t"),
          prefix=prefix,
          total=f"{mode}_sum_R",
        )
    table = next(iter(found.tables.values()))
    values |= {
      "gallery": float(len(found.number)),
      "queries": float(len(table.text)),
      "texts": float(len(found.ids)),
      "left_out": float(found.left_out),
    }
    if found.reranked:
      values["reranked_clips"] = float(min(table.top, len(found.number)))
      values["reranked_texts"] = float(min(table.top, len(found.ids)))
    if self.section.get("pictures", 0) and jax.process_index() == 0:
      self._draw(found, step)
    return values

  def find(self, params: Params) -> Found:
    """Similarities of all clips and captions, and re-ranked ones.

    Raises:
      InputError: no clip has what counts, or the subset does not fit the split.
    """
    clips = self._clips(params)
    # Equal captions are one text: where the mask is false the id is 0.
    rows = np.concatenate([clips.ids, clips.mask], axis=1)
    rows, text_of = np.unique(rows, axis=0, return_inverse=True)
    ids, mask = np.split(rows, 2, axis=1)
    mask = mask.astype(bool)
    embedded = self._encode(params, ids, mask)
    top = max(self.section.get("rerank", 0), 0)
    add = self.section.get("rerank_add", True)
    tables = {
      mode: text_ranking.Table(
        text_ranking.similarities(clips.features[mode], embedded),
        text_of.reshape(-1), clips.clip, None, top, add,
      ) for mode in self.modes
    }  # fmt: skip
    matched = {}
    if top:
      matched = self._matched(params, clips.number, ids, mask, tables)
    reranked = {
      mode: dataclasses.replace(tables[mode], matched=known)
      for mode, known in matched.items()
    }
    return Found(clips.number, ids, tables, reranked, clips.left_out)

  # --- Clips and captions ---

  def _clips(self, params: Params) -> Clips:
    subset = self.section.get("subset", "")
    chosen = chosen_ids(subset, self.built) if subset else None
    rows, left_out = self.gather(self._step, params, chosen)
    number, ids, mask = (rows.pop(name) for name in ("number", "ids", "mask"))
    clip, place = mask.any(axis=-1).nonzero()
    ids = np.where(mask, ids, 0)[clip, place]
    return Clips(number, rows, ids, mask[clip, place], clip, left_out)

  def _features(
    self, params: Params, batch: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    encoded = self.encode_media(params, batch)
    features = {
      mode: media["feature"].astype(jnp.float32)
      for mode, media in encoded.items()
    }
    return {**self.facts(batch), **features}

  def _encode(
    self, params: Params, ids: np.ndarray, mask: np.ndarray
  ) -> Float[np.ndarray, "u p"]:
    """Embeddings of texts; the last call is filled up with the first text."""
    size = self._match_batch(1)
    parts = [
      np.asarray(self._texts(params, ids[rows], mask[rows]), np.float32)[:count]
      for rows, count in _calls(np.arange(len(ids)), size)
    ]
    return np.concatenate(parts)

  # --- Re-ranking ---

  def _matched(
    self,
    params: Params,
    number: Int[np.ndarray, "n"],
    ids: Int[np.ndarray, "u l"],
    mask: Bool[np.ndarray, "u l"],
    tables: Mapping[str, text_ranking.Table],
  ) -> dict[str, Float[np.ndarray, "u n"]]:
    """Matching scores of the pairs that count, by mode.

    The clips are read and encoded again: the tokens of all would not fit.
    """
    wanted = {mode: table.wanted() for mode, table in tables.items()}
    found: dict[str, np.ndarray] = {}
    place = {int(k): column for column, k in enumerate(number)}
    for batch, _ in self.context.batches(self.section):
      rows = parallel.to_host(batch["index"])
      valid = parallel.to_host(batch.get("valid", np.ones(len(rows), bool)))
      here = [
        (row, place[int(k)])
        for row, k in enumerate(rows)
        if valid[row] and int(k) in place
      ]
      tokens = self._tokens(params, batch)
      if not tokens:
        logging.info("the method has no matching score: nothing is re-ranked")
        return {}
      row, column = np.array(here, int).reshape(-1, 2).T
      for mode, encoded in tokens.items():
        known = found.setdefault(
          mode, np.full(wanted[mode].shape, np.nan, np.float32)
        )
        texts, which = wanted[mode][:, column].nonzero()
        known[texts, column[which]] = self._match_all(
          params, encoded, row[which], ids[texts], mask[texts], batch["index"]
        )
    return found

  def _media_tokens(
    self, params: Params, batch: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Mode -> tokens; without those that the method cannot match."""
    return {
      mode: media["tokens"]
      for mode, media in self.encode_media(params, batch).items()
      if "tokens" in media
    }

  def _match_all(
    self,
    params: Params,
    tokens: jax.Array,
    row: np.ndarray,
    ids: np.ndarray,
    mask: np.ndarray,
    like: Any,
  ) -> np.ndarray:
    """Scores of pairs of a clip of the batch and a text.

    Args:
      params: of the method.
      tokens: of the batch, [b s w].
      row: of each pair's clip in the batch.
      ids: of each pair's text.
      mask: of it.
      like: an array of the batch, over whose devices the pairs are spread.
    """
    where = getattr(like, "sharding", None)
    scores = [np.zeros(0, np.float32)]
    size = self._match_batch(len(like))
    for pairs, count in _calls(np.arange(len(row)), size):
      part = jax.device_put((row[pairs], ids[pairs], mask[pairs]), where)
      result = parallel.to_host(self._match(params, tokens, *part))
      scores.append(result[:count].astype(np.float32))
    return np.concatenate(scores)

  def _pairs(
    self,
    params: Params,
    tokens: jax.Array,
    row: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
  ) -> jax.Array:
    return self.context.method.match(params, tokens[row], ids, mask)

  def _match_batch(self, multiple: int) -> int:
    wanted = max(self.section.get("match_batch", 256), 1)
    return -(-wanted // multiple) * multiple

  # --- Pictures ---

  def words(self, found: Found) -> list[str]:
    """The different texts as the model reads them."""
    return [self.tokenizer.decode(row) for row in found.ids]

  def _draw(self, found: Found, step: int) -> None:
    section, title = self.section, self.title(step)
    for mode in self.modes:
      for way, draw in text_pictures.WAYS.items():
        name = f"{section.split}_text_{way.format(mode)}"
        picture = draw(
          mode, found.best(mode), self.words(found), found.number, self.clips,
          title, count=section.pictures,
        )  # fmt: skip
        self.context.picture(name, picture, step)


def _calls(
  rows: Int[np.ndarray, "n"], size: int
) -> Iterator[tuple[Int[np.ndarray, "m"], int]]:
  """Rows in parts of one size, and how many of each part count."""
  for at in range(0, len(rows), size):
    part = rows[at : at + size]
    yield np.pad(part, (0, size - len(part)), mode="edge"), len(part)
