"""The HTTP side of a server: its routes, the limits of a request, errors as JSON, and the OpenAPI page."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import HTTPException as FastApiError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as HttpError
from starlette.requests import ClientDisconnect

import lightkit
from lightkit.app.serving.dispatch import Dispatcher
from lightkit.app.serving.messages import Reply, Request, RequestError
from lightkit.app.serving.openapi import predict_operation
from lightkit.app.serving.settings import ServerSettings

# A client reads no answer before it has sent its body: so many bytes beyond the limit are read and thrown away.
_DISCARDED = 64 << 20

# The seconds after which a client may try again, where all places are taken.
_RETRY_AFTER = "1"

_JSON = "application/json"

# Recent versions of FastAPI pass on every request to OpenTelemetry, where that is installed; earlier ones ignore this.
_NO_TELEMETRY = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)


def build_app(description: dict[str, Any], settings: ServerSettings, dispatcher: Dispatcher) -> FastAPI:
    """Returns the application of a server.

    Args:
        description: the description of the model: see `lightkit.app.serving.responder.describe`.
        settings: the settings of the server.
        dispatcher: what answers the requests.
    """
    about = description["about"]
    app = FastAPIOffline(
        title=f"lightkit: {about['task']} of {about['kind']}",
        version=lightkit.__version__,
        docs_url="/docs",
        redoc_url=None,
        telemetry=_NO_TELEMETRY,
        exception_handlers={HttpError: _explain, FastApiError: _explain, Exception: _explain_fault},
    )
    limits = {
        "max_body_mb": settings.max_body_mb,
        "max_waiting": settings.max_waiting,
        "timeout": settings.timeout,
    }

    @app.post("/predict", openapi_extra=predict_operation(description), summary=f"Predict for {about['kind']}")
    async def predict(request: HttpRequest) -> Response:
        try:
            with dispatcher.place():
                reply = await dispatcher.submit(await _read(request, settings))
        except RequestError as error:
            reply = Reply.error(error.status, str(error))
        except ClientDisconnect:
            reply = Reply.error(400, "the client has gone before it had sent the body")
        headers = {"Retry-After": _RETRY_AFTER} if reply.status == 503 else None
        return Response(reply.body, reply.status, headers, _JSON)

    @app.get("/info", summary="Describe the model, its input and the limits of a request")
    async def info() -> dict[str, Any]:
        return {**about, "options": [*description["options"], *description["file_options"]], "limits": limits}

    @app.get("/health", summary="Tell whether requests are answered")
    async def health() -> JSONResponse:
        if dispatcher.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "no worker is ready"}, 503)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")

    return app


async def _read(request: HttpRequest, settings: ServerSettings) -> Request:
    """Reads a request.

    Raises:
        RequestError: the body is too large or comes too slowly, or a parameter of the query stands twice.
    """
    query = dict(request.query_params)
    if len(query) < len(request.query_params.multi_items()):
        raise RequestError(400, "each parameter of the query may stand once")
    try:
        body = await asyncio.wait_for(_read_body(request, settings.max_body_bytes), settings.timeout)
    except asyncio.TimeoutError as error:
        raise RequestError(408, f"the body has not come within {settings.timeout:g} seconds") from error
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return Request(body, media_type, query)


async def _read_body(request: HttpRequest, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared) > limit
    parts: list[bytes] = []
    length = 0
    async for part in request.stream():
        length += len(part)
        is_too_large = is_too_large or length > limit
        if is_too_large:
            parts.clear()
            if length > limit + _DISCARDED:
                break
        else:
            parts.append(part)
    if is_too_large:
        raise RequestError(413, f"the body must have at most {limit:,} bytes, got {declared or f'more than {limit}'}")
    return b"".join(parts)


async def _explain(request: HttpRequest, error: Exception) -> JSONResponse:
    """Returns an error of a route, such as that of an unknown one, as JSON."""
    assert isinstance(error, HttpError)
    if error.status_code == 404:
        message = f"there is no {request.url.path}; POST /predict answers requests, and GET /docs describes them"
    elif error.status_code == 405:
        message = f"{request.url.path} takes no {request.method}; POST /predict answers requests"
    else:
        message = str(error.detail)
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _explain_fault(request: HttpRequest, error: Exception) -> JSONResponse:
    """Returns the answer to a fault of the server, whose traceback goes to its log."""
    return JSONResponse({"error": "the server has failed to answer this request"}, 500)
