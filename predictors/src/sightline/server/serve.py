"""From settings to a running process: one FastAPI application, served by KServe's ModelServer."""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncGenerator
from types import FrameType

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from kserve import ModelServer
from kserve.model import BaseKServeModel
from kserve.protocol.rest.server import RESTServer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sightline import __version__
from sightline.errors import InvalidParameter
from sightline.server.guard import Guard
from sightline.server.keys import Keys
from sightline.server.model import PredictorModel
from sightline.server.protocols import Protocols
from sightline.server.rendering import error_body, error_headers, translate
from sightline.services.base import context_of
from sightline.services.bodies import json_response
from sightline.settings import ServerSettings

log = logging.getLogger("sightline.server")


def build_app(model: PredictorModel, settings: ServerSettings) -> FastAPI:
    """The application of one model: its own routes, then V1 and V2; KServe's are added at start.

    Raises ValueError or OSError when no API key can be had.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await model.shut_down()

    app = FastAPI(
        title=f"Sightline {model.name}",
        description=type(model.service).__doc__ or "",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
    )
    app.include_router(model.service.router(model.run))
    app.include_router(Protocols([model], settings.max_request_bytes).router())
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_middleware(Guard, settings=settings, keys=Keys(settings))
    return app


async def _answer(request: Request, error: Exception) -> Response:
    """Unknown routes and parameters that FastAPI itself refused."""
    if isinstance(error, RequestValidationError):
        error = InvalidParameter("The request has an invalid parameter.")
    known = translate(error)
    assert known is not None  # noqa: S101 - both registered kinds are known
    allowed = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    body = error_body(request.url.path, known, context_of(request).request_id)
    return json_response(body, status_code=known.status, headers=error_headers(known) | allowed)


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
        self._register_and_check_atleast_one_model_is_ready(models)
        self.servers.append(self._rest_server.start())
        # uvicorn has handlers of its own while it serves, and raises what it caught again when it has drained;
        # with Python's default handler that would be death by signal instead of exit code 0.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_soon)
        asyncio.run(self._serve())

    def _stop_soon(self, number: int, frame: FrameType | None) -> None:
        self._rest_server.stop_soon()

    async def _serve(self) -> None:
        """Run the web server and the loading together; when the server ends, so does the loading."""
        rest, *loading = [asyncio.ensure_future(server) for server in reversed(self.servers)]
        done, _ = await asyncio.wait([rest, *loading], return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            if (error := task.exception()) is not None:
                raise error


def serve(model_type: type[PredictorModel], settings: ServerSettings) -> int:
    """Serve one model until told to stop. Returns the process's exit code."""
    try:
        model = model_type(settings)  # type: ignore[arg-type]  # each subclass takes its own settings
        app = build_app(model, settings)
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
        _ModelServer(app, settings).start([model])
    except Exception as error:
        log.critical("stopped: %s: %s", type(error).__name__, error, exc_info=error)
        return 1
    return 0


def main(argv: list[str]) -> int:
    """`sightline serve NAME [flags]`."""
    from sightline.server.model import MODELS
    from sightline.settings import load, shown

    if not argv or argv[0] not in MODELS:
        sys.stderr.write(f"usage: sightline serve {{{','.join(MODELS)}}} [flags]; --help after a name lists them\n")
        return 0 if argv[:1] == ["--help"] else 2
    name, *argv = argv
    model_type = MODELS[name]
    settings = load(model_type.settings_type, argv, prog=f"sightline serve {name}")
    _configure_logging(settings)
    log.info("settings %s", shown(settings))
    return serve(model_type, settings)


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
