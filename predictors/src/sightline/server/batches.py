"""The files and batches of a gateway, put together: the routes, the desk behind them, and who does the requests."""

import time
from collections.abc import Iterable

from fastapi import APIRouter
from starlette.types import ASGIApp

from sightline.jobs.objects import Objects, open_store
from sightline.jobs.openai.batch import Backend
from sightline.jobs.openai.cluster import ClusterBackend
from sightline.jobs.openai.desk import Desk
from sightline.jobs.openai.files import Files
from sightline.jobs.openai.kubernetes import VisionBatches
from sightline.jobs.openai.local import LocalBackend
from sightline.server.batch_calls import BatchCalls
from sightline.server.openai_batches import OpenAIBatches
from sightline.settings import PipelineSettings


class GatewayBatches:
    """What a gateway has beside its model.

    models   names that a request of a batch may ask for
    app      the application that requests are asked of, guard included; not called before `start`
    """

    def __init__(self, settings: PipelineSettings, models: Iterable[str], app: ASGIApp) -> None:
        self._settings = settings
        self._calls = BatchCalls(app, width=settings.batch_width, seconds=settings.deadline_seconds)
        self._desk = Desk(self._open_store, self._files, self._backend)
        self._routes = OpenAIBatches(settings, self._desk, frozenset(models))

    def router(self) -> APIRouter:
        return self._routes.router()

    def start(self) -> None:
        """Open the store behind the start of the server."""
        self._desk.start()

    async def close(self) -> None:
        await self._desk.close()
        await self._calls.aclose()

    def _open_store(self) -> Objects:
        told = self._settings
        store = open_store(told.job_store, told.model_name, endpoint_url=told.s3_endpoint_url, region=told.aws_region)
        return Objects(store, where=told.job_store or f"this user's folder for {told.model_name}")

    def _files(self, objects: Objects) -> Files:
        return Files(objects, ttl_seconds=self._settings.file_ttl_seconds)

    def _backend(self, objects: Objects, files: Files) -> Backend:
        told = self._settings
        if told.batch_backend == "kubernetes":
            cluster = VisionBatches.inside(told.service_account_folder)
            pipeline = told.batch_pipeline or ""
            return ClusterBackend(cluster, objects, pipeline=pipeline, ttl_seconds=told.file_ttl_seconds)
        return LocalBackend(
            objects, files, self._calls, width=told.batch_width, ttl_seconds=told.file_ttl_seconds, clock=time.time
        )
