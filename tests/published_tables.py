"""Annotations in their published formats, and a clip to go with them."""

import numpy as np

from avjax.data import demo_clip

RATE = 16_000
HEADER = (
  "# Segments csv created Sun Mar  5 10:54:31 2017\r\n"
  "# num_ytids=5, num_segs=5, num_unique_labels=527\r\n"
  "# YTID, start_seconds, end_seconds, positive_labels\r\n"
)

EPIC_HEADER = (
  "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,"
  "stop_timestamp,start_frame,stop_frame,narration,verb,verb_class,noun,"
  "noun_class,all_nouns,all_noun_classes\r\n"
)

EPIC = (
  "P01_11_0,P01,P01_11,00:00:00.560,00:00:00.00,00:00:01.89,1,113,take plate,"
  "take,0,plate,2,['plate'],[2]\r\n"
  "P01_11_1,P01,P01_11,,00:00:01.50,00:00:02.70,90,162,put paper in bin,put,"
  "1,paper,299,\"['paper', 'bin']\",\"[299, 18]\"\r\n"
  "P01_11_2,P01,P01_11,,00:00:09.00,00:00:09.90,1,2,late,take,0,tap,0,[],[]\r\n"
  "P02_01_0,P02,P02_01,00:00:00.560,00:00:00.00,00:00:02,1,2,open tap,open,96,"
  "tap,0,['tap'],[0]\r\n"
  "P02_102_3,P02,P02_102,0,00:00:00.25,00:00:01,1,2,sauté,open,3,tap,0,x,y\r\n"
  "P03_01_0,P03,P03_01,0,00:00:00.00,00:00:01,1,2,gone,open,3,tap,0,x,y\r\n"
  "P03_02_0,P03,P03_02,0,00:00:00.00,00:00:01,1,2,bad,open,3,tap,0,x,y\r\n"
)


def write(folder, files):
  """Writes files by path; texts as UTF-8."""
  for name, data in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
  return folder


def class_table(word, count):
  rows = [f"{k},{word}{k},\"['{word}{k}', 'x']\",y\n" for k in range(count)]
  return "id,key,instances,category\n" + "".join(rows)


def encode(seconds):
  """A grey clip that grows lighter, 25 pictures a second, with a tone."""
  count = round(25 * seconds)
  frames = np.zeros((count, 32, 48, 3), np.uint8)
  frames += np.linspace(0, 250, count).astype(np.uint8)[:, None, None, None]
  t = np.arange(round(seconds * RATE)) / RATE
  wave = (8_000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16)
  return demo_clip.encode(frames, wave)
