"""Which of several operator processes acts."""

from sightline_operator.lead.lease import Leader, LeaseLost

__all__ = ["Leader", "LeaseLost"]
