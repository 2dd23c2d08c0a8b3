"""BERT's public files, and those of BLIP-2's query encoder.

Files of BERT itself (`bert-base-uncased` and its kin, whose exports differ in
spelling: with or without `bert.`, LayerNorms `gamma`/`beta` or `weight`/`bias`,
with or without the head for words), of LAVIS (`Qformer.bert.…`, `query_tokens`,
`vision_proj`, …) and of BLIP-2 in the library `transformers` (`qformer.…`,
`vision_projection`, …). Linear weights are [out in] there, [in out] here;
query, key and value are three layers there, one here.

Token types: there are none here, so `to_house` adds the first row of a file
that has them to the positions, which gives BERT's numbers exactly for single
sentences. BLIP-2 leaves them out without that, so its files have none.

What is not needed here is handed out as `aside`: BERT's pooler and its head for
sentences, the output matrix of the words, which is their table once more, and
whatever part of BLIP-2 makes the picture's tokens. How many heads the
attention has no file shows.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from avjax import trees
from avjax.errors import InputError
from avjax.methods.base import Loaded, Params
from avjax.weights import transfer

METHOD = "bert"  # `config.method` of a source that is such a file
WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
_OUTPUT = "cls.predictions.decoder"

_ASIDE = re.compile(
  r"embeddings\.position_ids|pooler\.dense\.\w+|cls\.seq_relationship\.\w+|"
  r"cls\.predictions\.decoder\.\w+|(visual_encoder|ln_vision|vision_model)\..+"
)
# Spellings, in the order in which they are undone.
_SPELLINGS = (
  (r"^(module\.)?(qformer\.|Qformer\.)?(bert\.)?", ""),
  (r"^layernorm\.", "embeddings.LayerNorm."),
  (r"LayerNorm\.gamma$", "LayerNorm.weight"),
  (r"LayerNorm\.beta$", "LayerNorm.bias"),
  (r"attention\.attention\.", "attention.self."),
  (r"^vision_projection\.", "vision_proj."),
  (r"^text_projection\.", "text_proj."),
)
_LAYER = re.compile(r"(?<=encoder\.layer\.)\d+|(?<=block_)\d+")


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where an array belongs.

  Attributes:
    house: path; # stands for the layer's number.
    shape: of the public array, by names of sizes.
    part: which of the arrays side by side it is.
    parts: how many there are.
  """

  house: str
  shape: str
  part: int = 0
  parts: int = 1


def _linear(public: str, house: str, shape: str, *parts: str) -> dict:
  """Kernel and bias of a layer, or of several that are one here."""
  found, names = {}, parts or ("",)
  for i, part in enumerate(names):
    dims = shape.split()
    for leaf, ours, size in (
      ("weight", "kernel", shape),
      ("bias", "bias", dims[0]),
    ):
      place = _Place(f"{house}/{ours}", size, i, len(names))
      found[f"{public}{part}.{leaf}"] = place
  return found


def _norm(public: str, house: str) -> dict[str, _Place]:
  leaves = {"weight": "scale", "bias": "bias"}
  return {
    f"{public}.{a}": _Place(f"{house}/{b}", "d") for a, b in leaves.items()
  }


def _mlp(ending: str) -> dict[str, _Place]:
  block, house = "encoder.layer.#.", f"block_#/mlp{ending}/"
  return {
    **_linear(f"{block}intermediate{ending}.dense", f"{house}fc1", "f d"),
    **_linear(f"{block}output{ending}.dense", f"{house}fc2", "d f"),
    **_norm(f"{block}output{ending}.LayerNorm", f"{house}norm"),
  }


def _attention(public: str, house: str) -> dict[str, _Place]:
  public, house = f"encoder.layer.#.{public}.output.", f"block_#/{house}/"
  return {
    **_linear(f"{public}dense", f"{house}out", "d d"),
    **_norm(f"{public}LayerNorm", f"{house}norm"),
  }


_SELF = "encoder.layer.#.attention.self."
_CROSS = "encoder.layer.#.crossattention.self."
# Public name in its shortest spelling -> place. Sizes: V words, n positions,
# q queries, d width, f of the MLP, w of the encoder, p of the projections.
_TABLE: dict[str, _Place] = {
  WORDS: _Place("words/embedding", "V d"),
  POSITIONS: _Place("positions", "n d"),
  "query_tokens": _Place("queries", "1 q d"),
  **_norm("embeddings.LayerNorm", "norm"),
  **_linear(
    _SELF, "block_#/attention/qkv", "d d", "query", "key", "value"
  ),
  **_attention("attention", "attention"),
  **_linear(_CROSS + "query", "block_#/cross/query", "d d"),
  **_linear(_CROSS, "block_#/cross/kv", "d w", "key", "value"),
  **_attention("crossattention", "cross"),
  **_mlp(""),
  **_mlp("_query"),
  **_linear("vision_proj", "project_query", "p d"),
  **_linear("text_proj", "project_text", "p d"),
  **_linear("itm_head", "match", "2 d"),
  **_linear("cls.predictions.transform.dense", "language/dense", "d d"),
  **_norm("cls.predictions.transform.LayerNorm", "language/norm"),
  "cls.predictions.bias": _Place("language/bias", "V"),
  "temp": _Place("temperature", ""),
}  # fmt: skip


def bare(name: str) -> str:
  """A public name in its shortest spelling."""
  for pattern, plain in _SPELLINGS:
    name = re.sub(pattern, plain, name)
  return name


def _numbered(name: str) -> tuple[str, str]:
  """A name with # for its layer, and that layer's number or ''."""
  match = _LAYER.search(name)
  return _LAYER.sub("#", name, count=1), match[0] if match else ""


def is_bert(names: Iterable[str]) -> bool:
  """Whether these are the names of a BERT or a query encoder."""
  names = {bare(name) for name in names}
  return WORDS in names and f"{_SELF}query.weight".replace("#", "0") in names


def knows(name: str) -> bool:
  """Whether such a file can have this name."""
  short = bare(name)
  own = _numbered(short)[0] in _TABLE or short == TYPES
  return own or bool(_ASIDE.fullmatch(short))


# --- Conversion --------------------------------------------------------------


def to_house(
  state: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A public state dict under the house's names.

  Args:
    state: arrays by public key, in any of the spellings above.

  Returns:
    Nested parameters of `avjax.nn.bert.QueryEncoder`, those that the file has;
    and by the file's key what is no parameter here. Numbers are not changed,
    but for the positions of a file with token types.

  Raises:
    InputError: a key that the family does not have (the nearest is named), a
      part that is missing, an array of a wrong shape, or an output matrix that
      is not the words' table.
  """
  short = {bare(key): np.asarray(value) for key, value in state.items()}
  short = _with_bias(short)
  found: dict[str, dict[int, np.ndarray]] = {}
  sizes: dict[str, tuple[int, str]] = {}
  # In the table's order, so that the words' table tells the width.
  order = {name: i for i, name in enumerate(_TABLE)}
  known = [name for name in short if _numbered(name)[0] in order]
  known.sort(key=lambda name: order[_numbered(name)[0]])
  for name in known:
    pattern, layer = _numbered(name)
    place = _TABLE[pattern]
    _check_shape(name, short[name], place.shape, sizes)
    path = place.house.replace("#", layer.zfill(2))
    value = _turned(path, short[name])
    found.setdefault(path, {})[place.part] = value
  rest = [name for name in short if name not in known and name != TYPES]
  unknown = [name for name in rest if not _ASIDE.fullmatch(name)]
  if unknown:
    raise transfer.foreign_keys(
      unknown, len(state), _TABLE, "a BERT or query encoder",
      bare=lambda name: _numbered(name)[0],
    )  # fmt: skip
  _check_parts(found)
  params = {path: _joined(parts) for path, parts in found.items()}
  if TYPES in short and POSITIONS in short:
    table = params["positions"]
    params["positions"] = table + short[TYPES][0].astype(table.dtype)
  aside = {
    key: np.asarray(value)
    for key, value in state.items()
    if _ASIDE.fullmatch(bare(key))
  }
  return trees.unflatten(params), aside


def to_reference(
  params: Params, aside: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
  """The inverse of `to_house`, under LAVIS's names.

  Their `Qformer.bert.…` and `Qformer.cls.…` are BERT's own behind `Qformer.`.

  Args:
    params: a tree of `avjax.nn.bert.QueryEncoder`.
    aside: of `to_house`; its output matrix is made anew.

  Raises:
    InputError: a name that the family has no place for.
  """
  places: dict[str, list[str]] = {}
  for public, place in _TABLE.items():  # parts come in their order
    places.setdefault(place.house, []).append(public)
  state = {}
  for path, value in trees.flatten(params).items():
    pattern, layer = _numbered(path)
    if pattern not in places:
      raise InputError(f"a query encoder's file has no place for {path!r}")
    names = places[pattern]
    number = str(int(layer or 0))
    for name, part in zip(
      names, np.split(np.asarray(value), len(names), axis=-1)
      if len(names) > 1 else [np.asarray(value)], strict=True
    ):  # fmt: skip
      value = part[None] if path == "queries" else _turned(path, part)
      state[_lavis(name.replace("#", number))] = value
  if _lavis("cls.predictions.bias") in state:
    state[_lavis(f"{_OUTPUT}.weight")] = state[_lavis(WORDS)]
    state[_lavis(f"{_OUTPUT}.bias")] = state[_lavis("cls.predictions.bias")]
  for name, value in (aside or {}).items():
    if not bare(name).startswith(_OUTPUT):
      state[name] = np.asarray(value)
  return state


def _lavis(name: str) -> str:
  """A short name as LAVIS has it."""
  if name.startswith(("embeddings.", "encoder.")):
    return f"Qformer.bert.{name}"
  return f"Qformer.{name}" if name.startswith("cls.") else name


def _with_bias(short: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The words' bias by one name; the output matrix compared."""
  matrix = short.get(f"{_OUTPUT}.weight")
  words = short.get(WORDS)
  both = matrix is not None and words is not None
  if both and not np.array_equal(matrix, words):
    raise InputError(
      f"{_OUTPUT}.weight differs from {WORDS}; here the output matrix is the "
      "words' table"
    )
  if f"{_OUTPUT}.bias" in short:
    short.setdefault("cls.predictions.bias", short[f"{_OUTPUT}.bias"])
  return short


def _turned(path: str, value: np.ndarray) -> np.ndarray:
  """Public array -> ours, and back but for the queries."""
  if path == "queries":
    return value[0]
  return value.T if path.endswith("kernel") else value


def _joined(parts: dict[int, np.ndarray]) -> np.ndarray:
  values = [parts[i] for i in sorted(parts)]
  return values[0] if len(values) == 1 else np.concatenate(values, axis=-1)


def _check_parts(found: Mapping[str, Mapping[int, Any]]) -> None:
  """A layer that is one here has all of its parts."""
  for public, place in _TABLE.items():
    for path, parts in found.items():
      pattern, layer = _numbered(path)
      if pattern == place.house and place.part not in parts:
        name = public.replace("#", str(int(layer or 0)))
        raise InputError(f"the file has no {name!r}")


def _check_shape(
  name: str,
  value: np.ndarray,
  shape: str,
  sizes: dict[str, tuple[int, str]],
) -> None:
  """Compares with the sizes that earlier arrays gave, and adds new ones."""
  names = shape.split()
  if len(names) == value.ndim:
    for size, length in zip(names, value.shape, strict=True):
      if not size.isdigit():
        sizes.setdefault(size, (length, name))
  wanted = [size if size.isdigit() else sizes.get(size, (size,))[0]
            for size in names]  # fmt: skip
  if [str(x) for x in wanted] != [str(x) for x in value.shape]:
    told = {sizes[x][1] for x in names if x in sizes} - {name}
    origin = f" as {', '.join(sorted(told))} has it" if told else ""
    raise InputError(
      f"{name!r} has shape {value.shape}; expected "
      f"({', '.join(map(str, wanted))}){origin}"
    )


# --- Starting a model --------------------------------------------------------


def start(params: Params, source: Params) -> Loaded:
  """A query encoder with the values of a BERT, or of another query encoder.

  Args:
    params: initial parameters of `avjax.nn.bert.QueryEncoder`.
    source: of `to_house`.

  Returns:
    What the source lacks keeps its initial values: of a BERT cross-attention,
    queries, projections, and the head for words where the file has none. A
    query's own MLP starts from the text's (BLIP-2), [DEC] from N(0, 0.02) and
    a bias of 0. Of more positions or queries than wanted the first are taken.
    Keys and values of cross-attention on another encoder's width, and queries
    where there are fewer, keep their initial values.

  Raises:
    InputError: another number of blocks, or a shape that nothing changes.
  """
  blocks = [sorted(name for name in tree if name.startswith("block_"))
            for tree in (params, source)]  # fmt: skip
  if blocks[0] != blocks[1]:
    raise InputError(
      f"the source has {len(blocks[1])} blocks, the model {len(blocks[0])}"
    )
  rows = {
    "words/embedding": _add_word,
    "language/bias": _add_word,
    "positions": _first_rows,
    "queries": _first_rows,
  }
  return transfer.fill(
    params,
    source,
    lambda path: [path, path.replace("/mlp_query/", "/mlp/")],
    reshape=rows,
    optional=["queries", *(f"{name}/cross/kv/kernel" for name in blocks[0])],
  )


def _add_word(
  value: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, str] | None:
  """One row more: [DEC], the last word."""
  if (len(value) + 1, *value.shape[1:]) != tuple(shape):
    return None
  row = np.zeros((1, *shape[1:]), value.dtype)
  if value.ndim == 2:
    row[:] = np.random.default_rng(0).normal(0, 0.02, row.shape)
  words = f"{len(value)} -> {shape[0]} words, [DEC] new"
  return np.concatenate([value, row]), words


def _first_rows(
  value: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, str] | None:
  """The first of more rows than wanted."""
  if value.shape[1:] != tuple(shape[1:]) or len(value) < shape[0]:
    return None
  return value[: shape[0]], f"the first {shape[0]} of {len(value)} rows"
