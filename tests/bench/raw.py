"""The least that an HTTP server in Python can do with a body: bare Starlette, which the floor is measured against.

python tests/bench/raw.py PORT
"""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def run(request: Request) -> JSONResponse:
    return JSONResponse({"text": str(len(await request.body())), "tokens": 0})


async def ready(request: Request) -> JSONResponse:
    return JSONResponse(True)


if __name__ == "__main__":
    app = Starlette(routes=[Route("/run", run, methods=["POST"]), Route("/ready", ready)])
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
