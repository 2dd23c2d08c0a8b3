"""Sizes of the standard vision transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from avjax.errors import InputError, lookup


@dataclasses.dataclass(frozen=True)
class Size:
  """Shape of a stack of blocks.

  Attributes:
    width: of the tokens.
    depth: number of blocks.
    heads: of the attention; `width / heads` is the head dimension.
    mlp: width of the hidden layer of the MLP.
  """

  width: int
  depth: int
  heads: int
  mlp: int


# ViT (arXiv:2010.11929, table 1); Ti and S from DeiT. H has patches of 14.
SIZES = {
  "Ti": Size(192, 12, 3, 768),
  "S": Size(384, 12, 6, 1536),
  "B": Size(768, 12, 12, 3072),
  "L": Size(1024, 24, 16, 4096),
  "H": Size(1280, 32, 16, 5120),
}


def resolve(
  section: Mapping[str, Any] | Any,
  prefix: str = "",
  table: Mapping[str, Size] = SIZES,
) -> Size:
  """The size that `section.size` names, with the section's own numbers.

  Args:
    section: a config section with `size` and, each 0 for the size's own value,
      `<prefix>width`, `<prefix>depth`, `<prefix>heads`, `<prefix>mlp`.
    prefix: such as 'decoder_'.
    table: sizes by name.

  Raises:
    InputError: unknown size, or a width that the heads do not divide.
  """
  named = lookup(table, section["size"], "model size")
  numbers = {
    field.name: section[prefix + field.name] or getattr(named, field.name)
    for field in dataclasses.fields(Size)
  }
  size = Size(**numbers)
  if size.width % size.heads:
    raise InputError(
      f"model.{prefix}width {size.width} is not divisible by "
      f"model.{prefix}heads {size.heads}"
    )
  return size
