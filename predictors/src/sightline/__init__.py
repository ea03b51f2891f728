"""Sightline: vision-language models as KServe predictors, and the caption→enhance chain in front of them.

Importing this package costs nothing: no torch, no kserve, no network.
"""

__version__ = "0.1.0"
