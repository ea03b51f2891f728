"""The enhancer is served with the instructions it was taught; the two rooms that hold them do not import each other."""

from sightline.models.gpt_oss import model
from sightline.tiny import enhancer


def test_the_served_instructions_are_the_taught_ones() -> None:
    assert model.INSTRUCTIONS == enhancer.INSTRUCTIONS
