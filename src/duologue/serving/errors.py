"""Errors in OpenAI's format, without tracebacks: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from duologue.conversation.worker import WorkerFull
from duologue.language.requests import EngineFull
from duologue.serving.admission import AdmissionError
from duologue.serving.metrics import Metrics
from duologue.serving.objects import ProtocolError, explain_faults
from duologue.text import valid_unicode

logger = logging.getLogger("duologue.serving")

RETRY_AFTER_S = 2
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


class ErrorDetails(BaseModel):
    """Details of an error; `param` is the path of the faulty field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetails


class ApiError(Exception):
    """A request that cannot be fulfilled. Its message is sent to the client."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.code, self.param, self.status = message, code, param, status


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the error responses of a route for OpenAPI. Those of every guarded route are included."""
    texts = {
        400: "The request is invalid.",
        401: "The API key is missing or wrong.",
        403: "The page or the host name is not allowed.",
        404: "Not found.",
        413: "The body is too large.",
        429: "The server is busy.",
        500: "The server failed.",
        501: "The server was installed without this part.",
        503: "The server is stopping.",
    }
    return {status: {"model": ErrorBody, "description": texts[status]} for status in (401, 403, 500, *statuses)}


def error_json(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    kind = "authentication_error" if status == 401 else "permission_error" if status == 403 else kind
    return {"error": {"message": valid_unicode(message), "type": kind, "param": param, "code": code}}


def error_response(message: str, status: int, code: str | None = None, param: str | None = None) -> JSONResponse:
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_json(message, status, code, param), status, headers)


def error_fields(error: Exception) -> tuple[str, int, str | None, str | None]:
    """Returns message, status, code and param of any exception. Server errors reveal no details."""
    if isinstance(error, ApiError):
        return error.message, error.status, error.code, error.param
    if isinstance(error, ProtocolError):
        return error.message, 400, error.code, error.param
    if isinstance(error, AdmissionError):
        return error.message, error.status, error.code, None
    if isinstance(error, EngineFull | WorkerFull):
        return str(error), 429, "server_busy", None
    logger.error("a request failed", exc_info=error)
    return "the server failed to answer; see its log", 500, "server_error", None


def sse(data: dict[str, Any]) -> bytes:
    """Returns one server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


async def sse_with_errors(
    events: AsyncGenerator[bytes, None], metrics: Metrics, **head: str
) -> AsyncGenerator[bytes, None]:
    """Yields server-sent events. An error after the first one becomes the last event: the status has been sent."""
    begun = False
    async with aclosing(events):
        try:
            async for event in events:
                yield event
                begun = True
        except Exception as error:
            if not begun:
                raise
            message, status, code, param = error_fields(error)
            metrics.errors.labels(code or "other").inc()
            yield sse({**head, **error_json(message, status, code, param)})


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Converts every error of the app to OpenAI's format."""

    def answer(message: str, status: int, code: str | None = None, param: str | None = None) -> JSONResponse:
        metrics.errors.labels(code or "other").inc()
        return error_response(message, status, code, param)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        if faults[0]["type"] == "json_invalid":
            return answer(f"the body is not JSON: {faults[0]['ctx']['error']}", 400, "invalid_json")
        if faults[0]["type"] == "missing" and len(faults[0]["loc"]) == 1:
            return answer("the request has no body", 400, "missing_required_parameter")
        inside = [{**fault, "loc": fault["loc"][1:]} for fault in faults]
        message, code, param = explain_faults(inside, error.body, "parameter of this route")
        return answer(message, 400, code, valid_unicode(param) or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no page or route at {request.url.path}",
            405: f"{request.method} is not allowed here",
        }
        response = answer(
            message.get(error.status_code, str(error.detail)), error.status_code, _CODES.get(error.status_code)
        )
        response.headers.update(error.headers or {})
        return response

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return answer(*error_fields(error))

    for kind in (ApiError, ProtocolError, AdmissionError, EngineFull, WorkerFull, Exception):
        app.add_exception_handler(kind, ours)
