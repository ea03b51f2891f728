"""Captions as `.txt` files beside images: which file belongs to which image, and what happens to one that is there."""

from __future__ import annotations

from sightline.jobs.page import Location


def sidecar_key(sidecars: Location, images: Location, uri: str) -> str:
    """The key of an image's sidecar, below the location of all sidecars.

    sidecars  where they go; the images' own location: beside them
    images    the batch's input
    """
    raise NotImplementedError
