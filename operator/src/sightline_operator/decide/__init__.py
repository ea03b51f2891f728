"""What should be done: from an object and what was seen to actions, status and events. Pure."""

from sightline_operator.decide.batch import decide_batch
from sightline_operator.decide.pipeline import decide_pipeline

__all__ = ["decide_batch", "decide_pipeline"]
