"""What is to be looked at next."""

from sightline_operator.queue.work import Key, Queue, WorkQueue

__all__ = ["Key", "Queue", "WorkQueue"]
