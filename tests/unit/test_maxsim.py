"""MaxSim without padding, similarity maps and nDCG."""

import numpy as np
import pytest
import torch
from colpali_engine.models import ColQwen2_5_Processor
from hypothesis import given
from hypothesis import strategies as st

from sightline.maxsim import maxsim, ndcg, similarity_maps

DIM = 16


def vectors(rng: np.random.Generator, rows: int) -> np.ndarray:
    found = rng.normal(size=(rows, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(queries=lengths, pages=lengths, seed=st.integers(0, 1000))
def test_is_the_sum_over_tokens_of_the_best_match(queries: list[int], pages: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    said, seen = [vectors(rng, n) for n in queries], [vectors(rng, n) for n in pages]

    scores = maxsim(said, seen)

    for row, query in enumerate(said):
        for column, page in enumerate(seen):
            plain = sum(max(float(token @ patch) for patch in page) for token in query)
            assert scores[row, column] == pytest.approx(plain, abs=1e-4)


@given(queries=lengths, pages=lengths, seed=st.integers(0, 1000))
def test_an_entry_depends_on_its_query_and_page_alone(queries: list[int], pages: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    said, seen = [vectors(rng, n) for n in queries], [vectors(rng, n) for n in pages]

    scores = maxsim(said, seen)

    assert scores[0, 0] == pytest.approx(maxsim(said[:1], seen[:1])[0, 0], abs=1e-5)


def test_a_page_that_matches_nothing_keeps_its_negative_score_in_company() -> None:
    """colpali_engine pads with zeros and then says 0: the fault that this file exists for."""
    query = np.array([[1.0, 0.0]], np.float32)
    page, longer = np.array([[-0.98, 0.2]], np.float32), np.array([[-1.0, 0.0]] * 3, np.float32)

    assert maxsim([query], [page, longer])[0] == pytest.approx([-0.98, -1.0])
    theirs = ColQwen2_5_Processor.score_multi_vector(
        [torch.from_numpy(query)], [torch.from_numpy(page), torch.from_numpy(longer)], device="cpu"
    )
    assert theirs[0].tolist() == [0.0, -1.0], "colpali_engine masks its padding now: say so where we say otherwise"


def test_half_precision_vectors_are_scored_in_single_precision() -> None:
    rng = np.random.default_rng(0)
    said, seen = vectors(rng, 4), vectors(rng, 5)
    scores = maxsim([said.astype(np.float16)], [seen.astype(np.float16)])
    assert scores.dtype == np.float32
    assert scores == pytest.approx(maxsim([said], [seen]), abs=1e-2)


def test_maps_lie_row_by_row_over_the_page() -> None:
    page = np.eye(6, dtype=np.float32)
    query = page[[4]]

    (found,) = similarity_maps(query, page, rows=2, columns=3)

    assert found.tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[9, 1, 2]], 1.0),
        ([[1, 9, 2, 0, 0]], 1 / np.log2(4)),
        ([[1, 9, 8, 7, 6, 5]], 0.0),
        ([[5, 5, 1]], 1 / np.log2(3)),
    ],
    ids=["first", "third", "sixth", "a tie counts as lost"],
)
def test_ndcg_of_the_first_page(scores: list[list[float]], expected: float) -> None:
    assert ndcg(np.array(scores, np.float32), [0]) == pytest.approx(expected)
