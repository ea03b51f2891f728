"""docs/batch-results.md says what is so: keys, lines, columns, progress."""

import re
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest

from sightline.jobs import layout, outputs, parquet
from sightline.jobs.finish import finish
from sightline.jobs.layout import Layout
from sightline.jobs.objects import PART_BYTES
from sightline.services.batch_progress import WATCHED, ProgressAnswer
from tests.conftest import ROOT
from tests.jobs.written import Written

PAGE = (ROOT / "docs/batch-results.md").read_text()
EXAMPLES = [
    orjson.loads(line) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


async def test_the_keys_of_the_table_are_those_of_the_store() -> None:
    keys = set(re.findall(r"`((?:parts|output)/[^`]+)`", PAGE))
    own = {layout.MANIFEST, layout.RESULTS, layout.ERRORS, layout.PARQUET, Layout("").chunk(42, 7)}
    assert keys == own


async def test_the_lines_have_the_fields_of_lines() -> None:
    batch = await Written.whole(12)
    await finish(batch.page, batch.objects)
    result, error = (await batch.lines(layout.RESULTS))[0], (await batch.lines(layout.ERRORS))[0]
    shown, shown_error = EXAMPLES[0], EXAMPLES[1]
    assert set(shown) <= set(result)
    assert (set(shown_error), set(shown_error["error"])) == (set(error), set(error["error"]))


async def test_the_columns_are_those_of_the_table(tmp_path: Path) -> None:
    batch = await Written.whole(3, parquet=True)
    await finish(batch.page, batch.objects)
    file = tmp_path / "results.parquet"
    file.write_bytes((await batch.objects.fetch(batch.layout.root + layout.PARQUET)).data)
    section = PAGE[PAGE.index("## Parquet") : PAGE.index("## Sidecars")]
    assert re.findall(r"`([a-z_]+)`[,:]", section) == pq.read_schema(file).names


def test_the_progress_is_what_the_route_answers() -> None:
    assert ProgressAnswer.model_validate(EXAMPLES[2]).model_dump(exclude_none=True) == EXAMPLES[2]


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (r"`merge: Auto` up to ([\d,]+) items", outputs.MERGED_BY_ITSELF),
        (r"Row groups of ([\d,]+)", parquet.GROUP_ROWS),
        (r"of the last (\d+) batches", WATCHED),
        (r"larger than (\d+) MiB", PART_BYTES // 2**20),
    ],
)
def test_the_numbers_are_those_of_the_code(said: str, number: int) -> None:
    found = re.search(said, PAGE)
    assert found is not None
    assert int(found[1].replace(",", "")) == number
