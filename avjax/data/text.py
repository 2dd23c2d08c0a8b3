"""Captions as token ids: WordPiece over a vocabulary that lies on disk.

Ids of one text: [CLS] pieces [SEP], cut on the right so that [SEP] stays, then
[PAD] up to the length. [DEC], which a text decoder starts with (BLIP-2, CoAVT),
is the last id: where the vocabulary lacks it, it is added, so that of
bert-base-uncased's 30,522 pieces there are 30,523. Names of special tokens in
a text, such as '[SEP]', are words like others.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int, Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers

from avjax.errors import InputError, unknown

# The vocabularies that are part of avjax: <name>.txt.
FOLDER = pathlib.Path(__file__).parent / "vocabulary"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
DEC = "[DEC]"
LEAST = 3  # tokens of a text: [CLS], one piece, [SEP]
LONGEST_WORD = 100  # characters, BERT's; what is longer is [UNK]


class Tokenizer:
  """Texts to ids and back; may go to other processes.

  Args:
    vocabulary: 'av_demo'; or a file: vocab.txt, BERT's form with a piece in
      each line, whose number is the line's from 0; or a tokenizer.json of the
      library `tokenizers`.
    lower: of a vocab.txt: lower case, without accents, as BERT's uncased
      models want it. A tokenizer.json brings its own rule.

  Attributes:
    size: ids, [DEC] among them.
    pad, unk, cls, sep, dec: ids of the special tokens.

  Raises:
    InputError: there is no such file, or it is none of the two, lacks a special
      token or has one piece twice.
  """

  def __init__(self, vocabulary: str, *, lower: bool = True):
    path = find(vocabulary)
    made = (
      _from_json(path) if path.suffix == ".json" else _wordpiece(path, lower)
    )
    self.vocabulary = vocabulary
    self._model = made
    self._tokens = _by_number(made, path)
    self.size = len(self._tokens)
    number = {token: k for k, token in enumerate(self._tokens)}
    missing = [name for name in SPECIAL if name not in number]
    if missing:
      raise InputError(
        f"{path} has no {', '.join(missing)}; a vocabulary of BERT's form has "
        f"{', '.join(SPECIAL)}"
      )
    self.pad, self.unk, self.cls, self.sep, self.dec = (
      number[name] for name in (*SPECIAL, DEC)
    )
    self._silent = {self.pad, self.cls, self.dec}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._model.encode_special_tokens = True  # is not kept

  def ids(self, text: str, length: int) -> Int32[np.ndarray, "_"]:
    """Ids of one text without padding: [CLS] … [SEP], `length` at most."""
    pieces = self._model.encode(text, add_special_tokens=False).ids
    return np.array([self.cls, *pieces[: length - 2], self.sep], np.int32)

  def encode(
    self, texts: Sequence[str], length: int
  ) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
    """Ids and mask of several texts.

    Args:
      texts: n of them.
      length: l, of which [CLS] and [SEP] are two.

    Returns:
      Ids, [PAD] where a text has ended; the mask, true = a token.

    Raises:
      InputError: the length leaves no room for a piece.
    """
    check_length(length)
    ids = np.full((len(texts), length), self.pad, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
      found = self.ids(text, length)
      ids[row, : len(found)], mask[row, : len(found)] = found, True
    return ids, mask

  def decode(self, ids: Int[np.ndarray, "l"] | Sequence[int]) -> str:
    """The text up to the first [SEP]; [PAD], [CLS] and [DEC] are passed over.

    Raises:
      InputError: an id is not in the vocabulary.
    """
    kept = []
    for number in map(int, ids):
      if number == self.sep:
        break
      if not 0 <= number < self.size:
        raise InputError(
          f"token {number} is not in 0..{self.size - 1}, the vocabulary "
          f"{self.vocabulary!r}"
        )
      if number not in self._silent:
        kept.append(number)
    return self._model.decode(kept, skip_special_tokens=False)

  def pieces(self, text: str) -> list[str]:
    """The pieces of a text, without special tokens and uncut."""
    return self._model.encode(text, add_special_tokens=False).tokens


def find(vocabulary: str) -> pathlib.Path:
  """The file of a vocabulary; see `Tokenizer`.

  Raises:
    InputError: there is none.
  """
  own = {path.stem: path for path in FOLDER.glob("*.txt")}
  if vocabulary in own:
    return own[vocabulary]
  path = pathlib.Path(vocabulary).expanduser()
  if path.is_file():
    return path
  if path.suffix in (".txt", ".json") or os.sep in vocabulary:
    raise InputError(
      f"data.text.vocabulary: {path} is not there; expected BERT's vocab.txt, "
      f"a tokenizer.json or one of {', '.join(sorted(own))}"
    )
  raise unknown("data.text.vocabulary", vocabulary, own)


def _wordpiece(path: pathlib.Path, lower: bool) -> tokenizers.Tokenizer:
  lines = _text(path).split("\n")
  while lines and not lines[-1].strip():
    del lines[-1]
  tokens = [line.rstrip("\r") for line in lines]
  if DEC not in tokens:
    tokens.append(DEC)
  number = {token: k for k, token in enumerate(tokens)}
  if len(number) < len(tokens):
    again = next(t for k, t in enumerate(tokens) if number[t] != k)
    raise InputError(f"{path} holds the piece {again!r} twice")
  made = tokenizers.Tokenizer(
    models.WordPiece(
      number, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD
    )
  )
  made.normalizer = normalizers.BertNormalizer(
    clean_text=True, handle_chinese_chars=True, lowercase=lower
  )
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece(prefix="##", cleanup=True)
  return made


def _from_json(path: pathlib.Path) -> tokenizers.Tokenizer:
  text = _text(path)
  try:
    made = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library's own have no narrower class
    raise InputError(f"{path} is no tokenizer.json: {error}") from error
  made.no_padding()
  made.no_truncation()
  if made.token_to_id(DEC) is None:
    made.add_special_tokens([DEC])
  made.encode_special_tokens = True
  return made


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path} cannot be read: {error}") from error


def _by_number(
  made: tokenizers.Tokenizer, path: pathlib.Path
) -> tuple[str, ...]:
  pairs = made.get_vocab(with_added_tokens=True)
  tokens = sorted(pairs, key=pairs.__getitem__)
  highest = pairs[tokens[-1]] if tokens else -1
  if highest != len(tokens) - 1:
    raise InputError(
      f"{path} holds {len(tokens)} tokens; their highest id is {highest}"
    )
  return tuple(tokens)


# ------------------------------------------------------------------ configs


def check_length(length: int) -> None:
  """Refuses a length that leaves no room for a piece.

  Raises:
    InputError: names both numbers.
  """
  if length < LEAST:
    raise InputError(
      f"data.text.length is {length}; at least {LEAST} are needed"
    )


def tokenizer(data: Any) -> Tokenizer:
  """The tokenizer of `config.data`, read once.

  Raises:
    InputError: `data.text.vocabulary` is empty; see `Tokenizer`.
  """
  section = data["text"]
  if not section["vocabulary"]:
    raise InputError(
      "data.text.vocabulary is empty, so there is no text; name BERT's "
      "vocab.txt, a tokenizer.json or 'av_demo'"
    )
  return _tokenizer(section["vocabulary"], section["lower"])


@functools.lru_cache(maxsize=8)
def _tokenizer(vocabulary: str, lower: bool) -> Tokenizer:
  return Tokenizer(vocabulary, lower=lower)


def size(config: Any) -> int:
  """Ids of a config's tokenizer, for `config.model.vocabulary`.

  Raises:
    InputError: see `tokenizer`.
  """
  return tokenizer(config["data"]).size


def check(config: Any) -> None:
  """Compares the model's vocabulary with the tokenizer's.

  Raises:
    InputError: `config.model.vocabulary` is another size; see `tokenizer`.
  """
  if not config["data"]["text"]["vocabulary"]:
    return
  found, wanted = size(config), config["model"].get("vocabulary", 0)
  if wanted and wanted != found:
    raise InputError(
      f"config.model.vocabulary is {wanted}; the vocabulary "
      f"{config['data']['text']['vocabulary']!r} has {found} tokens with {DEC}"
    )
