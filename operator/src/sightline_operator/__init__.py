"""The operator: watches VisionPipelines and VisionBatches, and makes the cluster what they say."""

__version__ = "0.1.0"
