"""Draws docs/av_demo.png, the contact sheet of the built-in data set.

`python docs/make_av_demo.py [--seed=0] [--out=docs/av_demo.png]` writes a few
clips of each class into a temporary folder, reads the files back and shows, for
each class, three frames and the spectrogram of a clip in which it is alone.
"""

import argparse
import json
import pathlib
import tempfile

import av
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from scipy import signal

from avjax.data import demo

COLUMNS = 4


def read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Frames [t, h, w, 3] and samples [s] of a file."""
  with av.open(path) as container:
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  with av.open(path) as container:
    parts = [f.to_ndarray()[0] for f in container.decode(audio=0)]
  return np.stack(frames), np.concatenate(parts)


def choose(records: list[dict]) -> dict[str, dict]:
  """For each class the clip with the fewest other things and least noise."""

  def clutter(record):
    others = len(record["sounds"]) + len({o["name"] for o in record["objects"]})
    snr = 30 if record["snr"] is None else record["snr"]
    start, end = record["event"]
    return (others, -(end - start), -snr)

  best = {}
  for record in sorted(records, key=clutter):
    best.setdefault(record["label"], record)
  return best


def unlike(frames: np.ndarray, start: float, end: float) -> list[int]:
  """Three frames of an event that differ much, in order of time."""
  first, last = round(25 * start), round(25 * end)
  small = frames[first:last, ::4, ::4].reshape(last - first, -1) / 255
  chosen = [1]
  for _ in range(2):
    gaps = [np.abs(small - small[k]).mean(1) for k in chosen]
    chosen.append(int(np.argmax(np.min(gaps, 0))))
  return [first + k for k in sorted(chosen)]


def show(axes, record: dict, path: pathlib.Path) -> None:
  """Three frames and a spectrogram in a row."""
  frames, samples = read(path)
  start, end = record["event"]
  for axis, k in zip(axes[:3], unlike(frames, start, end), strict=True):
    axis.imshow(frames[k])
    axis.set_xticks([])
    axis.set_yticks([])
  axes[0].set_title(
    f"{record['label']} ({record['verb']})", loc="left", fontsize=9
  )
  _, _, power = signal.spectrogram(
    samples, 16_000, nperseg=512, noverlap=352, scaling="spectrum"
  )
  axes[3].imshow(
    10 * np.log10(power + 1e-9), origin="lower", aspect="auto", cmap="magma",
    extent=(0, 3, 0, 8), vmin=-85, vmax=-25,
  )  # fmt: skip
  axes[3].tick_params(labelsize=6)
  axes[3].set_title(record["group"], loc="right", fontsize=7)


def main() -> None:
  """Writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--out", default=pathlib.Path(__file__).with_name("av_demo.png")
  )
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    annotations = demo.write_media(
      pathlib.Path(folder), clips_per_class=8, test_per_class=0, seed=args.seed
    )
    records = [json.loads(x) for x in annotations.read_text().splitlines()]
    best = choose(records)
    rows = -(-len(demo.CLASSES) // COLUMNS)
    figure, axes = plt.subplots(
      rows, 4 * COLUMNS, figsize=(24, 1.75 * rows), layout="constrained",
      width_ratios=[1, 1, 1, 1.7] * COLUMNS,
    )  # fmt: skip
    for k, name in enumerate(demo.CLASSES):
      row, column = divmod(k, COLUMNS)
      record = best[name]
      path = annotations.parent / record["file"]
      show(axes[row, 4 * column : 4 * column + 4], record, path)
    figure.suptitle(
      "av_demo: one clip of each class; spectrograms 0-3 s, 0-8 kHz. Of four "
      "classes in a row two look alike, two sound alike."
    )
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
  main()
