"""One error for whatever a user got wrong, and look-ups that raise it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
  """Bad input: the message names the file or key and what was expected.

  The command-line programs print the message alone, without a traceback, and
  exit with status 2.
  """


class SaveError(OSError):
  """A checkpoint could not be written; the earlier ones are intact."""


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
  """The error for a name that is not in a list: says the nearest known one."""
  known = sorted(known)
  near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  return InputError(
    f"unknown {what} {name!r}.{hint} Known: {', '.join(known) or 'none'}."
  )


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
  """`table[name]`.

  Raises:
    InputError: the name is not in the table; the nearest and all are listed.
  """
  if name not in table:
    raise unknown(what, name, table)
  return table[name]
