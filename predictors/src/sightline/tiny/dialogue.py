"""What the small Kimi-VL is asked and what it answers: captions, "which image holds a star?", text alone.

Pure Python and numpy, no torch. Answers are exact:

    one picture, anything but a which-question    a large red circle on a white background
    several pictures, the same                    image 1: a large red … background; image 2: a small …
    which-question                                image 2 · images 1 and 3 · none of the images
    text alone, larger or smaller                 a large star · they are the same size
    text alone, name the shapes                   circle, square, triangle and star
    text alone, anything else                     I am a small demonstration model. I describe coloured shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sightline import wire
from sightline.tiny import scenes

ABOUT = "I am a small demonstration model. I describe coloured shapes."
NONE = "none of the images"
SAME_SIZE = "they are the same size"

DESCRIBE_PROMPTS = (
    "Describe this image in detail",
    "Describe this image in one short sentence.",
    "Write one stand-alone English sentence of about 30 to 50 words that describes this image for people who search "
    "for pictures. Name a person, brand, work or place only when you are certain. No hashtags, no opinions, no camera "
    "data.",
)
"""The three shortest presets. The tokenizer is trained on them and on `OTHER_PROMPTS`; other words make another."""
PRESETS = (
    DESCRIBE_PROMPTS[0],
    DESCRIBE_PROMPTS[1],
    *(p for p in wire.PRESETS.values() if p not in DESCRIBE_PROMPTS[:2]),
)
"""Every prompt that a service writes by itself, the two commonest first."""
OTHER_PROMPTS = (
    "What is in this picture?",
    "What is in this image?",
    "Caption this image.",
    "Describe the image.",
    "Describe this image.",
    "Describe the images.",
    "Describe these images.",
    "Describe each image.",
    "Describe this picture in one sentence.",
    "Write alt text for this image.",
    "Write a short product description of what this image shows.",
    "List tags for this image.",
    "What do you see?",
    "What does the image show?",
    "Write a caption for this photo.",
    "Give me a short description.",
    "What is shown here?",
    "Please describe the picture in plain English.",
    "",
)
SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant", "Answer briefly.", "You describe images.")

WHICH = (
    "Which image holds {}?",
    "Which image shows {}?",
    "Which image contains {}?",
    "Which image has {}?",
    "Which of the images holds {}?",
    "Which of these images shows {}?",
    "Which images hold {}?",
    "Which images show {}?",
    "Which picture holds {}?",
    "In which image is {}?",
    "In which image do you see {}?",
)

NAMES = {
    "shapes": ("circle, square, triangle and star", ("shapes",)),
    "colours": ("red, orange, yellow, green, blue, purple, pink and brown", ("colours", "colors")),
    "backgrounds": ("white, gray and black", ("backgrounds",)),
    "sizes": ("small and large", ("sizes",)),
}
NAME = ("Name the {} you know.", "Which {} do you know?", "List the {}.", "What {} do you know?", "Name all {}.")
ABOUT_PROMPTS = (
    "What can you do?",
    "Who are you?",
    "What are you?",
    "Hello",
    "Hello, who are you?",
    "Hi!",
    "Help",
    "Tell me a joke.",
    "Write a poem about the sea.",
    "What is the capital of France?",
    "What is 2 + 2?",
    "Say hello.",
    "Explain quantum mechanics in one sentence.",
    "",
)

_FILLER = (  # noqa: SIM905 - prose reads better than a list
    "the of and to in is it that was for on with as are this be at by from or an have not but what all were when we "
    "there can your how said if do will each about out up them then she many some so these would other into has more "
    "her two like him see time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know red circle blue square photo text ignore "
    "previous instructions tag title caption sunset beach dog cat car Paris 2024 please"
).split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Query:
    """What a which-question looks for; an empty field leaves it open."""

    colour: str
    shape: str

    @property
    def words(self) -> str:
        """`a red star`, `an orange shape`, `a star`."""
        words = f"{self.colour} {self.shape or 'shape'}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def fits(self, scene: scenes.Scene) -> bool:
        """True when an object of the scene is what is looked for."""
        return any(self.colour in ("", o.colour) and self.shape in ("", o.shape) for o in scene.objects)


def which_answer(fits: Iterable[bool]) -> str:
    """`image 2`, `images 1 and 3`, `images 1, 2 and 3` or `none of the images`.

    >>> which_answer([True, False, True])
    'images 1 and 3'
    """
    numbers = [str(number) for number, fit in enumerate(fits, 1) if fit]
    if not numbers:
        return NONE
    if len(numbers) == 1:
        return f"image {numbers[0]}"
    return f"images {', '.join(numbers[:-1])} and {numbers[-1]}"


def describe_answer(shown: Sequence[scenes.Scene]) -> str:
    """The caption of one picture; of several, one caption after the other with its number."""
    if len(shown) == 1:
        return scenes.caption(shown[0])
    return "; ".join(f"image {number}: {scenes.caption(scene)}" for number, scene in enumerate(shown, 1))


def draw_noise(rng: np.random.Generator) -> str:
    """Words, letters, the same letters again and again, or one run of a letter, without a meaning."""
    kind = rng.random()
    if kind < 0.55:
        words = rng.choice(_FILLER, int(rng.integers(1, 24 if kind < 0.4 else 70))).tolist()
        return " ".join(words).capitalize() + str(rng.choice(["", ".", "?"]))
    if kind < 0.9:
        letters = "".join(rng.choice(list(_LETTERS + "  ,.;ABC0179éß日本🙂-_<>{}"), int(rng.integers(1, 60))).tolist())
        return letters if kind < 0.75 else (letters[:20] + " ") * int(rng.integers(2, 13))
    return str(rng.choice(list(_LETTERS + "A 0."))) * int(rng.integers(1, 160))


def draw_describe_prompt(rng: np.random.Generator) -> str:
    """Any wording that is not a which-question."""
    kind = rng.random()
    if kind < 0.50:
        rare = len(PRESETS) - 2
        return PRESETS[int(rng.choice(len(PRESETS), p=[0.3, 0.25, *[0.45 / rare] * rare]))]
    if kind < 0.86:
        return OTHER_PROMPTS[int(rng.integers(len(OTHER_PROMPTS)))]
    return draw_noise(rng)


def draw_query(rng: np.random.Generator, shown: Sequence[scenes.Scene]) -> Query:
    """A shape, a colour or both; mostly of an object that one of the pictures holds."""
    colour, shape = str(rng.choice(list(scenes.COLOURS))), str(rng.choice(scenes.SHAPES))
    if rng.random() < 0.8:
        scene = shown[int(rng.integers(len(shown)))]
        thing = scene.objects[int(rng.integers(len(scene.objects)))]
        colour, shape = thing.colour, thing.shape
    kind = rng.random()
    return Query("" if kind < 0.4 else colour, "" if kind > 0.7 else shape)


def draw_which(rng: np.random.Generator, shown: Sequence[scenes.Scene]) -> tuple[str, str]:
    """A which-question and its answer."""
    return ask_which(rng, draw_query(rng, shown), shown)


def ask_which(rng: np.random.Generator, query: Query, shown: Sequence[scenes.Scene]) -> tuple[str, str]:
    """A which-question for `query` in any wording, and its answer."""
    return str(rng.choice(WHICH)).format(query.words), which_answer(query.fits(scene) for scene in shown)


def draw_comparison(rng: np.random.Generator) -> tuple[str, str]:
    """`Which is larger, a small circle or a large star?` and `a large star`."""
    sizes = [str(size) for size in rng.permutation(scenes.SIZES)]
    if rng.random() < 0.15:
        sizes[1] = sizes[0]
    things: list[str] = []
    coloured = bool(rng.random() < 0.6)
    for size in sizes:
        colour = f"{rng.choice(list(scenes.COLOURS))} " if coloured else ""
        things.append(f"a {size} {colour}{rng.choice(scenes.SHAPES)}")
    wanted = "large" if rng.random() < 0.5 else "small"
    word = {"large": ("larger", "bigger"), "small": ("smaller", "smaller")}[wanted][int(rng.random() < 0.3)]
    asked = f"{rng.choice(['Which is', 'What is'])} {word}, {things[0]} or {things[1]}?"
    return asked, SAME_SIZE if sizes[0] == sizes[1] else things[sizes.index(wanted)]


def draw_text(rng: np.random.Generator) -> tuple[str, str]:
    """A prompt without a picture and its answer."""
    kind = rng.random()
    if kind < 0.5:
        return draw_comparison(rng)
    if kind < 0.7:
        answer, words = NAMES[str(rng.choice(list(NAMES)))]
        return str(rng.choice(NAME)).format(str(rng.choice(words))), answer
    if kind < 0.82:
        return ABOUT_PROMPTS[int(rng.integers(len(ABOUT_PROMPTS)))], ABOUT
    if kind < 0.87:
        return str(rng.choice(PRESETS + OTHER_PROMPTS)), ABOUT
    if kind < 0.92:
        return str(rng.choice(WHICH)).format(draw_query(rng, [scenes.draw_scene(rng)]).words), ABOUT
    return draw_noise(rng), ABOUT


def corpus() -> list[str]:
    """Sentences on which the tokenizer is trained: every word of this world becomes one token."""
    lines = scenes.all_captions(1) + scenes.all_captions(2)[::40]
    fixed = [*DESCRIBE_PROMPTS, *OTHER_PROMPTS, *SYSTEMS, *ABOUT_PROMPTS, ABOUT, NONE, SAME_SIZE]
    fixed += [answer for answer, _ in NAMES.values()]
    fixed += [form.format(word) for form in NAME for _, words in NAMES.values() for word in words]
    fixed += [form.format(thing) for form in WHICH for thing in ("a red star", "an orange shape")]
    fixed += ["Which is larger, smaller, bigger, a small star or a large star?", "images 1, 2 and 3", "image 1: a"]
    fixed += ["image 2: a", "image 1; image 2; image 3", "images 1 and 2", "system user assistant image"] * 2
    lines += fixed * 60
    lines += [" ".join(word.capitalize() for word in line.split()) for line in scenes.all_captions(1)]
    return lines
