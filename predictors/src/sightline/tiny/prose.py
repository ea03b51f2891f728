"""The enhancer's target language: fuller prose that says exactly what a caption says, and the checker of such prose.

Pure functions on strings. Rules: every object keeps its size, colour and shape; relation and background keep the
caption's own words; nothing is added; level low is one sentence, medium two, high three or more.
"""

from __future__ import annotations

import re

from sightline.tiny.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, CaptionFacts, parse_caption

LEVELS = ("low", "medium", "high")
VARIANTS = 3

_OPENERS = ("The image shows", "This picture shows", "The scene shows")
_PLACES = ("image", "picture", "scene")

Thing = tuple[str, str, str]


def _facts(caption: str) -> CaptionFacts:
    facts = parse_caption(caption)
    if facts is None:
        raise ValueError(f"not a caption of this world: {caption!r}")
    return facts


def variant_of(caption: str) -> int:
    """The wording a caption gets: by its background, so that it can be learned and still varies."""
    return list(BACKGROUNDS).index(_facts(caption).background)


def enhanced(caption: str, level: str, variant: int) -> str:
    """The caption as fuller prose.

    level     low, medium, high: one sentence, two, three or four
    variant   0 to VARIANTS - 1, chooses the wording

    >>> enhanced("a large red circle on a white background", "medium", 0)
    'The image shows a large red circle. The large red circle is on a white background.'
    """
    facts = _facts(caption)
    opener, place, ground = _OPENERS[variant], _PLACES[variant], facts.background
    first = " ".join(facts.objects[0])
    if facts.relation is None:
        size, colour, shape = facts.objects[0]
        if level == "low":
            return f"{opener} a {first} on a {ground} background."
        if level == "medium":
            return f"{opener} a {first}. The {first} is on a {ground} background."
        return (
            f"{opener} a {first} on a {ground} background. The {shape} is {size} and {colour}. "
            f"The background of the {place} is {ground}."
        )
    second = " ".join(facts.objects[1])
    how = facts.relation
    if level == "low":
        return f"{opener} a {first} {how} a {second} on a {ground} background."
    if first == second:  # nothing but the place tells them apart: keep the caption's own phrase whole
        text = f"{opener} a {first} {how} a {second}. The {place} has a {ground} background."
        return (
            text
            if level == "medium"
            else f"{text} Each {facts.objects[0][2]} is {facts.objects[0][1]} and {facts.objects[0][0]}."
        )
    text = f"{opener} a {first} and a {second} on a {ground} background. The {first} is {how} the {second}."
    if level == "medium":
        return text
    return f"{text} {_contrast(*facts.objects)} The background of the {place} is {ground}."


def _contrast(a: Thing, b: Thing) -> str:
    """One sentence that says of two different objects what each is like."""
    if a[2] != b[2]:
        return f"The {a[2]} is {a[1]} and {a[0]}, while the {b[2]} is {b[1]} and {b[0]}."
    if a[1] != b[1]:
        return f"The {a[1]} {a[2]} is {a[0]}, while the {b[1]} {b[2]} is {b[0]}."
    return f"The {a[0]} {a[2]} is {a[1]}, and the {b[0]} {b[2]} is {b[1]}."


def analysis(caption: str, level: str) -> str:
    """The thoughts before the answer; they grow with the level."""
    facts = _facts(caption)
    things = " and ".join(f"a {' '.join(thing)}" for thing in facts.objects)
    if level == "low":
        return "One sentence."
    relation = f" Relation: {facts.relation}." if facts.relation else ""
    if level == "medium":
        return f"Objects: {things}.{relation} Background: {facts.background}. Write two sentences."
    where = ""
    if facts.relation:
        where = f" The {' '.join(facts.objects[0])} is {facts.relation} the {' '.join(facts.objects[1])}."
    return (
        f"The caption names {things}.{where} The background is {facts.background}. "
        "I keep every size, colour, shape and relation, and I add nothing. Write three or more sentences."
    )


# ---- the checker -----------------------------------------------------------------------------------------------------

_PLAIN_WORDS = frozenset(
    "the a an image picture scene this shows show is are on of in and while has with each background it".split()  # noqa: SIM905
)
_SENTENCES = {"low": (1, 1), "medium": (2, 2), "high": (3, 99)}
_SHAPE = "|".join(SHAPES)
_NAMED = re.compile(rf"\b(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({_SHAPE})\b")
_SAID = re.compile(
    rf"\b(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({_SHAPE}) is "
    rf"({'|'.join([*SIZES, *COLOURS])})\b(?: and ({'|'.join([*SIZES, *COLOURS])})\b)?"
)
_GROUND = re.compile(
    rf"\b({'|'.join(BACKGROUNDS)}) background\b|\bbackground of the \w+ is ({'|'.join(BACKGROUNDS)})\b"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its closing mark."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def faults(caption: str, level: str, text: str) -> list[str]:
    """Everything wrong with `text` as the enhancement of `caption` at `level`; empty when it is right.

    Each fault starts with its class: sentences, form, word, object, colour, size, shape, relation, background.
    """
    facts = _facts(caption)
    found: list[str] = []
    parts = sentences(text)
    fewest, most = _SENTENCES[level]
    if not fewest <= len(parts) <= most:
        found.append(f"sentences: {len(parts)} at level {level}")
    for part in parts:
        if not part.endswith(".") or not part[0].isupper():
            found.append(f"form: {part!r} is no sentence with a capital and a full stop")
    lower = text.lower()
    words = re.findall(r"[a-z0-9'-]+", lower)

    slots = (("size", SIZES, 0), ("colour", tuple(COLOURS), 1), ("shape", SHAPES, 2))
    for name, known, slot in slots:
        wanted = {thing[slot] for thing in facts.objects}
        used = {word for word in words if word in known}
        found += [f"{name}: {word} is missing" for word in sorted(wanted - used)]
        found += [f"{name}: {word} is added" for word in sorted(used - wanted)]
    relation_words = {word for how in RELATIONS for word in how.split()} - _PLAIN_WORDS
    allowed = _PLAIN_WORDS | relation_words | set(SIZES) | set(COLOURS) | set(SHAPES) | set(BACKGROUNDS)
    found += [f"word: {word!r} says more than the caption" for word in words if word not in allowed]

    whole = [" ".join(thing) for thing in facts.objects]
    for thing in sorted(set(whole)):
        if len(re.findall(rf"\b{thing}\b", lower)) < whole.count(thing):
            found.append(f"object: {thing!r} is missing")
    for size, colour, shape in _NAMED.findall(lower):
        if not any(_fits(thing, size, colour, shape) for thing in facts.objects):
            found.append(f"object: {' '.join(filter(None, (size, colour, shape)))!r} is not in the caption")
    for size, colour, shape, *rest in _SAID.findall(lower):
        said = [word for word in rest if word]
        if not any(_fits(thing, size, colour, shape) and set(said) <= set(thing) for thing in facts.objects):
            found.append(f"object: no {shape} is {' and '.join(said)}")

    found += _relation_faults(facts, lower)
    grounds = {a or b for a, b in _GROUND.findall(lower)}
    if f"{facts.background} background" not in lower:
        found.append(f"background: {facts.background} is missing")
    strays = (grounds | (set(words) & set(BACKGROUNDS))) - {facts.background}
    found += [f"background: {ground} is added" for ground in sorted(strays)]
    return found


def _fits(thing: Thing, size: str, colour: str, shape: str) -> bool:
    return size in ("", thing[0]) and colour in ("", thing[1]) and shape == thing[2]


def _relation_faults(facts: CaptionFacts, lower: str) -> list[str]:
    said = [how for how in RELATIONS if re.search(rf"\b{how}\b", lower)]
    loose = re.sub("|".join(rf"\b{how}\b" for how in RELATIONS), " ", lower)
    found = [f"relation: {word!r} stands alone" for word in ("left", "above", "to") if re.search(rf"\b{word}\b", loose)]
    found += [f"relation: {how!r} is added" for how in said if how != facts.relation]
    if facts.relation is None:
        return found
    if facts.relation not in said:
        return [*found, f"relation: {facts.relation!r} is missing"]
    thing = rf"(?:{'|'.join(SIZES)}) (?:{'|'.join(COLOURS)}) (?:{_SHAPE})"
    pairs = re.findall(rf"({thing}) (?:is )?{facts.relation} (?:a|the) ({thing})", lower)
    wanted = " ".join(facts.objects[0]), " ".join(facts.objects[1])
    if not pairs:
        found.append("relation: it joins no two objects")
    return found + [
        f"relation: {a!r} {facts.relation} {b!r} is not in the caption" for a, b in pairs if (a, b) != wanted
    ]
