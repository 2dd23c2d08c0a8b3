"""The batch: a flat dict with fixed keys, and the inputs that methods see.

Two forms exist. The *batch* is what the pipeline makes on the host: bytes and
small integers. The *inputs* are what `avjax.data.augment.prepare` makes of a
batch on the device, inside the jitted step: floating point, normalised and
augmented. Methods see inputs only, so a test can hand them exact numbers.

A missing modality is stated by `has_audio`/`has_video`, never by zeros alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from avjax.errors import InputError, unknown

MODALITIES = ("audio", "video")


@dataclasses.dataclass(frozen=True)
class Key:
  """Shape (dimension letters of the house), dtype and meaning of one entry."""

  shape: str
  dtype: str
  meaning: str


# Host -> device. An evaluation batch with several temporal views has a `v`
# dimension after `b` in `frames` and `waveform`; evaluators fold it into `b`.
# One with several captions has a `c` dimension after `b` in `text` and
# `text_mask`; a text whose mask is all false is none.
BATCH = {
  "frames": Key("b t h w 3", "uint8", "RGB, 0..255"),
  "waveform": Key("b s", "int16", "mono PCM at data.audio.rate"),
  "samples": Key("b", "int32", "length of waveform without its padding"),
  "fbank": Key("b t f", "float32", "precomputed log-mel only"),
  "features/audio": Key("b n d", "float32", "frozen features (UAVM)"),
  "features/video": Key("b n d", "float32", "frozen features (UAVM)"),
  "text": Key("b l", "int32", "token ids"),
  "text_mask": Key("b l", "bool", "true = a token, false = padding"),
  "label": Key("b k", "float32", "one-hot or multi-hot"),
  "label/verb": Key("b k", "float32", "one-hot"),
  "label/noun": Key("b k", "float32", "one-hot"),
  "label/segment": Key("b t k", "float32", "one-hot per second (AVE)"),
  "objects/audio": Key("b k", "float16", "object scores from sound"),
  "objects/video": Key("b k", "float16", "object scores from frames"),
  "has_audio": Key("b", "bool", "the clip has a sound track"),
  "has_video": Key("b", "bool", "the clip has a picture track"),
  "valid": Key("b", "bool", "false = padding of a last batch"),
  "index": Key(
    "b", "uint32", "number of the example in the whole run or split"
  ),
  "noise/audio": Key("b n", "float32", "masking noise, else it is drawn"),
  "noise/video": Key("b n", "float32", "masking noise, else it is drawn"),
}

# Entries that `prepare` replaces or adds.
INPUTS = {
  **{k: v for k, v in BATCH.items() if k not in ("waveform", "samples")},
  "frames": Key("b t h w 3", "float32", "normalised RGB, see prepare"),
  "fbank": Key("b t f", "float32", "normalised log-mel, time first"),
  "mix/audio": Key("b", "float32", "mixup weight of the example itself"),
  "mix/video": Key("b", "float32", "mixup weight of the example itself"),
}

# Keys that may have one dimension more, after `b`.
WIDENED = ("frames", "waveform", "text", "text_mask")

# Stays on the host: a list of str, beside the arrays, for reports.
HOST_ONLY = ("id",)


def check(batch: Mapping[str, Any], keys: Mapping[str, Key] = BATCH) -> None:
  """Verifies names, ranks, dtypes and equal batch sizes.

  Args:
    batch: arrays by key (numpy or jax).
    keys: BATCH for host batches, INPUTS for prepared ones.

  Raises:
    InputError: names the key and both the expected and the found value.
  """
  size = None
  for name, value in batch.items():
    if name in HOST_ONLY:
      continue
    if name not in keys:
      raise unknown("batch key", name, keys)
    spec = keys[name]
    rank = len(spec.shape.split())
    ranks = {rank, rank + 1} if name in WIDENED else {rank}
    if value.ndim not in ranks:
      raise InputError(
        f"batch[{name!r}] has shape {value.shape}; expected [{spec.shape}]"
      )
    if np.dtype(value.dtype) != np.dtype(spec.dtype):
      raise InputError(
        f"batch[{name!r}] is {value.dtype}; expected {spec.dtype}"
      )
    size = value.shape[0] if size is None else size
    if value.shape[0] != size:
      raise InputError(
        f"batch[{name!r}] holds {value.shape[0]} examples, others {size}"
      )


def arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
  """The entries that go to the device."""
  return {k: v for k, v in batch.items() if k not in HOST_ONLY}
