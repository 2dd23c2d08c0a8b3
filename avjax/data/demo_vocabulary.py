"""python -m avjax.data.demo_vocabulary > avjax/data/vocabulary/av_demo.txt

The vocabulary of av_demo: every word of its captions and class names is one
piece, and every letter, digit and sign of ASCII is one, so that no English text
holds [UNK].
"""

import re
import string
import sys

from avjax.data import demo_clip, demo_draw, demo_scene, demo_text, text

# Words that demo_text and demo_clip put between those of their tables.
BETWEEN = """a an after pause at first beside that while out of sight near
silent in noisy place on the left middle right"""


def pieces() -> list[str]:
  """The vocabulary in the order of its ids, without [DEC]."""
  tables = [
    BETWEEN,
    *demo_clip.CLASSES,
    *demo_draw.COLOURS,
    *demo_scene.MOTIONS,
    *(ground for _, ground in demo_scene.BACKGROUNDS.values()),
    *(words for row in demo_text.SOUNDS.values() for words in row),
    *(words for row in demo_text.MOTIONS.values() for words in row),
    *(re.sub(r"{\w+}", " ", words) for words in demo_text.TEMPLATES),
  ]
  words = set(re.findall("[a-z]+", " ".join(tables).lower()))
  single = [*string.punctuation, *string.digits, *string.ascii_lowercase]
  return [
    *text.SPECIAL,
    "[MASK]",
    *single,
    *(f"##{character}" for character in single if character.isalnum()),
    *sorted(words - set(single)),
  ]


if __name__ == "__main__":
  sys.stdout.writelines(f"{piece}\n" for piece in pieces())
