"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`, never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from duologue.conversation.worker import WorkerFull
from duologue.language.requests import EngineFull
from duologue.serving.admission import Refused
from duologue.serving.metrics import Metrics

logger = logging.getLogger("duologue.serving")

RETRY_AFTER_S = 2
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


class ErrorDetails(BaseModel):
    """What went wrong; `param` is the path of the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetails


class ApiError(Exception):
    """A request that cannot be fulfilled, told to its client."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.code, self.param, self.status = message, code, param, status


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its OpenAPI document. Those that every guarded route may give need no naming."""
    texts = {
        400: "The request is not one that this route takes.",
        401: "No API key, or a wrong one.",
        403: "The page or the host name is not allowed.",
        404: "There is no such thing.",
        413: "The body is larger than the server takes.",
        429: "The server works on as many requests as it may.",
        500: "The server failed.",
        503: "The server is stopping.",
    }
    return {status: {"model": ErrorBody, "description": texts[status]} for status in (401, 403, 500, *statuses)}


def error_json(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    kind = "authentication_error" if status == 401 else "permission_error" if status == 403 else kind
    return {"error": {"message": _sendable(message), "type": kind, "param": param, "code": code}}


def error_response(message: str, status: int, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error as an answer."""
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_json(message, status, code, param), status, headers)


def told(error: Exception) -> tuple[str, int, str | None, str | None]:
    """message, status, code and param of any exception; what is not the client's fault is told without details."""
    if isinstance(error, ApiError):
        return error.message, error.status, error.code, error.param
    if isinstance(error, Refused):
        return error.message, error.status, error.code, None
    if is_full(error):
        return str(error), 429, "server_busy", None
    logger.error("a request failed", exc_info=error)
    return "the server failed to answer; its log says why", 500, "server_error", None


def is_full(error: Exception) -> bool:
    """Do the models have no room for more at the moment?"""
    return isinstance(error, EngineFull | WorkerFull)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Every error of the app becomes one of ours."""

    def answer(message: str, status: int, code: str | None = None, param: str | None = None) -> JSONResponse:
        metrics.errors.labels(code or "other").inc()
        return error_response(message, status, code, param)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(*_explained(error.errors()[0], error.body))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not possible here"}
        response = answer(
            message.get(error.status_code, str(error.detail)), error.status_code, _CODES.get(error.status_code)
        )
        response.headers.update(error.headers or {})
        return response

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return answer(*told(error))

    for kind in (ApiError, Refused, EngineFull, WorkerFull, Exception):
        app.add_exception_handler(kind, ours)


def _explained(fault: dict[str, Any], body: Any) -> tuple[str, int, str, str | None]:
    """A fault of a request, with the path of its field."""
    param = _sendable(".".join(_path(fault["loc"][1:], body))) or None
    if fault["type"] == "missing":
        return (f"{param} is missing" if param else "the request has no body"), 400, "missing_required_parameter", param
    if fault["type"] == "extra_forbidden":
        return f"{param} is not a parameter of this route", 400, "unknown_parameter", param
    text = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "json_invalid":
        return f"the body is not JSON: {fault.get('ctx', {}).get('error', text)}", 400, "invalid_json", None
    return f"{param or 'the body'}: {text[:1].lower()}{text[1:]}", 400, "invalid_value", param


def _path(location: Sequence[str | int], body: Any) -> list[str]:
    """Keys and positions in the body: the location also holds names of a union's branches, which no client knows."""
    path, value = [], body
    for index, part in enumerate(location):
        inside = part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int)
        if inside:
            value = value[part]
        if inside or (index == len(location) - 1 and (body is None or isinstance(value, Mapping))):
            path.append(str(part))
    return path


def _sendable(text: str) -> str:
    """Without halves of characters, which no UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()
