"""Which items share a forward: similar lengths together, within a budget of items and one of tokens."""

from collections.abc import Sequence


def packs(lengths: Sequence[int], max_items: int, max_tokens: int) -> list[list[int]]:
    """Groups of indices, each index exactly once.

    max_tokens   of a padded forward (items x longest); an item longer than that goes alone

    A pack ends where padding would be more than half of an item: queries are not padded to the length of pages.
    """
    found: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if found:
            pack = found[-1]
            fits = len(pack) < max_items and (len(pack) + 1) * longest <= max_tokens
            if fits and 2 * lengths[index] >= longest:
                pack.append(index)
                continue
        found.append([index])
        longest = lengths[index]
    return found
