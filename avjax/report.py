"""report.md: scores, skipped clips, pictures and the command of a run."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from avjax.errors import InputError
from avjax.workdir import Workdir


def in_words(values: Mapping[str, float]) -> str:
  """'loss 0.123, top1 0.45'."""
  return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def duration(seconds: float) -> str:
  """'1 h 02 min', '3 min 05 s' or '12 s'."""
  seconds = int(min(seconds, 10**9))
  if seconds >= 3600:
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
  if seconds >= 60:
    return f"{seconds // 60} min {seconds % 60:02d} s"
  return f"{seconds} s"


def write(
  run: Workdir,
  config: Any,
  scores: Mapping[str, float],
  skipped: Mapping[str, int],
  left_out: Mapping[str, Sequence[str]] | None = None,
) -> None:
  """Writes report.md of one stage.

  Args:
    run: its folder.
    config: of the stage.
    scores: of its evaluations.
    skipped: id -> how often training could not read it.
    left_out: ids by split that evaluations could not read.
  """
  lines = [f"# {run.root.name}", "", f"Method {config.method}.", ""]
  lines += ["| score | value |", "|---|---|"]
  lines += [f"| {name} | {value:.4f} |" for name, value in scores.items()]
  for path in sorted(run.tables.glob("*.md")):
    lines += ["", path.read_text().strip()]
  lines += ["", *skipped_lines(skipped), ""]
  for split, names in sorted((left_out or {}).items()):
    lines += [f"Left out of the scores on {split}: {len(names)}.", ""]
    lines += [*(f"- `{name}`" for name in names), ""]
  lines += ["Pictures:", ""]
  pictures = sorted(run.pictures.glob("*.png"))
  lines += [f"![{p.stem}](pictures/{p.name})" for p in pictures] or ["none"]
  lines += ["", "Command:", "", f"    {command_line()}", ""]
  run.report.write_text("\n".join(lines))


def skipped_lines(skipped: Mapping[str, int]) -> list[str]:
  """How many clips could not be read, and which."""
  if not skipped:
    return ["Skipped clips: none."]
  return [
    f"Skipped clips: {len(skipped)}.",
    "",
    *(f"- `{name}`: {times}" for name, times in sorted(skipped.items())),
  ]


def final_scores(run: Workdir) -> dict[str, float]:
  """Of a stage that is finished.

  Raises:
    InputError: done.json cannot be read.
  """
  try:
    return json.loads(run.done.read_text())["scores"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{run.done} cannot be read ({error}); without it the same command goes "
      "on from the last checkpoint"
    ) from error


def write_staged(run: Workdir, stages: Sequence[str]) -> None:
  """Writes and prints the scores of a whole staged run."""
  lines = [
    f"# {run.root.name}",
    "",
    "| stage | score | value |",
    "|---|---|---|",
  ]
  for name in stages:
    found = final_scores(run.stage(name))
    lines += [f"| {name} | {key} | {v:.4f} |" for key, v in found.items()]
  lines += [""] + [f"- [{name}]({name}/report.md)" for name in stages]
  lines += ["", "Command:", "", f"    {command_line()}", ""]
  run.report.write_text("\n".join(lines))
  print("\n".join(lines[2 : lines.index("", 3)]))
  for name in stages:
    folder = run.stage(name).pictures
    if folder.exists():
      print(f"pictures of {name}: {folder}")
  print(f"report: {run.report}", flush=True)


def command_line() -> str:
  """The command that runs now, quoted for a shell."""
  return shlex.join(["python", *sys.argv])
