"""Late interaction: how well a query's vectors match a page's, where they match, and how good a ranking is.

Dims   Q queries · N pages · T tokens of a query · P vectors of a page · D width

Queries and pages come as lists of arrays of their own lengths and are never padded: colpali_engine 0.3.18 pads pages
with zero rows and takes the maximum over them too, so that a page whose best similarity is negative scores 0 beside
longer ones (-0.98 alone, 0.0 in company: reference/models.md §1.3).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""(tokens, D)."""


def maxsim(queries: Sequence[Vectors], pages: Sequence[Vectors]) -> NDArray[np.float32]:
    """Late-interaction score of every query against every page.

    queries    Q arrays (T, D), unit rows; pages: N arrays (P, D); none of them empty
    returns    (Q, N): sum over T of the maximum over P; larger is better, at most T; each entry depends on its query
               and its page alone
    Source: arXiv 2407.01449, equation 1.
    """
    starts = np.cumsum([0, *(len(query) for query in queries)])[:-1]
    stacked = np.concatenate(queries).astype(np.float32, copy=False)
    scores = np.empty((len(queries), len(pages)), dtype=np.float32)
    for column, page in enumerate(pages):
        best = (stacked @ page.astype(np.float32, copy=False).T).max(axis=1)
        scores[:, column] = np.add.reduceat(best, starts)
    return scores


def similarity_maps(query: Vectors, page: Vectors, rows: int, columns: int) -> NDArray[np.float32]:
    """Cosine of each query token with each patch of a page.

    query (T, D) · page (rows x columns, D), its image vectors only, row by row · returns (T, rows, columns), -1 to 1
    """
    return (query @ page.T).reshape(len(query), rows, columns)


def ndcg(scores: NDArray[np.float32], relevant: Sequence[int], k: int = 5) -> float:
    """Mean nDCG@k of rankings with one relevant page each, 0-1.

    scores (Q, N) · relevant: for each query the column of its page. A rival with the same score counts as ahead.
    """
    own = scores[np.arange(len(relevant)), list(relevant)]
    rank = (scores >= own[:, None]).sum(axis=1)
    return float(np.where(rank <= k, 1 / np.log2(rank + 1), 0.0).mean())
