"""Markdown of the page of speed, made from its record alone."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from avjax import memory

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _number(key: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
  """Of a row; '' where it is 0 or not there."""

  def cell(row: Row) -> str:
    return format(row[key] * factor, form) if row.get(key) else ""

  return cell


def _bytes(key: str) -> Callable[[Row], str]:
  return lambda row: memory.in_words(row[key]) if row.get(key) else ""


def _memory(row: Row) -> str:
  held, temporary = row["held_bytes"], row["temporary_bytes"]
  if not held:
    return "not known"
  parts = f"{memory.in_words(held)} + {memory.in_words(temporary)}"
  return f"{memory.in_words(held + temporary)} ({parts})"


def _counted(row: Row) -> str:
  return f"{row['batch']} ({row['repeats']})"


STEPS: tuple[Column, ...] = (
  ("step", lambda row: f"{row['title']} (`{row['name']}`)"),
  ("batch (repeats)", _counted),
  ("clips/s", _number("clips_per_s", ".3g")),
  ("GFLOP/clip", _number("flops_per_clip", ".4g", 1e-9)),
  ("GFLOP/s", _number("flops_per_s", ".1f", 1e-9)),
  ("share of peak", _number("share_of_peak", ".0%")),
  ("MFU", _number("mfu", ".1%")),
  ("memory (held + temporary)", _memory),
  ("measured memory", _bytes("measured_bytes")),
  ("compiled in s", _number("compile_s", ".0f")),
)
PIPELINE: tuple[Column, ...] = (
  ("what", lambda row: f"{row['title']} (`{row['name']}`)"),
  ("clips/s/core", _number("clips_per_s", ".0f")),
  ("ms/clip", _number("ms_per_clip", ".2f")),
  ("of a clip", lambda row: row["read"]),
  ("KB/picture", _number("jpeg_kb", ".0f")),
  ("KB/record", _number("record_kb", ".0f")),
)
TOGETHER: tuple[Column, ...] = (
  ("what", lambda row: f"{row['title']} (`{row['name']}`)"),
  ("batch (repeats)", _counted),
  ("step alone in s", _number("step_s", ".3g")),
  ("fed by the pipeline in s", _number("fed_step_s", ".3g")),
  ("alone / fed", _number("step_to_both", ".3f")),
)
OPTIONS: tuple[Column, ...] = (
  ("option", lambda row: f"`{row['name']}`"),
  ("step in s", _number("step_s", ".3g")),
  ("time", _number("time", ".2f")),
  ("memory (held + temporary)", _memory),
  ("temporary", _number("temporary", ".2f")),
  ("measured memory", _bytes("measured_bytes")),
  ("compiled in s", _number("compile_s", ".0f")),
)
# Kind of row -> heading, columns, and what the rows of a table have in common
# beside the place.
KINDS: dict[str, tuple[str, tuple[Column, ...], tuple[str, ...]]] = {
  "steps": ("Training steps, {dtype}", STEPS, ("dtype",)),
  "pipeline": ("The pipeline", PIPELINE, ()),
  "mel": ("Log-mel", PIPELINE[:4], ()),
  "together": ("End to end, {dtype}", TOGETHER, ("dtype",)),
  "options": ("Options of {of}, batch {asked}", OPTIONS, ("of", "asked")),
}
PLACE = ("backend", "device", "devices", "pinned", "host")
# Where a row has none of them, the column is left out.
OPTIONAL = ("MFU", "measured memory", "KB/picture", "KB/record")


def tables(rows: Sequence[Row]) -> str:
  """All tables of a record, one for each kind, place and precision."""
  found = []
  for kind, (heading, columns, common) in KINDS.items():
    own = [row for row in rows if row["kind"] == kind]

    def together(row: Row, keys=(*PLACE, *common)) -> tuple[str, ...]:
      return tuple(str(row.get(key)) for key in keys)

    own.sort(key=together)
    for _, part in itertools.groupby(own, together):
      group = list(part)
      if kind == "options":
        group = relative(group)
      title = f"{heading.format(**group[0])}, on {place(group)}"
      found.append(table(group, title, columns))
  return "\n\n".join(found)


def relative(rows: Sequence[Row]) -> list[Row]:
  """The rows with `time` and `temporary` as ratios to `plain`'s."""
  plain = next(
    (r for r in rows if r["name"] == "plain" and "failed" not in r), None
  )
  if plain is None:
    return list(rows)
  return [
    row
    if "failed" in row
    else {
      **row,
      "time": row["step_s"] / plain["step_s"],
      "temporary": row["temporary_bytes"] / max(plain["temporary_bytes"], 1),
    }
    for row in rows
  ]


def place(rows: Sequence[Row]) -> str:
  """What rows were measured on, when and how, in words."""
  row = rows[0]
  host = row["kind"] in ("pipeline", "mel")
  words = [
    f"one pinned core of {row['device']}"
    if row["pinned"]
    else f"{row['devices']} x {row['device']}"
  ]
  if row.get("host"):
    words.append(f"host {row['host']}")
  cpu = row["backend"] == "cpu"
  if cpu or host:
    words.append("per CPU second")
  if row["kind"] != "pipeline":
    # The options' table has no column of them.
    count = {r["repeats"] for r in rows if "repeats" in r}
    one = row["kind"] == "options" and len(count) == 1
    of = f"{max(count)}" if one else "the"
    words.append(f"{'least' if cpu else 'median'} of {of} repeats")
  peaks = [r["peak_flops_per_s"] for r in rows if "peak_flops_per_s" in r]
  if peaks:
    low, high = (f"{x / 1e9:.1f}" for x in (min(peaks), max(peaks)))
    span = " to ".join(dict.fromkeys((low, high)))
    words.append(f"matrix-product peak {span} GFLOP/s")
  figures = {r["vendor_peak"] for r in rows if r.get("mfu")}
  if figures:
    words.append(
      f"MFU of the vendor's dense {max(figures) / 1e12:.0f} TFLOP/s, of three "
      "times the forward pass"
    )
  dates = sorted({r["date"] for r in rows})
  words.append(f"jax {row['jax']}")
  words.append(" to ".join(dict.fromkeys((dates[0], dates[-1]))))
  return ", ".join(words)


def table(rows: Sequence[Row], title: str, columns: Sequence[Column]) -> str:
  """Markdown of one table; a row that failed says why."""
  fine = [row for row in rows if "failed" not in row]
  cells = {
    name: [cell(row) for row in fine]
    for name, cell in columns
  }  # fmt: skip
  shown = [n for n, c in cells.items() if n not in OPTIONAL or any(c)]
  lines = [title, "", f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
  lines += [
    f"| {' | '.join(cells[name][number] for name in shown)} |"
    for number in range(len(fine))
  ]
  for row in rows:
    if "failed" in row:
      rest = [""] * (len(shown) - 2)
      words = [f"`{row['name']}`", f"failed: {row['failed']}", *rest]
      lines.append(f"| {' | '.join(words)} |")
  return "\n".join(lines)
