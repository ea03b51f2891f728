"""A batch that one person runs from a terminal: kept in a store, so that the same command goes on where it stopped.

Keys of a batch in the store (a folder of this user, unless another was named), beside those of its plan and parts:

    <id>/order.json           what was asked for, and of which pipeline; created once: the batch's identity
    <id>/<fingerprint>/…      see `layout`

The id is a function of the order. So the same command finds the same batch: whole, half done, or not begun.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import orjson

from sightline.jobs.asking import Asker, new_client, readiness
from sightline.jobs.finish import Which, finish, lines_of, read_manifest
from sightline.jobs.inputs import InputFault, items_of, plan_batch
from sightline.jobs.items import Counts, Line
from sightline.jobs.layout import CANCELLED, PARQUET, PARTS, Layout, chunk_number
from sightline.jobs.manifest import Ended, Manifest
from sightline.jobs.pace import Pace
from sightline.jobs.page import Input, Location, Options, Outputs, Page, Target, fingerprint
from sightline.jobs.plan import Plan, PlanCorrupt, layout_of, read_plan
from sightline.jobs.progress import Progress, progress_of
from sightline.jobs.reports import Waiting
from sightline.jobs.reuse import Reuse
from sightline.jobs.shard import Stop, run_shard
from sightline.jobs.stores import Address, Stores, open_location
from sightline.wire import REVISION_HEADER

ORDER = "order.json"
CHUNK_SIZE = 10
"""What a Ctrl-C waits for, and what a kill costs, is two of them."""
ASK_SECONDS = 10.0
WATCH_SECONDS = 2.0

Kind = Literal["gateway", "v2", "openai"]


class NotFound(Exception):
    """There is no such batch."""


class InUse(Exception):
    """Another process of this machine works on the batch."""


class PipelineChanged(Exception):
    """Another pipeline answers than when the batch began (exit code 44)."""


class Unreachable(Exception):
    """Nothing answers at the target's address (exit code 75)."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a person asked for. All but `url` is the batch's identity: the same order is the same batch.

    out       absolute path of the results; failures and the table lie beside it
    model     of a predictor that is asked itself (`kind` v2)
    number    of orders that are the same otherwise: 2 begins the second anew
    """

    input: Input
    out: str
    url: str
    kind: Kind = "gateway"
    model: str = "describe"
    options: Options = field(default_factory=Options)
    sidecars: Location | None = None
    existing: Literal["skip", "overwrite", "append"] = "overwrite"
    parquet: bool = False
    number: int = 1

    @property
    def id(self) -> str:
        """A name that a person can read, and eight digits over all that was asked for."""
        said = self.to_json()
        del said["url"]
        digest = hashlib.sha256(orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
        stem = Address.of(self.input.location.url).key.rstrip("/").rsplit("/", 1)[-1] or "batch"
        if self.input.kind == "retry_of":
            stem = Path(self.out).stem
        return f"{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')[:40] or 'batch'}-{digest}"

    @property
    def errors(self) -> Path:
        return _beside(self.out, ".errors.jsonl")

    @property
    def table(self) -> Path:
        return _beside(self.out, ".parquet")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Order":
        """Raises KeyError, TypeError or ValueError when it is none."""
        source: dict[str, Any] = dict(said["input"])
        source["location"] = Location(**source["location"])
        source["suffixes"] = tuple(source["suffixes"])
        source["images"] = Location(**source["images"]) if source["images"] else None
        options, sidecars = Options(**said["options"]), said["sidecars"]
        parts: dict[str, Any] = {
            "input": Input(**source),
            "options": options,
            "sidecars": Location(**sidecars) if sidecars else None,
        }
        return cls(**{**said, **parts})


@dataclass(frozen=True, slots=True)
class Batch:
    """An order that is kept.

    pipeline  what the target said of itself when the batch began: `revision`, `model`, …
    """

    order: Order
    fingerprint: str
    pipeline: Mapping[str, str]
    created: float

    @property
    def id(self) -> str:
        return self.order.id

    @property
    def layout(self) -> Layout:
        return Layout.of("", self.id, self.fingerprint)


@dataclass(frozen=True, slots=True)
class Begun:
    """What lies in the store of a batch: items that are done, and how many of them failed, as far as was said."""

    done: int
    failed: int


@dataclass(frozen=True, slots=True)
class Standing:
    """A batch and how far it is. `progress`: None while it has no plan."""

    batch: Batch
    progress: Progress | None
    is_cancelled: bool

    @property
    def word(self) -> str:
        if self.progress is None:
            return "not planned"
        if self.progress.outputs is not None:
            return "cancelled" if self.is_cancelled else "complete"
        return "cancelling" if self.is_cancelled else "unfinished"


class Laptop:
    """The batches of one store, for one person.

    store    where they are kept; None: a folder of this user
    locks    folder of the files that say which batches are being worked on, on this machine
    """

    def __init__(self, store: Location | None = None, locks: Path | None = None) -> None:
        self.is_default = store is None
        self.location = store or Location(f"file://{_state_folder() / 'batches'}")
        self.objects = open_location(self.location)
        self._locks = locks or _state_folder() / "locks"

    # --- which batch -------------------------------------------------------------------------------------------------

    async def find(self, batch_id: str) -> Batch:
        """A batch by its id, or by the beginning of one. Raises NotFound."""
        batch = await self._read(batch_id)
        if batch is not None:
            return batch
        alike = [name for name in await self.objects.folders("") if batch_id and name.startswith(batch_id)]
        if len(alike) != 1:
            said = "there is no such batch" if not alike else f"several begin so: {', '.join(sorted(alike))}"
            raise NotFound(f"{batch_id}: {said}")
        batch = await self._read(alike[0])
        if batch is None:
            raise NotFound(f"{batch_id}: there is no such batch")
        return batch

    async def known(self, order: Order) -> Batch | None:
        """The batch of an order, if it was begun."""
        return await self._read(order.id)

    async def begin(self, order: Order, pipeline: Mapping[str, str]) -> Batch:
        """Keep an order; the batch is that which was begun first with it."""
        identity = orjson.dumps(dict(pipeline), option=orjson.OPT_SORT_KEYS).decode() if pipeline else None
        batch = Batch(order, fingerprint(identity, order.options), pipeline, time.time())
        said = {
            "order": order.to_json(),
            "fingerprint": batch.fingerprint,
            "pipeline": dict(pipeline),
            "created": batch.created,
        }
        if await self.objects.create(f"{order.id}/{ORDER}", orjson.dumps(said)):
            return batch
        return cast("Batch", await self._read(order.id))

    async def standings(self) -> AsyncGenerator[Standing]:
        """Every batch, in the order of their ids."""
        for name in sorted(await self.objects.folders("")):
            if (batch := await self._read(name)) is not None:
                yield await self.standing(batch)

    async def standing(self, batch: Batch) -> Standing:
        root_url = f"{self.location.url.rstrip('/')}/{batch.layout.root}"
        progress = await progress_of(self.objects, batch.layout, root_url)
        return Standing(batch, progress, await self.is_cancelled(batch))

    async def _read(self, batch_id: str) -> Batch | None:
        if "/" in batch_id or batch_id in ("", ".", ".."):
            return None
        said = await self.objects.read(f"{batch_id}/{ORDER}")
        if said is None:
            return None
        return Batch(Order.from_json(said["order"]), str(said["fingerprint"]), said["pipeline"], float(said["created"]))

    # --- whether it may be worked on ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self, batch_id: str) -> Generator[None]:
        """Work on a batch alone, as far as this machine goes. Raises InUse.

        Not needed for what is true in the end, only so that nothing is asked twice; a killed process leaves no lock.
        """
        self._locks.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._locks / f"{batch_id}.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise InUse(f"{batch_id} is being worked on by process {file.read().strip() or '?'}") from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    async def cancel(self, batch: Batch) -> None:
        """Say that a batch is to be ended; whoever works on it sees that in a few seconds."""
        await self.objects.create(batch.layout.root + CANCELLED, orjson.dumps({"at": time.time()}))

    async def is_cancelled(self, batch: Batch) -> bool:
        return await self.objects.exists(batch.layout.root + CANCELLED)

    # --- working on it -----------------------------------------------------------------------------------------------

    def page(self, batch: Batch, *, url: str | None, width: int, attempts: int, timeout_seconds: float) -> Page:
        """The page of a batch. What is not its identity may differ from one go to the next."""
        order = batch.order
        return Page(
            name=batch.id,
            uid=batch.id,
            fingerprint=batch.fingerprint,
            input=order.input,
            outputs=Outputs(
                self.location,
                merge="Never",
                sidecars=order.sidecars,
                parquet=order.parquet,
                existing=order.existing,
            ),
            target=Target(
                url or order.url,
                order.kind,
                order.model,
                batch.pipeline.get("revision"),
                timeout_seconds=timeout_seconds,
            ),
            options=order.options,
            chunk_size=CHUNK_SIZE,
            max_in_flight=width,
            max_attempts=attempts,
        )

    def preview(self, order: Order) -> Page:
        """The page that an order would have, for those who only look."""
        batch = Batch(order, "0" * 12, {}, 0.0)
        return self.page(batch, url=None, width=1, attempts=1, timeout_seconds=1.0)

    async def begun(self, page: Page, plan: Plan) -> Begun:
        """How far a batch is, by what lies there; what a killed process said of open chunks is not believed."""
        layout = layout_of(page)
        done = 0
        for key in await self.objects.keys(layout.root + PARTS):
            shard, chunk = int(key.rsplit("/", 2)[1].removeprefix("shard-")), chunk_number(key)
            done += min(plan.chunk_size, plan.shards[shard].items - chunk * plan.chunk_size)
        progress = await progress_of(self.objects, layout)
        return Begun(done, min(done, progress.counts.failed if progress else 0))

    async def plan(self, page: Page) -> Plan:
        """The plan of a batch, made when there is none. Raises InputFault and the faults of the store."""
        return await plan_batch(page, self.objects)

    async def run(
        self,
        page: Page,
        plan: Plan,
        *,
        stop: Stop,
        api_key: str | None = None,
        on_line: Callable[[Line], None],
        on_waiting: Callable[[Waiting], None],
    ) -> Counts:
        """Do what is missing. Raises Stopped, and what ends a worker (`asking`, `shard`)."""
        layout = layout_of(page)
        async with new_client(page) as client:
            if api_key:
                client.headers.update({"x-api-key": api_key, "authorization": f"Bearer {api_key}"})
            pace = Pace(page.max_in_flight, readiness(page, client))
            stores = Stores.of(page, self.objects, plan.source)
            reuse = Reuse(self.objects, layout) if page.options.reuse else None
            asker = Asker(page, stores.fetch, pace, reuse=reuse, client=client)
            watching = asyncio.create_task(self._watch(layout, stop, lambda: on_waiting(pace.waiting)))
            try:
                counts = Counts()
                for shard in range(len(plan.shards)):
                    counts += await run_shard(
                        page,
                        plan,
                        shard,
                        self.objects,
                        asker,
                        width=page.max_in_flight,
                        stop=stop,
                        on_line=on_line,
                        waiting=lambda: pace.waiting,
                    )
                return counts
            finally:
                watching.cancel()
                await pace.aclose()

    async def _watch(self, layout: Layout, stop: Stop, tick: Callable[[], None]) -> None:
        """Stop when somebody has cancelled the batch."""
        while True:
            tick()
            with contextlib.suppress(Exception):  # the store may be away for a while
                if await self.objects.exists(layout.root + CANCELLED):
                    stop.now()
                    return
            await asyncio.sleep(WATCH_SECONDS)

    async def finish(self, page: Page, batch: Batch, ended: Ended | None = None) -> Manifest:
        """Verify, make the outputs, and write the results where they were ordered."""
        sidecars = None if page.outputs.sidecars is None else open_location(page.outputs.sidecars)
        manifest = await finish(page, self.objects, sidecars=sidecars, ended=ended)
        await self.write(batch, manifest)
        return manifest

    async def finished(self, batch: Batch) -> Manifest | None:
        """The manifest of a batch that is whole; None while it is not."""
        return await read_manifest(self.objects, batch.layout)

    async def news(self, batch: Batch) -> int:
        """How many images more its folder has than when it was planned; other inputs are not looked at."""
        source, plan = batch.order.input, await read_plan(self.objects, batch.layout)
        if plan is None or source.kind != "prefix" or not source.location.url.startswith("file://"):
            return 0
        now = 0
        with contextlib.suppress(InputFault):
            async for _ in items_of(source, Stores(source.location)):
                now += 1
        return now - plan.items - plan.skipped

    async def write(self, batch: Batch, manifest: Manifest) -> None:
        """Write results, failures and table of a finished batch to their files, each at once or not at all."""
        plan = await read_plan(self.objects, batch.layout)
        if plan is None:
            raise PlanCorrupt("PLAN.json is missing")
        order = batch.order
        await self._write_lines(Path(order.out), batch, plan, "results")
        if manifest.counts.failed:
            await self._write_lines(order.errors, batch, plan, "errors")
        else:
            order.errors.unlink(missing_ok=True)
        if order.parquet:
            await _write(order.table, self.objects.stream(batch.layout.root + PARQUET))

    async def _write_lines(self, file: Path, batch: Batch, plan: Plan, which: Which) -> None:
        await _write(file, lines_of(self.objects, batch.layout, plan, which))


def retry_of(batch: Batch, location: Location, out: str, only: Literal["Failed", "Unenhanced"]) -> Order:
    """The order to do some items of a batch again."""
    root = replace(location, url=f"{location.url.rstrip('/')}/{batch.layout.root}")
    return replace(batch.order, input=Input("retry_of", root, only=only), out=out, existing="overwrite", number=1)


async def ask_pipeline(url: str, kind: Kind, model: str, api_key: str | None = None) -> dict[str, str]:
    """What the target says of itself: `revision`, and which models it has, as far as it says so. Raises Unreachable."""
    headers = {"x-api-key": api_key, "authorization": f"Bearer {api_key}"} if api_key else {}
    name = model if kind == "v2" else "pipeline"
    async with httpx.AsyncClient(trust_env=False, timeout=ASK_SECONDS, headers=headers) as client:
        try:
            answer = await client.get(f"{url.rstrip('/')}/v2/models/{name}")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Unreachable(f"nothing answers at {url}") from error
    said: dict[str, str] = {}
    if answer.status_code == 200:
        with contextlib.suppress(orjson.JSONDecodeError, AttributeError):
            found = orjson.loads(answer.content)
            known = {**found, **(found.get("parameters") or {})}
            said = {key: str(known[key]) for key in ("model", "model_revision", "enhancer_model") if known.get(key)}
    if revision := answer.headers.get(REVISION_HEADER):
        said["revision"] = revision
    return said


def check_pipeline(batch: Batch, now: Mapping[str, str]) -> None:
    """Raises PipelineChanged when what a batch was begun with is another thing now. What is not said is not known."""
    for name, before in batch.pipeline.items():
        if name in now and now[name] != before:
            raise PipelineChanged(f"the batch began with {name.replace('_', ' ')} {before}, and now it is {now[name]}")


async def _write(file: Path, pieces: AsyncGenerator[bytes]) -> None:
    """Write a file beside itself, then move it there: whoever reads it finds it whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with draft.open("wb") as target:
            async for piece in pieces:
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _beside(out: str, ending: str) -> Path:
    file = Path(out)
    return file.with_name((file.stem if file.suffix == ".jsonl" else file.name) + ending)


def _state_folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sightline"
