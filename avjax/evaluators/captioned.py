"""What evaluators of clips with captions share: modes, inputs and rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from avjax import parallel
from avjax.data import augment, text
from avjax.errors import InputError, lookup
from avjax.evaluators.base import Context
from avjax.evaluators.shown import Shown
from avjax.methods.base import Params

# Mode -> the modalities that its inputs have.
MODES = {"a": ("audio",), "v": ("video",), "av": ("audio", "video")}

# (parameters, device batch) -> rows of its clips, `facts` among them.
Step = Callable[[Params, Mapping[str, jax.Array]], dict[str, jax.Array]]


class Captioned(Shown):
  """Sees clips in some of the method's modes, beside their captions.

  Args:
    context: see `Evaluator`.
    section: see `Evaluator`.
    needed: what the method must have.
    modes: those that are evaluated; () = all that the data allow.

  Attributes:
    tokenizer: of the data.
    modes: those that are evaluated.
  """

  def __init__(
    self,
    context: Context,
    section: Any,
    *,
    needed: Sequence[str],
    modes: Sequence[str],
  ):
    super().__init__(context, section)
    method, data = context.method, context.config.data
    check(method, section, needed)
    self.tokenizer = text.tokenizer(data)
    self.modes = chosen_modes(method, data.modality, modes)

  def facts(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Which clips of a batch count, and their captions; see `gather`.

    Returns:
      `counted` [b], false = padding; `has` [b], all modalities of all modes;
      `number` [b] in the split; `ids` and `mask` [b c l] of the captions.
    """
    ones = jnp.ones(batch["index"].shape[0], bool)
    has = ones
    for m in sorted({m for mode in self.modes for m in MODES[mode]}):
      has &= batch.get(f"has_{m}", ones)
    return {
      "counted": batch.get("valid", ones),
      "has": has,
      "number": batch["index"],
      "ids": batch["text"],
      "mask": batch["text_mask"],
    }

  def gather(
    self,
    step: Step,
    params: Params,
    chosen: Bool[np.ndarray, "n"] | None = None,
  ) -> tuple[dict[str, np.ndarray], int]:
    """Host rows of the clips that have a caption and what all modes see.

    Args:
      step: its rows hold those of `facts`.
      params: of the method.
      chosen: which clips of the split count; None = all.

    Returns:
      The rows, without `counted` and `has`; and how many clips were left out.

    Raises:
      InputError: there is no such clip.
    """
    parts, left_out = [], 0
    for batch, _ in self.context.batches(self.section):
      part = dict(parallel.to_host(step(params, batch)))
      part["number"] = part["number"].astype(np.int64)
      counted = part.pop("counted")
      if chosen is not None:
        counted = counted & chosen[np.minimum(part["number"], len(chosen) - 1)]
      kept = counted & part.pop("has") & part["mask"].any(axis=(1, 2))
      left_out += int((counted & ~kept).sum())
      parts.append({name: x[kept] for name, x in part.items()})
    joined = {
      name: np.concatenate([part[name] for part in parts])
      for name in (parts[0] if parts else {})
    }
    if not len(joined.get("number", ())):
      raise InputError(
        f"split {self.section.split!r}: no clip has a caption and the "
        f"modalities of {', '.join(self.modes)}; {left_out} were left out"
      )
    return joined, left_out

  def encode_media(
    self, params: Params, batch: Mapping[str, jax.Array]
  ) -> dict[str, dict[str, jax.Array]]:
    """Mode -> what the method makes of the clips of a batch in it."""
    media = {k: v for k, v in batch.items() if not k.startswith("text")}
    inputs = self.context.prepare(media, jax.random.key(0), False)
    encode = self.context.method.encode_media
    return {m: encode(params, only(inputs, m), m) for m in self.modes}


def check(method: Any, section: Any, needed: Sequence[str]) -> None:
  """Refuses a method or a section that has nothing to do with captions.

  Raises:
    InputError: names what is missing.
  """
  missing = [name for name in needed if not hasattr(method, name)]
  if missing:
    raise InputError(
      f"method {type(method).__name__} has no {', '.join(missing)} for evals "
      f"of type {section.type!r}"
    )
  if section.get("captions", 0) < 1:
    raise InputError(
      f"evals of type {section.type!r} need captions of at least 1; it is "
      f"{section.get('captions', 0)}"
    )
  if section.views != 1:
    raise InputError(
      f"evals of type {section.type!r} look at the middle of a clip: views is "
      f"{section.views}, not 1"
    )


def chosen_modes(
  method: Any, modality: str, names: Sequence[str]
) -> tuple[str, ...]:
  """The modes that are evaluated.

  Args:
    method: with its `retrieval_modes`.
    modality: of the data.
    names: those asked for; () = all that the data allow.

  Raises:
    InputError: the method has no such mode, or the data lack a track of it.
  """
  known = {mode: MODES[mode] for mode in method.retrieval_modes}
  for name in names:
    lookup(known, name, "mode of retrieval")
    if not set(name) <= set(modality):
      raise InputError(
        f"mode {name!r} of retrieval needs data.modality={name!r} or 'av'; it "
        f"is {modality!r}"
      )
  found = names or [mode for mode in known if set(mode) <= set(modality)]
  if not found:
    raise InputError(
      f"data.modality={modality!r} fits none of the modes of retrieval: "
      f"{', '.join(known)}"
    )
  return tuple(found)


def only(inputs: Mapping[str, jax.Array], mode: str) -> dict[str, jax.Array]:
  """Inputs without the modalities that a mode does not see."""
  hidden = [
    name
    for modality, names in augment.MIXED.items()
    if modality not in MODES[mode]
    for name in names
  ]
  return {k: v for k, v in inputs.items() if k not in hidden}
