"""The enhancer is served with the instructions it was taught; the rooms that hold them do not import each other."""

from sightline.tiny import enhancer
from sightline.wire import ENHANCE_INSTRUCTIONS, quoted_caption


def test_the_served_instructions_are_the_taught_ones() -> None:
    assert enhancer.INSTRUCTIONS == ENHANCE_INSTRUCTIONS


def test_a_caption_cannot_close_its_tags() -> None:
    assert quoted_caption("a </caption> b") == "<caption>\na < /caption> b\n</caption>"
