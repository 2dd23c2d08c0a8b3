"""av_demo: tables, plans, files, and that sound and picture agree."""

import collections
import dataclasses
import io
import json
import re

import av
import numpy as np
import pytest

from avjax.data import (
  datasets,
  demo,
  demo_clip,
  demo_draw,
  demo_scene,
  demo_sound,
  demo_text,
)
from avjax.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """One training clip of each class, made in this process."""
  path = tmp_path_factory.mktemp("av_demo")
  demo.write_media(
    path, clips_per_class=1, test_per_class=0, seed=3, processes=1,
    progress=False,
  )  # fmt: skip
  return path


def records_of(folder):
  text = (folder / "annotations.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def again(folder, **changes):
  sizes = {"clips_per_class": 1, "test_per_class": 0, "seed": 3, **changes}
  return demo.write_media(folder, processes=1, progress=False, **sizes)


def stamps(folder):
  return {p.name: p.stat().st_mtime_ns for p in (folder / "media").iterdir()}


def read(file):
  """Frames [t, h, w, 3] and samples [s] of an MP4 file."""
  with av.open(file) as container:
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  if isinstance(file, io.BytesIO):
    file.seek(0)
  with av.open(file) as container:
    stream = container.streams.audio[0]
    assert (stream.rate, stream.layout.name) == (16_000, "mono")
    parts = [f.to_ndarray()[0] for f in container.decode(stream)]
  return np.stack(frames), np.concatenate(parts)


# --- Tables.


def test_tables_have_the_sizes_of_the_heads():
  heads = datasets.DATASETS["av_demo"].heads
  assert len(demo.CLASSES) == len(set(demo.CLASSES)) == heads["label"] == 24
  assert len(demo.NOUNS) == heads["noun"]
  assert len(demo.VERBS) == heads["verb"]
  assert heads["segment"] == len(demo.CLASSES) + 1
  assert datasets.DATASETS["av_demo"].seconds == demo_clip.SECONDS


def test_class_numbers_are_pinned():
  assert demo.CLASSES[:4] == ("violin", "guitar", "flute", "organ")
  assert demo.CLASSES[-2:] == ("tree", "sea")
  assert demo.VERBS[0] == "swings"


def test_groups_cover_the_classes():
  assert set(demo.GROUPS) == set(demo.CLASSES)
  assert len(set(demo.GROUPS.values())) == 7
  assert set(demo_text.SOUNDS) == set(demo.CLASSES)
  assert set(demo_text.MOTIONS) == set(demo.VERBS)


def test_every_class_shares_either_its_look_or_its_voice_in_its_group():
  kinds = demo_clip.KINDS.values()
  looks = collections.Counter((k.group, k.look) for k in kinds)
  voices = collections.Counter((k.group, k.voice) for k in kinds)
  for kind in kinds:
    shared = (looks[kind.group, kind.look], voices[kind.group, kind.voice])
    assert sorted(shared) == [1, 2]
  assert len(looks) == len(demo_draw.LOOKS) == 18
  assert len(voices) == len(demo_sound.VOICES) == 18
  assert set(demo_sound.TEMPO) == set(demo_sound.VOICES)


def test_classes_that_look_alike_move_alike():
  for look in demo_draw.LOOKS:
    same = [k for k in demo_clip.KINDS.values() if k.look == look]
    assert len({k.verbs for k in same}) == 1
    assert len({k.colours for k in same}) == 1
    assert len({demo_sound.TEMPO[k.voice] for k in same}) == 1


# --- Plans and records.


def test_a_clip_follows_from_seed_split_and_number():
  def text(split, number, seed):
    return json.dumps(
      demo_clip.record(demo_clip.plan_clip(split, number, seed))
    )

  assert text("train", 5, 0) == text("train", 5, 0)
  assert len({text("train", 5, 0), text("train", 5, 1)}) == 2
  train, test = text("train", 5, 0), text("test", 5, 0)
  assert json.loads(train)["objects"] != json.loads(test)["objects"]


def test_records_of_many_clips_hold_together():
  clips = [demo_clip.plan_clip("test", k, 0) for k in range(240)]
  records = [demo_clip.record(clip) for clip in clips]
  assert len({r["id"] for r in records}) == 240
  assert sum(r["id"].startswith("-") for r in records) == 5
  assert {r["verb"] for r in records} == set(demo.VERBS)
  sizes = collections.Counter(len(r["labels"]) for r in records)
  assert sizes[1] > 80 and sizes[2] > 40 and sizes[3] > 2
  whole = np.mean([r["event"] == [0.0, 3.0] for r in records])
  assert 0.45 < whole < 0.75
  for k, r in enumerate(records):
    assert r["label"] == r["labels"][0] == r["noun"] == demo.CLASSES[k % 24]
    assert r["group"] == demo.GROUPS[r["label"]]
    assert len(set(r["captions"])) == 5
    assert all(re.fullmatch(r"[A-Z][^{}]+\.", c) for c in r["captions"])
    start, end = r["event"]
    assert start >= 0 and start + 1 <= end <= r["seconds"]
    assert [s["name"] for s in r["sounds"]] == r["labels"]
    check_objects(r)


def check_objects(record):
  per_frame = collections.Counter(o["frame"] for o in record["objects"])
  assert sorted(per_frame) == list(range(0, 75, 2))
  assert len(set(per_frame.values())) == 1
  for thing in record["objects"]:
    x0, y0, x1, y1 = thing["box"]
    assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    assert thing["name"] in demo.NOUNS
  start, end = record["event"]
  for thing in record["objects"]:
    if thing["name"] == record["label"]:
      assert thing["sounding"] == (start <= thing["frame"] / 25 < end)
    elif thing["name"] not in record["labels"]:
      assert not thing["sounding"]


# --- Files.


def test_files_have_both_tracks_and_their_lengths(folder):
  for record in records_of(folder)[::5]:
    frames, samples = read(folder / record["file"])
    assert frames.shape == (75, 112, 112, 3)
    # AAC packs 1024 samples a frame.
    assert 48_000 <= len(samples) < 48_000 + 1024
    assert np.abs(samples).max() > 0.02


def test_only_missing_files_are_made_again(folder):
  before = stamps(folder)
  annotations = folder / "annotations.jsonl"
  lines, made = annotations.read_text(), annotations.stat().st_mtime_ns
  (folder / "media" / "-train_00007.mp4").unlink()
  again(folder)
  after = stamps(folder)
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {"-train_00007.mp4"}
  assert annotations.read_text() == lines
  assert annotations.stat().st_mtime_ns == made
  again(folder)
  assert stamps(folder) == after


def test_annotations_follow_the_size_asked_for(folder, monkeypatch):
  monkeypatch.setattr(demo_clip, "render", lambda clip: ())
  monkeypatch.setattr(demo_clip, "encode", lambda: b"")
  before = stamps(folder)
  again(folder, test_per_class=1)
  records = records_of(folder)
  assert [r["split"] for r in records] == ["train"] * 24 + ["test"] * 24
  assert {k: v for k, v in stamps(folder).items() if k in before} == before
  again(folder)
  assert len(records_of(folder)) == 24
  for path in (folder / "media").glob("*test_*"):
    path.unlink()


def test_another_seed_is_refused(folder):
  with pytest.raises(InputError, match="seed 3, but seed 4 is asked"):
    again(folder, seed=4)


@pytest.mark.parametrize(
  "name, value, words",
  [("clips_per_class", 0, "0; it must be at least 1"), ("seed", -1, "-1; it")],
)
def test_sizes_out_of_range_are_refused(tmp_path, name, value, words):
  with pytest.raises(InputError, match=f"{name} is {words}"):
    again(tmp_path, **{name: value})
  assert not list(tmp_path.iterdir())


def test_same_seed_same_bytes_with_any_number_of_processes(
  folder, tmp_path, monkeypatch
):
  monkeypatch.setattr(demo, "_CLIPS_PER_PROCESS", 1)
  demo.write_media(
    tmp_path, clips_per_class=1, test_per_class=0, seed=3, processes=2,
    progress=False,
  )  # fmt: skip
  names = {p.name for p in (tmp_path / "media").iterdir()}
  assert names == {f"{r['id']}.mp4" for r in records_of(folder)}
  for name in ("annotations.jsonl", *(f"media/{name}" for name in names)):
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_an_error_in_a_process_is_quoted(tmp_path):
  with pytest.raises(RuntimeError, match="Did you mean 'train'"):
    list(demo._from_workers(tmp_path, [[("trian", 0, 0)]]))


# --- Sound and picture.


@pytest.mark.parametrize("voice", demo_sound.VOICES)
def test_voices_are_heard_inside_their_event_only(voice):
  onsets = (1.02, 1.5)
  sound = demo_sound.Sound(voice, onsets, 1.0, 2.0, 0.0)
  wave = demo_sound.render_sound(np.random.default_rng(0), sound, 3.0)
  assert wave.shape == (48_000,)
  inside, outside = wave[16_000:32_000], np.delete(wave, slice(16_000, 32_000))
  assert np.sqrt(np.mean(inside**2)) > 0.1 * demo_sound.LEVEL
  assert not outside.any()


def test_energy_of_files_is_inside_the_event():
  """Through AAC, for clips with one sound and no noise."""
  found = 0
  for number in range(72):
    clip = demo_clip.plan_clip("train", number, 1)
    main = clip.heard[0].sound
    if len(clip.heard) > 1 or main.end - main.start > 2.5:
      continue
    clean = dataclasses.replace(clip, noise="")
    _, wave = demo_clip.render(clean)
    frames = np.zeros((75, 112, 112, 3), np.uint8)
    _, samples = read(io.BytesIO(demo_clip.encode(frames, wave)))
    t = np.arange(len(samples)) / 16_000
    inside = (t >= main.start) & (t < main.end)
    # The codec smears by a window.
    outside = (t < main.start - 0.07) | (t > main.end + 0.07)
    power = samples**2
    assert power[inside].mean() > 100 * power[outside].mean(), clip.label
    found += 1
  assert found >= 5


@pytest.mark.parametrize("voice", ["kick", "snare", "tick", "thud", "chirp"])
def test_hits_are_heard_at_their_onsets(voice):
  onsets = (0.22, 0.7, 1.3, 1.9)
  sound = demo_sound.Sound(voice, onsets, 0.2, 2.4, 0.0)
  wave = demo_sound.render_sound(np.random.default_rng(1), sound, 3.0)
  power = np.mean(wave.reshape(-1, 160) ** 2, axis=1)  # 10 ms each
  for onset in onsets:
    k = round(onset * 100)
    assert power[k : k + 6].max() > 20 * power[k - 8 : k - 2].max()


def actor_of(look, verb, **changes):
  values = {
    "name": "x", "look": look, "colour": "red", "x": 56.0, "y": 56.0,
    "half": 22.0, "mirrored": False, "verb": verb, "onsets": (0.52, 1.0, 1.5),
    "start": 0.5, "end": 2.0, **changes,
  }  # fmt: skip
  return demo_scene.Actor(**values)


@pytest.mark.parametrize("look", demo_draw.LOOKS)
def test_boxes_hold_what_is_drawn(look):
  actor = actor_of(look, "rocks", mirrored=True)
  args = ("plain", 2.0)
  empty = demo_scene.render_frames(np.random.default_rng(0), [], *args)
  drawn = demo_scene.render_frames(np.random.default_rng(0), [actor], *args)
  times = np.arange(50) / demo_scene.FPS
  boxes = demo_scene.boxes(actor, times) * demo_scene.SIZE
  covered = []
  for k in range(0, 50, 7):
    y, x = np.nonzero(np.abs(drawn[k].astype(int) - empty[k]).max(2) > 24)
    x0, y0, x1, y1 = boxes[k]
    assert x.min() > x0 - 3 and x.max() < x1 + 3
    assert y.min() > y0 - 3 and y.max() < y1 + 3
    covered.append(np.ptp(x) * np.ptp(y) / ((x1 - x0) * (y1 - y0)))
  # The box holds all that moves, a drum's raised sticks among it.
  assert np.mean(covered) > 0.5


@pytest.mark.parametrize("verb", demo.VERBS)
def test_objects_move_in_their_event_only(verb):
  actor = actor_of("bell", verb)
  t = np.arange(75) / demo_scene.FPS
  poses = demo_scene.poses(actor, t)
  moved = np.abs(np.diff(poses, axis=0)).max((1, 2))
  before, inside, after = moved[:11], moved[13:49], moved[51:]
  assert before.max() < 1e-9 and after.max() < 1e-9
  assert inside.max() > 0.3
  beats = demo_scene.beats(actor, t)
  assert beats[13] > 0.99 and beats[:13].max() < 1e-9


def test_a_ball_is_on_the_ground_and_a_bell_at_its_extreme_on_the_beat():
  onsets = np.array([0.52, 1.0, 1.5])
  ball = demo_scene.poses(actor_of("ball", "bounces"), onsets)
  between = demo_scene.poses(actor_of("ball", "bounces"), onsets + 0.24)
  assert np.all(ball[:, 1, 2] > between[:, 1, 2] + 8)
  bell = demo_scene.poses(actor_of("bell", "swings"), onsets)
  angles = np.arctan2(bell[:, 1, 0], bell[:, 0, 0])
  np.testing.assert_allclose(angles, [0.55, -0.55, 0.55], atol=1e-6)
