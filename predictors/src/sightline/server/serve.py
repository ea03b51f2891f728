"""From settings to a running process: one FastAPI application of one or several predictors, on KServe's ModelServer."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import FrameType
from typing import cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from kserve import ModelServer
from kserve.model import BaseKServeModel
from kserve.protocol.rest.server import RESTServer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.loops.auto import auto_loop_factory

from sightline import __version__
from sightline.configuration import Configured, configure, local_steps
from sightline.errors import InvalidParameter
from sightline.reload import serve_reloading
from sightline.server.allocator import return_memory
from sightline.server.batches import GatewayBatches
from sightline.server.docs import add_docs
from sightline.server.grpc import GrpcServer
from sightline.server.guard import Guard
from sightline.server.keys import Keys
from sightline.server.local import LocalStep
from sightline.server.model import MODELS, PipelineModel, PredictorModel
from sightline.server.native import NativeRoutes
from sightline.server.openai import OpenAI
from sightline.server.openai_batches import upload_limits
from sightline.server.protocols import Protocols
from sightline.server.rendering import error_body, error_headers, error_status, translate
from sightline.services.base import context_of
from sightline.services.bodies import json_response
from sightline.settings import BlipSettings, EngineSettings, ServerSettings, shown

log = logging.getLogger("sightline.server")

FAULT_SECONDS = 0.5
"""How often models are asked whether they still can answer."""


def build_models(configured: Mapping[str, Configured]) -> dict[str, PredictorModel]:
    """The models of one process. A gateway takes the steps that are served beside it without HTTP.

    Raises ValueError when two of them have one name.
    """
    gateways = [kind for kind in configured if kind == "pipeline"]  # last: they wait for their steps
    models: dict[str, PredictorModel] = {}
    for kind in [*(kind for kind in configured if kind not in gateways), *gateways]:
        steps = {_STEPS[step]: LocalStep(models[step]) for step in local_steps(configured)} if kind in gateways else {}
        models[kind] = MODELS[kind](configured[kind].settings, **steps)  # type: ignore[arg-type, call-arg]
    names = [model.name for model in models.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"two predictors have one name: {', '.join(names)}")
    return models


_STEPS: Mapping[str, str] = {"describe": "caption", "enhance": "enhance"}


def build_app(models: Mapping[str, PredictorModel], settings: ServerSettings) -> FastAPI:
    """One application: the models' own routes, then V1 and V2; KServe's are added at start.

    models   by predictor name
    Raises ValueError or OSError when no API key can be had.
    """
    keys = Keys(settings)
    grpc = GrpcServer(list(models.values()), settings, keys) if settings.grpc_port else None

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        if grpc is not None:
            await grpc.start()
        if batches is not None:
            batches.start()
        yield
        if batches is not None:
            await batches.close()
        if grpc is not None:
            await grpc.stop()
        await _shut_down(list(models.values()))

    app = FastAPI(
        title=f"Sightline {', '.join(model.name for model in models.values())}",
        description="\n\n".join(type(model.service).__doc__ or "" for model in models.values()),
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    gateway = next((item.settings for item in models.values() if isinstance(item, PipelineModel)), None)
    batches = None if gateway is None else GatewayBatches(gateway, [model.name for model in models.values()], app)
    NativeRoutes(models).include_in(app)
    app.include_router(OpenAI(list(models.values()), settings.max_request_bytes).router())
    if batches is not None:
        app.include_router(batches.router())
    app.include_router(Protocols(list(models.values()), settings.max_request_bytes).router())
    add_docs(app, asks_for_keys=not keys.is_off)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_middleware(Guard, settings=settings, keys=keys, limits=upload_limits(gateway) if gateway else None)
    app.state.grpc = grpc
    return app


async def _shut_down(models: Sequence[PredictorModel]) -> None:
    """The gateway first, then its steps; what one of them raises keeps no other from closing."""
    for model in reversed(models):
        try:
            await model.shut_down()
        except Exception:
            log.exception("could not close model=%s", model.name)


async def _answer(request: Request, error: Exception) -> Response:
    """Unknown routes and parameters that FastAPI itself refused."""
    if isinstance(error, RequestValidationError):
        error = InvalidParameter("The request has an invalid parameter.")
    known = translate(error)
    assert known is not None  # noqa: S101 - both registered kinds are known
    allowed = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    path = request.url.path
    body = error_body(path, known, context_of(request).request_id)
    return json_response(body, status_code=error_status(path, known), headers=error_headers(known) | allowed)


class _RESTServer(RESTServer):
    """KServe's REST server around an application of ours, on a host of our choice.

    KServe 0.21 has a module-level application, listens on 0.0.0.0, and answers every unknown exception with its text.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings, server: ModelServer) -> None:
        super().__init__(
            app,  # type: ignore[arg-type]  # uvicorn takes the object as well as its name
            server.dataplane,
            server.model_repository_extension,
            settings.port,
            grace_period=settings.grace_seconds,
        )
        self._app = app
        self.config.host = settings.host
        self.config.access_log = False  # the guard writes one line with more in it
        self._grpc: GrpcServer | None = app.state.grpc
        self._drain_http = self._server.shutdown
        self._server.shutdown = self._drain

    @property
    def is_stopping(self) -> bool:
        return self._server.should_exit

    async def start(self) -> None:
        """Serve. Raises RuntimeError when a port could not be had; uvicorn would leave with codes of its own."""
        try:
            await super().start()
        except SystemExit as error:
            raise RuntimeError("the server could not start") from error

    async def _drain(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting on both ports at once, answer what is running."""
        grpc = [] if self._grpc is None else [self._grpc.stop()]
        await asyncio.gather(self._drain_http(sockets), *grpc)

    def stop_soon(self) -> None:
        """Stop accepting, answer what is running, end."""
        self._server.should_exit = True

    def create_application(self) -> None:
        """Add KServe's routes behind ours. Its error handlers and log-heavy timing layer are the guard's job here."""
        self._register_endpoints(self._app)


class _ModelServer(ModelServer):
    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        super().__init__(
            http_port=settings.port,
            enable_grpc=False,
            workers=1,
            grace_period=settings.grace_seconds,
        )
        self._rest_server = _RESTServer(app, settings, self)

    def start(self, models: list[BaseKServeModel]) -> None:
        """Serve until SIGTERM or SIGINT; returns when running requests are answered."""
        for model in models:
            self.register_model(model)
        # uvicorn has handlers of its own while it serves, and raises what it caught again when it has drained;
        # with Python's default handler that would be death by signal instead of exit code 0.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_soon)
        # uvloop where it is there; asyncio's own loop was a quarter of a request without a model (docs/profile.md).
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            runner.run(self._serve_while_loading(cast("list[PredictorModel]", models)))

    def _stop_soon(self, number: int, frame: FrameType | None) -> None:
        self._rest_server.stop_soon()

    async def _serve_while_loading(self, models: Sequence[PredictorModel]) -> None:
        """Run the web server and the loading together; when one of them fails, or a model for good, all ends."""
        serving = asyncio.ensure_future(self._rest_server.start())
        loading = asyncio.ensure_future(self._load_in_turn(models))
        watching = asyncio.ensure_future(_until_fault(models))
        serving.add_done_callback(lambda _: watching.cancel())
        await asyncio.wait([serving, loading, watching], return_when=asyncio.FIRST_EXCEPTION)
        if not serving.done():
            self._rest_server.stop_soon()  # as at any other end, so that everything is closed
            await asyncio.wait([serving])
        for task in (loading, watching, serving):
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _load_in_turn(self, models: Sequence[PredictorModel]) -> None:
        """One after the other: the first answers soonest, and no two need their loading memory at once."""
        for model in models:
            if self._rest_server.is_stopping:
                return
            await model.start_engine()


async def _until_fault(models: Sequence[PredictorModel]) -> None:
    """Raise RuntimeError when a model will answer no more: whoever runs this process starts it again."""
    while all(model.fault is None for model in models):
        await asyncio.sleep(FAULT_SECONDS)
    raise RuntimeError("; ".join(f"{model.name}: {model.fault}" for model in models if model.fault))


def serve(configured: Mapping[str, Configured]) -> int:
    """Serve until told to stop. Returns the process's exit code."""
    settings = next(iter(configured.values())).settings  # what the process has once, each of them has
    try:
        models = build_models(configured)
        app = build_app(models, settings)
    except (ValueError, OSError) as error:
        log.error("cannot start: %s", error)
        return 1
    if settings.auth == "off":
        log.warning(
            "authentication is OFF: anybody who reaches %s:%s may use it",
            settings.host,
            settings.port,
        )
    try:
        _ModelServer(app, settings).start(list(models.values()))
    except Exception as error:
        log.critical("stopped: %s: %s", type(error).__name__, error, exc_info=error)
        return 1
    return 0


def read_command(argv: Sequence[str], prog: str) -> dict[str, Configured]:
    """`NAME… [flags]`, or `all [flags]`, as settings. Raises SystemExit."""
    count = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    names = list(MODELS) if list(argv[:count]) == ["all"] else list(dict.fromkeys(argv[:count]))
    if not names or not MODELS.keys() >= set(names):
        sys.stderr.write(f"usage: {prog} {{{','.join([*MODELS, 'all'])}}} … [flags]; --help after a name lists them\n")
        raise SystemExit(0 if "--help" in argv else 2)
    return configure({name: MODELS[name].settings_type for name in names}, argv[count:], prog=prog)


def main(argv: Sequence[str]) -> int:
    """`sightline serve NAME… [flags]`."""
    configured = read_command(argv, "sightline serve")
    return_memory()
    _configure_logging(next(iter(configured.values())).settings)
    for kind, item in configured.items():
        log.info("settings predictor=%s %s", kind, shown(item.settings))
        if isinstance(item.settings, EngineSettings) and (token := item.settings.hf_token) is not None:
            os.environ["HF_TOKEN"] = token.get_secret_value()  # its libraries look for it there, and only there
    if any(isinstance(item.settings, BlipSettings) and item.settings.reload for item in configured.values()):
        return serve_reloading(argv)
    return serve(configured)


def _configure_logging(settings: ServerSettings) -> None:
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    if settings.log_format == "json":
        form = '{"time":"%(asctime)s","level":"%(levelname)s","logger":"%(name)s","message":%(json)s}'
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(form))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    # KServe configures its loggers, with handlers of their own, unless they have one.
    logging.getLogger("kserve").addHandler(logging.NullHandler())
    for noisy in ("kserve", "httpx", "httpcore", "botocore", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        import json

        record.json = json.dumps(record.getMessage(), ensure_ascii=False)
        return super().format(record)
