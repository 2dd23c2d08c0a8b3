"""One clip of `av_demo`: its class, plan, annotation, frames and samples."""

import dataclasses
import fractions
import io
from typing import Any

import av
import numpy as np
from jaxtyping import Int16, UInt8

from avjax.data import demo_draw, demo_scene, demo_sound, demo_text
from avjax.errors import lookup

# Of drawings and sounds: clips of another version are not kept.
VERSION = 1
SECONDS = 3.0
SPLITS = ("train", "test")
CAPTIONS = {"train": 1, "test": 5}
CRF = 23  # x264's quality


@dataclasses.dataclass(frozen=True)
class Kind:
  """A class: its group, picture, sound, motions and usual colours."""

  group: str
  look: str
  voice: str
  verbs: tuple[str, ...]
  colours: tuple[str, ...]


def _pair(group, verbs, colours, *members) -> dict[str, Kind]:
  """Two classes that differ in look or in voice only."""
  return {
    name: Kind(group, look, voice, tuple(verbs.split()), tuple(colours.split()))
    for name, look, voice in members
  }


KINDS: dict[str, Kind] = {
  **_pair(
    "music", "rocks shakes swings", "brown orange red",
    ("violin", "viol", "bowed"), ("guitar", "viol", "plucked"),
  ),
  **_pair(
    "music", "rises rocks pulses", "white purple yellow",
    ("flute", "flute", "pipe"), ("organ", "organ", "pipe"),
  ),
  **_pair(
    "percussion", "bounces pulses spins", "red blue white",
    ("bass drum", "drum", "kick"), ("snare drum", "drum", "snare"),
  ),
  **_pair(
    "percussion", "swings shakes spins", "yellow orange green",
    ("bell", "bell", "chime"), ("glockenspiel", "glockenspiel", "chime"),
  ),
  **_pair(
    "animals", "bounces rocks slides", "brown white orange",
    ("dog", "canine", "bark"), ("wolf", "canine", "howl"),
  ),
  **_pair(
    "animals", "bounces rises swings", "green blue purple",
    ("songbird", "bird", "chirp"), ("cricket", "cricket", "chirp"),
  ),
  **_pair(
    "vehicles", "slides shakes bounces", "yellow white red",
    ("taxi", "car", "engine"), ("police car", "car", "siren"),
  ),
  **_pair(
    "vehicles", "slides rises rocks", "green red blue",
    ("train", "train", "horn"), ("ship", "ship", "horn"),
  ),
  **_pair(
    "machines", "swings pulses shakes", "blue green yellow",
    ("clock", "clock", "tick"), ("alarm clock", "clock", "alarm"),
  ),
  **_pair(
    "machines", "spins rises shakes", "orange purple red",
    ("drill", "drill", "motor"), ("blender", "blender", "motor"),
  ),
  **_pair(
    "toys", "bounces spins slides", "red purple orange",
    ("ball", "ball", "thud"), ("squeaky ball", "ball", "squeak"),
  ),
  **_pair(
    "nature", "rocks pulses slides", "green blue brown",
    ("tree", "tree", "gust"), ("sea", "sea", "gust"),
  ),
}  # fmt: skip

# The order of the class numbers: never change it, only bump VERSION.
CLASSES: tuple[str, ...] = tuple(KINDS)
GROUPS: dict[str, str] = {name: kind.group for name, kind in KINDS.items()}
VERBS: tuple[str, ...] = tuple(demo_scene.MOTIONS)
NOUNS: tuple[str, ...] = CLASSES  # a class is named after its object

# Voices of one class only: what is heard from outside the picture is one of
# these, so that its label can be known.
_VOICES = [kind.voice for kind in KINDS.values()]
_UNMISTAKABLE = tuple(n for n, k in KINDS.items() if _VOICES.count(k.voice) < 2)


@dataclasses.dataclass(frozen=True)
class Heard:
  """A sound of a clip, its class, and whether its object is in the picture."""

  name: str
  visible: bool
  sound: demo_sound.Sound


@dataclasses.dataclass(frozen=True)
class Clip:
  """All that is drawn at random for one clip but its textures.

  Attributes:
    id: name of the file without its ending; some begin with '-'.
    split, number, seed: what the clip follows from.
    verb: a motion of VERBS, the main object's.
    actors: objects in the picture, the main one first.
    heard: sounds, the main one first.
    ground: a key of demo_scene.BACKGROUNDS.
    noise: a key of demo_sound.NOISES, '' = none.
    snr: decibels of the main sound above the noise.
  """

  id: str
  split: str
  number: int
  seed: int
  verb: str
  actors: tuple[demo_scene.Actor, ...]
  heard: tuple[Heard, ...]
  ground: str
  noise: str
  snr: float

  @property
  def label(self) -> str:
    """The class."""
    return self.actors[0].name

  def rng(self, stream: int) -> np.random.Generator:
    """A generator of the clip's own: 0 plan, 1 picture, 2 sound, 3 text."""
    return _rng(self.seed, self.split, self.number, stream)


def _rng(seed: int, split: str, number: int, stream: int):
  entropy = [VERSION, seed, SPLITS.index(split), number, stream]
  return np.random.default_rng(entropy)


def clip_id(split: str, number: int) -> str:
  """Name of a clip's file without its ending; one in 48 begins with '-'."""
  return f"{'-' if number % 48 == 7 else ''}{split}_{number:05d}"


# Decibels by which a sound is quieter than the main one, least and most.
BELOW = {"main": (0, 0), "beside": (3, 8), "unseen": (6, 12)}

# --- The plan of a clip.


def _event(rng: np.random.Generator) -> tuple[float, float]:
  """Start and end on frame borders; the whole clip in 60 % of the cases."""
  if rng.random() < 0.6:
    return 0.0, SECONDS
  frames = int(rng.integers(25, 51))
  first = int(rng.integers(0, round(SECONDS * demo_scene.FPS) - frames + 1))
  return first / demo_scene.FPS, (first + frames) / demo_scene.FPS


def _sound(rng: np.random.Generator, name: str, gain: float):
  """An event of a class, with its onsets spread over it."""
  start, end = _event(rng)
  voice = KINDS[name].voice
  step = rng.uniform(*demo_sound.TEMPO[voice])
  count = max(round((end - start) / step), 1)
  step = (end - start) / count
  late = np.concatenate([[0.0], rng.uniform(-0.06, 0.06, count - 1)])
  onsets = start + step * (np.arange(count) + late) + 0.02
  return demo_sound.Sound(
    voice, tuple(np.round(onsets, 4).tolist()), start, end, gain
  )


def _colour(rng: np.random.Generator, name: str) -> str:
  """Mostly one of the class's usual colours."""
  usual = KINDS[name].colours
  every = tuple(demo_draw.COLOURS)
  return str(rng.choice(usual if rng.random() < 0.6 else every))


def _others(rng: np.random.Generator, name: str) -> dict[str, str]:
  """Other classes of the scene -> 'beside', 'silent' or 'unseen'."""
  roles = {
    "alone": (),
    "silent": ("silent",),
    "two": ("beside",),
    "two, silent": ("beside", "silent"),
    "three": ("beside", "beside"),
    "unseen": ("unseen",),
    "unseen, silent": ("unseen", "silent"),
  }
  shares = [0.37, 0.18, 0.12, 0.05, 0.05, 0.12, 0.11]
  taken, others = [name], {}
  for role in roles[str(rng.choice(list(roles), p=shares))]:
    pool = [
      n
      for n in (_UNMISTAKABLE if role == "unseen" else CLASSES)
      if all(
        KINDS[n].voice != KINDS[m].voice and KINDS[n].look != KINDS[m].look
        for m in taken
      )
    ]
    taken.append(str(rng.choice(pool)))
    others[taken[-1]] = role
  return others


def _place(rng: np.random.Generator, count: int) -> list[tuple]:
  """(x, y, half size) in pixels of the main object and `count` others.

  A half size of 0 is still to be drawn: it depends on whether it sounds.
  """
  size = demo_scene.SIZE
  if not count:
    half = rng.uniform(24, 36)
    return [(*rng.uniform(0.38 * size, 0.62 * size, 2), half)]
  side = rng.choice([-1, 1])
  half = rng.uniform(21, 28)
  x = size * (0.5 - side * rng.uniform(0.12, 0.18))
  places = [(x, size * rng.uniform(0.42, 0.62), half)]
  rows = rng.permutation([0.24, 0.76])
  for row in rows[:count]:
    x = size * (0.5 + side * rng.uniform(0.28, 0.35))
    places.append((x, size * (row + rng.uniform(-0.04, 0.04)), 0.0))
  return places


def _actor(rng, name: str, place: tuple, sound) -> demo_scene.Actor:
  """An object at (x, y, half size); it moves if it sounds."""
  x, y, half = place
  half = half or rng.uniform(*((12, 16) if sound else (9, 13)))
  still = demo_scene.Actor(
    name,
    KINDS[name].look,
    _colour(rng, name),
    x=float(x),
    y=float(y),
    half=float(half),
    mirrored=bool(rng.random() < 0.5),
  )
  if sound is None:
    return still
  return dataclasses.replace(
    still,
    verb=str(rng.choice(KINDS[name].verbs)),
    onsets=sound.onsets,
    start=sound.start,
    end=sound.end,
  )


def plan_clip(split: str, number: int, seed: int) -> Clip:
  """Draws clip `number` of a split; its class is CLASSES[number % 24].

  Raises:
    InputError: the split is unknown.
  """
  lookup(dict.fromkeys(SPLITS), split, "split of av_demo")
  rng = _rng(seed, split, number, 0)
  label = CLASSES[number % len(CLASSES)]
  roles = {label: "main", **_others(rng, label)}
  seen = [name for name, role in roles.items() if role != "unseen"]
  places = dict(zip(seen, _place(rng, len(seen) - 1), strict=True))
  gain = rng.uniform(-4, 2)
  actors, heard = [], []
  for name, role in roles.items():
    sound = None
    if role in BELOW:
      sound = _sound(rng, name, gain - rng.uniform(*BELOW[role]))
      heard.append(Heard(name, name in places, sound))
    if name in places:
      actors.append(_actor(rng, name, places[name], sound))
  noisy = rng.random() < 0.75
  return Clip(
    id=clip_id(split, number),
    split=split,
    number=number,
    seed=seed,
    verb=actors[0].verb,
    actors=tuple(actors),
    heard=tuple(heard),
    noise=str(rng.choice(list(demo_sound.NOISES))) if noisy else "",
    ground=str(rng.choice(list(demo_scene.BACKGROUNDS))),
    snr=float(rng.uniform(0, 22)),
  )


# --- What is written of a clip.


def _objects(clip: Clip) -> list[dict[str, Any]]:
  """Boxes at 12.5 frames/s, ordered by frame, the main object first."""
  frames = np.arange(0, round(SECONDS * demo_scene.FPS), 2)
  t = frames / demo_scene.FPS
  times = t.tolist()
  places = [
    np.round(demo_scene.boxes(actor, t), 4).tolist() for actor in clip.actors
  ]
  return [
    {
      "frame": int(frame),
      "name": actor.name,
      "box": boxes[k],
      "sounding": bool(actor.onsets) and actor.start <= times[k] < actor.end,
    }
    for k, frame in enumerate(frames)
    for actor, boxes in zip(clip.actors, places, strict=True)
  ]


def _captions(clip: Clip) -> list[str]:
  main = clip.actors[0]
  sounding = {heard.name for heard in clip.heard}
  third = (3 * main.x) // demo_scene.SIZE
  place = ("on the left", "in the middle", "on the right")[int(third)]
  return demo_text.captions(
    clip.rng(3),
    CAPTIONS[clip.split],
    name=main.name,
    colour=main.colour,
    verb=main.verb,
    place=place,
    ground=demo_scene.BACKGROUNDS[clip.ground][1],
    event=(main.start, main.end),
    seconds=SECONDS,
    beside=[a.name for a in clip.actors[1:] if a.onsets],
    unseen=[heard.name for heard in clip.heard if not heard.visible],
    silent=[a.name for a in clip.actors if a.name not in sounding],
    noisy=bool(clip.noise) and clip.snr < 6,
  )


def record(clip: Clip) -> dict[str, Any]:
  """The annotation of a clip, as JSON types.

  Fields: `id`, `split` (train or test), `file` (relative to the folder of
  annotations.jsonl), `seconds`; `label` (of CLASSES), `group`, `labels` (the
  label first, then all other classes that are heard), `captions` (one in train,
  five in test), `verb`, `noun`; `event` ([start, end] of the main sound,
  seconds); `sounds` (name, start, end, visible of each, the main one first);
  `objects` (12.5 frames/s: frame, the number of the frame in the file; name;
  box [x0, y0, x1, y1] in 0..1; sounding); `snr` (decibels; null = no noise).
  """
  main = clip.heard[0].sound
  return {
    "id": clip.id,
    "split": clip.split,
    "file": f"media/{clip.id}.mp4",
    "seconds": SECONDS,
    "label": clip.label,
    "group": GROUPS[clip.label],
    "labels": [heard.name for heard in clip.heard],
    "captions": _captions(clip),
    "verb": clip.verb,
    "noun": clip.label,
    "event": [main.start, main.end],
    "sounds": [
      {
        "name": heard.name,
        "start": heard.sound.start,
        "end": heard.sound.end,
        "visible": heard.visible,
      }
      for heard in clip.heard
    ],
    "objects": _objects(clip),
    "snr": round(clip.snr, 1) if clip.noise else None,
  }


def render(
  clip: Clip,
) -> tuple[UInt8[np.ndarray, "t h w 3"], Int16[np.ndarray, "s"]]:
  """Frames at 25 a second and samples at 16 kHz."""
  frames = demo_scene.render_frames(
    clip.rng(1), clip.actors, clip.ground, SECONDS
  )
  wave = demo_sound.mix(
    clip.rng(2),
    [heard.sound for heard in clip.heard],
    SECONDS,
    clip.noise,
    clip.snr,
  )
  return frames, wave


def encode(
  frames: UInt8[np.ndarray, "t h w 3"], wave: Int16[np.ndarray, "s"]
) -> bytes:
  """An MP4 file with both tracks."""
  out = io.BytesIO()
  with av.open(out, "w", format="mp4") as container:
    video = container.add_stream("libx264", rate=demo_scene.FPS)
    video.height, video.width = frames.shape[1:3]
    video.pix_fmt = "yuv420p"
    video.options = {"preset": "ultrafast", "crf": str(CRF)}
    video.codec_context.thread_count = 1
    sound = container.add_stream("aac", rate=demo_sound.RATE, layout="mono")
    sound.bit_rate = 48_000
    sound.options = {"aac_coder": "fast"}
    for k, pixels in enumerate(frames):
      picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
      picture.pts, picture.time_base = k, fractions.Fraction(1, demo_scene.FPS)
      container.mux(video.encode(picture))
    container.mux(video.encode(None))
    samples = av.AudioFrame.from_ndarray(wave[None], "s16", "mono")
    samples.sample_rate, samples.pts = demo_sound.RATE, 0
    container.mux(sound.encode(samples))
    container.mux(sound.encode(None))
  return out.getvalue()
