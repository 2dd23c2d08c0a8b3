"""Captions that a model writes of clips: a table, a picture and scores.

Each clip is captioned twice, greedily and by beam search. Scores, those of
`greedy_` also for `beam_`:

| score | meaning |
|---|---|
| `greedy_words` | F1 of the words with the closest true caption |
| `greedy_others` | the same with the captions of another clip |
| `greedy_different` | different captions, as a fraction of the clips |
| `greedy_ended` | fraction that ended within the length |
| `greedy_score` | log p of a token, mean over captions; see `length_penalty` |
| `clips` | that were captioned |
| `left_out` | clips without a caption or a modality of the mode |

A model that says the same of every clip has `words` as high as `others`. Words
are compared as bags, and captions as the tokenizer reads them.

What the method has for it: `retrieval_modes` and `encode_media` as for
`avjax.evaluators.text_retrieval`, and `caption_start(params, tokens [b s w],
length)` -> (fixed, state), `caption_step(params, fixed, state, token [b],
position)` -> (logits [b V], state), see `avjax.generation.captions`.
"""

import collections
import csv
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from avjax import generation
from avjax.evaluators import text_pictures
from avjax.evaluators.base import Context
from avjax.evaluators.captioned import Captioned
from avjax.evaluators.text_pictures import Line, Row
from avjax.methods.base import Params

NEEDED = ("retrieval_modes", "encode_media", "caption_start", "caption_step")
SEARCHES = ("greedy", "beam")


@dataclasses.dataclass(frozen=True)
class Written:
  """Captions of a split.

  Attributes:
    number: of the clips in the split.
    true: captions of each clip.
    made: search -> the caption of each clip.
    ended: search -> whether each ended.
    scores: search -> log p by `length_penalty`.
    left_out: clips that were not captioned.
  """

  number: Int[np.ndarray, "n"]
  true: Sequence[Sequence[str]]
  made: Mapping[str, Sequence[str]]
  ended: Mapping[str, np.ndarray]
  scores: Mapping[str, np.ndarray]
  left_out: int


class Captions(Captioned):
  """Writes captions and compares them with the true ones.

  Options of the section:
    mode: which inputs are seen; '' = both where the method and the data have
      both, else what there is.
    captions: c; a clip may have fewer.
    beams: of the beam search.
    length_penalty: see `avjax.generation.score`.
    pictures: how many clips, spread over the split, are in the table of the
      report and in the picture (0 = none). All are in tables/*.csv of the run.
  """

  def __init__(self, context: Context, section: Any):
    modes = (section.mode,) if section.get("mode", "") else ()
    super().__init__(context, section, needed=NEEDED, modes=modes)
    self.mode = max(self.modes, key=len)
    self.modes = (self.mode,)
    # A text of `length` tokens is [DEC], which is given, and the others.
    self.length = context.config.data.text.length - 1
    self._step = jax.jit(self._batch)

  def run(self, params: Params, step: int) -> Mapping[str, float]:
    """Scores by name; writes the table and the picture.

    Raises:
      InputError: no clip has a caption and what the mode sees.
    """
    written = self.write(params)
    found = {"clips": float(len(written.number))}
    found["left_out"] = float(written.left_out)
    for search in SEARCHES:
      made = written.made[search]
      found |= {
        f"{search}_words": _closeness(made, written.true),
        f"{search}_others": _closeness(made, _moved(written.true)),
        f"{search}_different": len(set(made)) / len(made),
        f"{search}_ended": float(written.ended[search].mean()),
        f"{search}_score": float(written.scores[search].mean()),
      }
    if jax.process_index() == 0:
      self._keep(written, step)
    return found

  def write(self, params: Params) -> Written:
    """Captions of all clips that have one and the modalities of the mode.

    Raises:
      InputError: there is none.
    """
    joined, left_out = self.gather(self._step, params)
    decode, end = self.tokenizer.decode, self.tokenizer.sep
    pairs = zip(joined["ids"], joined["mask"], strict=True)
    return Written(
      joined["number"],
      [[decode(row[m]) for row, m in zip(*pair, strict=True) if m.any()]
       for pair in pairs],
      {s: [decode(row) for row in joined[s]] for s in SEARCHES},
      {s: (joined[s] == end).any(axis=1) for s in SEARCHES},
      {s: joined[f"{s}_score"] for s in SEARCHES},
      left_out,
    )  # fmt: skip

  def _batch(
    self, params: Params, batch: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    method = self.context.method
    media = self.encode_media(params, batch)[self.mode]
    write = functools.partial(
      generation.captions, method, params, media, self.tokenizer,
      length=self.length,
      length_penalty=float(self.section.get("length_penalty", 1.0)),
    )  # fmt: skip
    made = write(), write(beams=self.section.get("beams", 3))
    found = self.facts(batch)
    for search, (ids, scores) in zip(SEARCHES, made, strict=True):
      found |= {search: ids, f"{search}_score": scores}
    return found

  # --- Table and picture ---

  def _keep(self, written: Written, step: int) -> None:
    """All captions in a CSV, some in the report and in the picture."""
    ids = [str(name) for name in self.built.column("id")[written.number]]
    folder = self.context.workdir.tables
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{self.section.split}_captions"
    with (folder / f"{name}.csv").open("w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(["id", *SEARCHES, "true"])
      for row, one in enumerate(ids):
        made = [written.made[search][row] for search in SEARCHES]
        writer.writerow([one, *made, *written.true[row]])
    count = min(self.section.get("pictures", 0), len(ids))
    if count:
      rows = np.linspace(0, len(ids) - 1, count).round().astype(int).tolist()
      (folder / f"{name}.md").write_text(_table(written, ids, rows, step))
      picture = self._draw(written, rows, step)
      self.context.picture(name, picture, step)

  def _draw(self, written: Written, rows: Sequence[int], step: int) -> Any:
    shown = [
      Row(
        self.clips.name(int(written.number[row])),
        text_pictures.shown(self.clips, int(written.number[row])),
        [
          [Line(caption) for caption in written.true[row]],
          *([Line(written.made[search][row])] for search in SEARCHES),
        ],
      )
      for row in rows
    ]
    beams = self.section.get("beams", 3)
    return text_pictures.text_grid(
      shown,
      columns=["true captions", "greedy", f"beam search of {beams}"],
      title=f"{self.title(step)}: captions written from "
      f"{text_pictures.ANSWERS[self.mode]}",
    )


def _table(
  written: Written, ids: Sequence[str], rows: Sequence[int], step: int
) -> str:
  """Markdown: one line a clip, with its first true caption."""
  lines = [
    f"Captions at step {step}:",
    "",
    "| clip | a true caption | greedy | beam search |",
    "|---|---|---|---|",
  ]
  for row in rows:
    made = [written.made[search][row] for search in SEARCHES]
    cells = [ids[row], written.true[row][0], *made]
    lines.append(f"| {' | '.join(c.replace('|', '/') for c in cells)} |")
  return "\n".join([*lines, ""])


# --- How close two captions are ---


def overlap(one: str, other: str) -> float:
  """F1 of the words of two texts as bags, 0 to 1; without any word 0."""
  a, b = (collections.Counter(_words(x)) for x in (one, other))
  both = (a & b).total()
  return 2.0 * both / max(a.total() + b.total(), 1)


def _words(caption: str) -> list[str]:
  return re.findall(r"\w+", caption.lower())


def _closeness(made: Sequence[str], true: Sequence[Sequence[str]]) -> float:
  """Mean over clips of the overlap with the closest true caption."""
  pairs = zip(made, true, strict=True)
  return float(np.mean([max(overlap(m, t) for t in ts) for m, ts in pairs]))


def _moved(true: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
  """Captions of the clips half a split further, which lies sorted by class."""
  half = len(true) // 2
  return [*true[half:], *true[:half]]
