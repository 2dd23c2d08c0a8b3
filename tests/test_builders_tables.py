"""What is wrong in annotations and media folders is said."""

import pytest

from avjax.errors import InputError
from data_prep import (
  audioset,
  ave,
  builder,
  epic_kitchens,
  media_files,
  tables,
  vggsound,
)
from tests.published_tables import (
  EPIC,
  EPIC_HEADER,
  HEADER,
  class_table,
  encode,
  write,
)

# --- Malformed rows ---


def rows_of(kind, folder):
  options = builder.Options(media=folder, annotations=folder)
  made = kind(options=options, data_dir=folder, config="video")
  return made.rows()


@pytest.mark.parametrize(
  "kind, file, text, words",
  [
    (vggsound.VggSound, "vggsound.csv", "a,1,hail,train\na,2,hail\n",
     "vggsound.csv line 2: expected 4 fields .* found '3: a,2,hail'"),
    (vggsound.VggSound, "vggsound.csv", "a,one,hail,train\n",
     "line 1: expected a number >= 0 as start seconds, found 'one'"),
    (vggsound.VggSound, "vggsound.csv", "a,1,hale,train\n",
     "one of 309 names, such as 'hail', as label, found 'hale'"),
    (vggsound.VggSound, "vggsound.csv", "a,1,hail,valid\n",
     "expected one of train, test as split, found 'valid'"),
    (vggsound.VggSound, "train.csv", "a.mp4,hail\n",
     "expected VIDEO_START.mp4 as file, found 'a.mp4'"),
    (vggsound.VggSound, "other.csv", "",
     "expected a file or folder of vggsound.csv, train.csv, test.csv"),
    (audioset.AudioSet, "eval_segments.csv", HEADER + "a, 1, 2, /m/none\r\n",
     "line 4: expected ids of the 527 classes .* found '/m/none'"),
    (audioset.AudioSet, "eval_segments.csv", "a, 3, 2, /m/09x0r\n",
     "expected end_seconds > 3, found '2'"),
    (ave.Ave, "testSet.txt", "Flute&a&good&0&11\n",
     "expected StartTime <= EndTime <= 10, found '0 and 11'"),
    (ave.Ave, "testSet.txt", "Flute&a&good&0\n", "expected 5 fields"),
    (ave.Ave, "testSet.txt", "Flutes&a&good&0&1\n", "such as 'Flute',"),
    (epic_kitchens.EpicKitchens, "EPIC_100_train.csv",
     EPIC_HEADER + EPIC.replace("00:00:01.89", "1.89"),
     "train.csv line 2: expected HH:MM:SS.ff as stop_timestamp, found '1.89'"),
    (epic_kitchens.EpicKitchens, "EPIC_100_train.csv",
     EPIC_HEADER + EPIC.replace("00:00:00.00", "00:00:03.00"),
     "expected stop_timestamp after 00:00:03.00, found '00:00:01.89'"),
    (epic_kitchens.EpicKitchens, "EPIC_100_train.csv",
     EPIC_HEADER + EPIC.replace("open,96,", "open,97,"),
     "line 5: expected verb_class < 97, found '97'"),
    (epic_kitchens.EpicKitchens, "EPIC_100_train.csv",
     EPIC_HEADER.replace("verb_class", "verb_klass"),
     "line 1: expected a header with the columns verb_class"),
  ],
)  # fmt: skip
def test_malformed_rows_are_named(tmp_path, kind, file, text, words):
  write(
    tmp_path,
    {
      file: text,
      "EPIC_100_verb_classes.csv": class_table("v", 97),
      "EPIC_100_noun_classes.csv": class_table("n", 300),
    },
  )
  with pytest.raises(InputError, match=words):
    rows_of(kind, tmp_path)


def test_epic_classes_must_be_the_published_ones(tmp_path):
  write(
    tmp_path,
    {
      "verb_classes.csv": class_table("v", 96),
      "noun_classes.csv": class_table("n", 300),
    },
  )
  with pytest.raises(InputError, match="96 verb classes, not 97"):
    rows_of(epic_kitchens.EpicKitchens, tmp_path)


# --- Tables and media files ---


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_tables_in_any_encoding(tmp_path, encoding):
  path = tmp_path / "table.csv"
  path.write_bytes('a, b\r\n\r\nx, "é, ""y"""\r\n'.encode(encoding))
  (line,) = tables.read_csv(path, ("b",))
  assert line.fields == {"a": "x", "b": 'é, "y"'}
  assert line.number == 3
  with pytest.raises(InputError, match="cannot be read"):
    tables.read_text(tmp_path / "none.csv")


def test_media_files_are_found(tmp_path):
  for name in ("a.mp4", "x/a.wav", "train/c.mkv", "test/c.mp4", ".d.mp4",
               "e.02.wav", "notes.txt"):  # fmt: skip
    write(tmp_path, {name: ""})
  (tmp_path / "x" / "loop").symlink_to(tmp_path)
  files = media_files.index(tmp_path)
  assert set(files) == {"a", "c", "e.02"}
  assert media_files.find(files, ["a.mp4"]) == "a.mp4"
  assert media_files.find(files, ["a.wav"]) == "x/a.wav"
  assert media_files.find(files, ["b.mp4", "a.flac"]) == "a.mp4"
  assert media_files.find(files, ["train/c.mp4"]) == "train/c.mkv"
  assert media_files.find(files, ["e.02.mp4"]) == "e.02.wav"
  assert media_files.find(files, ["b.mp4", "in/a.mp4"]) == "b.mp4"
  with pytest.raises(InputError, match="is not a folder"):
    media_files.index(tmp_path / "none")


def test_whole_videos_are_told_from_excerpts(tmp_path):
  mp4 = encode(2.0)
  write(tmp_path, {"a.mp4": mp4, "b.mp4": mp4, "c.mp4": b"", "b_1.mp4": mp4})
  wanted = [
    media_files.Excerpt("a", 1.0, 1.5),
    media_files.Excerpt("b", 1.0, 1.5),
    media_files.Excerpt("c", 1.0, 1.5),
  ]
  assert media_files.locate(tmp_path, wanted) == [
    media_files.Part("a.mp4", 1.0, 1.5),
    media_files.Part("b_1.mp4", 0.0, 0.5),
    media_files.Part("c.mp4", 1.0, 1.5),
  ]
  longer = [media_files.Excerpt("a", 1.0, 3.0)]
  assert media_files.locate(tmp_path, longer)[0].start == 0.0
  # It is the excerpt of one of them, but of which?
  both = [*longer, media_files.Excerpt("a", 5.0, 7.0)]
  assert [part.file for part in media_files.locate(tmp_path, both)] == [
    "a_000001.mp4",
    "a_000005.mp4",
  ]
  assert media_files.locate(tmp_path, longer * 2)[1].file == "a.mp4"
