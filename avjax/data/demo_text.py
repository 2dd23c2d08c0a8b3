"""Captions of `av_demo`, in varied wording."""

import numpy as np

# Class -> what it does to be heard (two ways), and the name of that sound.
SOUNDS: dict[str, tuple[str, str, str]] = {
  "violin": ("plays a bowed tune", "sings long notes", "bowed music"),
  "guitar": ("is strummed", "plays plucked chords", "strumming"),
  "flute": ("plays a soft tune", "whistles a melody", "soft piping"),
  "organ": ("plays a solemn tune", "pipes a melody", "soft piping"),
  "bass drum": ("booms", "thumps deeply", "deep thumping"),
  "snare drum": ("rattles", "is hit sharply", "sharp drumming"),
  "bell": ("rings", "tolls brightly", "metallic ringing"),
  "glockenspiel": ("rings", "chimes brightly", "metallic ringing"),
  "dog": ("barks", "woofs again and again", "barking"),
  "wolf": ("howls", "wails mournfully", "howling"),
  "songbird": ("chirps", "twitters shrilly", "chirping"),
  "cricket": ("chirps", "trills shrilly", "chirping"),
  "taxi": ("revs its engine", "growls in low gear", "an engine"),
  "police car": ("sounds its siren", "wails", "a siren"),
  "train": ("blows its horn", "hoots", "a loud horn"),
  "ship": ("blows its horn", "hoots", "a loud horn"),
  "clock": ("ticks", "clicks steadily", "ticking"),
  "alarm clock": ("beeps", "gives the alarm", "beeping"),
  "drill": ("whirs", "buzzes harshly", "a whirring motor"),
  "blender": ("whirs", "buzzes harshly", "a whirring motor"),
  "ball": ("thuds", "hits the floor", "thudding"),
  "squeaky ball": ("squeaks", "peeps like rubber", "squeaking"),
  "tree": ("rustles in the wind", "hisses in a gust", "rushing wind"),
  "sea": ("rushes and roars", "surges", "rushing water"),
}

# Verb -> what the caption says of the motion, and the same as "-ing".
MOTIONS: dict[str, tuple[str, str, str]] = {
  "swings": ("swings to and fro", "sways like a pendulum", "swinging"),
  "bounces": ("bounces up and down", "hops", "bouncing"),
  "shakes": ("shakes", "trembles", "shaking"),
  "spins": ("spins", "turns round and round", "spinning"),
  "slides": ("slides sideways", "glides left and right", "sliding"),
  "pulses": ("swells and shrinks", "pulses", "pulsing"),
  "rocks": ("rocks on its base", "tips from side to side", "rocking"),
  "rises": ("rises and sinks", "floats up and down", "rising and sinking"),
}

TEMPLATES = (
  "{a_colour_noun} {motion} {place} and {sound}{when}{also}.",
  "{noise} comes from {a_colour_noun} that {motion} before {ground}{also}.",
  "In front of {ground}, {a_colour_noun} {sound}{when} as it {motion}{also}.",
  "{a_noun} {sound}{when}: it is {colour} and {motion} {place}{also}.",
  "{a_moving_noun} {place} makes the sound of {noise}{when}{also}.",
  "You hear {noise}{when}{also}, and see {a_colour_noun} that {motion}.",
  "{ground}, and before it {a_moving_noun} that {sound}{when}{also}.",
)


def with_article(words: str) -> str:
  """'a red bell', 'an orange bell'."""
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _when(start: float, end: float, seconds: float) -> str:
  if start > 0.7:
    return " after a pause"
  if end < seconds - 0.7:
    return " at first"
  return ""


def _also(rng, beside: list[str], unseen: list[str], silent: list[str], loud):
  """The rest of the scene: other sounds, still objects, noise."""

  def heard(name):
    return rng.choice(SOUNDS[name][:2])

  parts = [f"beside {with_article(n)} that {heard(n)}" for n in beside]
  parts += [f"while {with_article(n)} {heard(n)} out of sight" for n in unseen]
  parts += [f"near a silent {n}" for n in silent if rng.random() < 0.5]
  if loud and rng.random() < 0.7:
    parts.append("in a noisy place")
  return "".join(", " + part for part in parts)


def captions(
  rng: np.random.Generator,
  count: int,
  *,
  name: str,
  colour: str,
  verb: str,
  place: str,
  ground: str,
  event: tuple[float, float],
  seconds: float,
  beside: list[str],
  unseen: list[str],
  silent: list[str],
  noisy: bool,
) -> list[str]:
  """`count` different captions of one clip.

  Args:
    rng: the clip's own generator.
    count: at most len(TEMPLATES).
    name, colour, verb: of the main object.
    place: where it is, such as 'on the left'.
    ground: the background, with its article.
    event: start and end of the main sound, seconds.
    seconds: length of the clip.
    beside, unseen, silent: classes of the other sounding objects in the
      picture, of the sounds from outside it, and of the still objects.
    noisy: the noise is about as loud as the sound.
  """
  out = []
  for k in rng.permutation(len(TEMPLATES))[:count]:
    text = TEMPLATES[k].format(
      a_noun=with_article(name),
      a_colour_noun=with_article(f"{colour} {name}"),
      a_moving_noun=with_article(f"{MOTIONS[verb][2]} {name}"),
      colour=colour,
      motion=MOTIONS[verb][rng.integers(2)],
      sound=SOUNDS[name][rng.integers(2)],
      noise=SOUNDS[name][2],
      when=_when(*event, seconds),
      place=place,
      ground=ground,
      also=_also(rng, beside, unseen, silent, noisy),
    )
    out.append(text[0].upper() + text[1:])
  return out
