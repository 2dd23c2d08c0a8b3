"""Captions that several models find for the same clips (CoAVT, Figure 3).

`python -m avjax.compare` comes here where the evaluation that it is given is of
type `text_retrieval`:

python -m avjax.compare --workdirs=runs/baseline,runs/coavt
    --names=Baseline,CoAVT --eval=text --output=DIR

| file | |
|---|---|
| `comparison_av2t.png` | clips with the captions that each model finds first |
| `comparison.csv` | every query's id, direction and rank by model |
| `comparison.md` | recalls, and in how many queries a model alone is ahead |

Re-ranked where the model can; the clips are chosen as for `avjax.compare`. Of
the modes that all models have, the one that sees most is compared.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from avjax import compare_ranks, plots
from avjax.errors import InputError
from avjax.evaluators import text_pictures
from avjax.evaluators.retrieval_pictures import Clips
from avjax.evaluators.text_retrieval import Found, TextRetrieval


@dataclasses.dataclass(frozen=True)
class Ranked:
  """What a model finds.

  Attributes:
    name: of the model.
    data: name of the data set and of the split.
    ids: of the clips.
    found: its tables.
    words: of each text.
    clips: where the pictures come from.
  """

  name: str
  data: tuple[str, str]
  ids: Sequence[str]
  found: Found
  words: Sequence[str]
  clips: Clips

  def ranks(self, mode: str) -> Mapping[str, Float[np.ndarray, "_"]]:
    """Direction -> rank of each query."""
    ranks = self.found.best(mode).ranks
    return {f"t2{mode}": ranks.forward, f"{mode}2t": ranks.backward}


def ranked(name: str, evaluator: TextRetrieval, params: Any) -> Ranked:
  """What the parameters of a run find."""
  found = evaluator.find(params)
  return Ranked(
    name,
    (evaluator.context.config.data.name, evaluator.section.split),
    [str(i) for i in evaluator.built.column("id")[found.number]],
    found,
    evaluator.words(found),
    evaluator.clips,
  )


def common_mode(models: Sequence[Ranked]) -> str:
  """The mode of all models that sees most.

  Raises:
    InputError: the models have other clips or captions, or no mode in common.
  """
  first = models[0]
  for other in models[1:]:
    a, b = (
      (m.data, m.ids, [m.words[k] for k in text_of(m)]) for m in (first, other)
    )
    for what, x, y in zip(
      ("data set or split", "clips", "captions"), a, b, strict=True
    ):
      if x != y:
        raise InputError(
          f"{first.name} and {other.name} differ in their {what}: {_short(x)} "
          f"and {_short(y)}"
        )
  modes = [
    m for m in first.found.tables if all(m in o.found.tables for o in models)
  ]
  if not modes:
    raise InputError(
      f"{', '.join(m.name for m in models)} have no mode in common"
    )
  return max(modes, key=len)


def text_of(model: Ranked) -> Sequence[int]:
  """The text of each caption."""
  return next(iter(model.found.tables.values())).text.tolist()


def _short(x: Sequence[str]) -> str:
  return f"{len(x)} ({', '.join(x[:2])}, …)" if isinstance(x, list) else str(x)


def draw(
  models: Sequence[Ranked], mode: str, *, count: int, top: int
) -> plots.Picture:
  """Clips that ask, and the first captions of every model beside them."""
  last, way = models[-1], f"{mode}2t"
  ranks = [model.ranks(mode)[way] for model in models]
  rows = []
  for sort, clip in compare_ranks.choose(ranks[0], ranks[-1], count):
    number = int(last.found.number[clip])
    places = [
      f"{model.name} {rank[clip]:g}"
      for model, rank in zip(models, ranks, strict=True)
    ]
    label = [sort, last.clips.name(number), "", "rank of its best:", *places]
    texts = [
      text_pictures.answers(model.found.best(mode), model.words, clip, top)
      for model in models
    ]
    image = text_pictures.shown(last.clips, number)
    rows.append(text_pictures.Row("\n".join(label), image, texts))
  return text_pictures.text_grid(
    rows,
    columns=[model.name for model in models],
    title=f"{', split '.join(last.data)}: {text_pictures.ANSWERS[mode]} ask, "
    f"{len(text_of(last))} captions answer; green: its own",
  )


def ranks_of(
  models: Sequence[Ranked], mode: str
) -> dict[str, Float[np.ndarray, "m _"]]:
  """Direction -> ranks by model."""
  found = [model.ranks(mode) for model in models]
  return {way: np.stack([ranks[way] for ranks in found]) for way in found[0]}


def table(models: Sequence[Ranked], mode: str) -> str:
  """Markdown by direction and model; see `compare_ranks.table`."""
  ranks = ranks_of(models, mode)
  how = ["yes" if mode in model.found.reranked else "no" for model in models]
  text = compare_ranks.table(
    [model.name for model in models],
    ranks,
    "re-ranked",
    dict.fromkeys(ranks, how),
  )
  clips, captions = len(models[0].ids), len(text_of(models[0]))
  return f"{text}\n{clips} clips, {captions} captions.\n"


def write(
  models: Sequence[Ranked], output: Any, *, count: int, top: int
) -> str:
  """Writes the files into a folder; returns `table`.

  Raises:
    InputError: see `common_mode`.
  """
  mode = common_mode(models)
  first, names = models[0], [model.name for model in models]
  ids = {
    f"t2{mode}": [first.ids[k] for k in first.found.tables[mode].clip],
    f"{mode}2t": first.ids,
  }
  text = table(models, mode)
  folder = compare_ranks.write(output, names, ids, ranks_of(models, mode), text)
  picture = draw(models, mode, count=count, top=top)
  plots.save(folder / f"comparison_{mode}2t.png", picture)
  return text
