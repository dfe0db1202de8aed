"""Middleware for every HTTP request: checks host, origin, key and body size; adds security headers and counts
responses."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duologue.serving.admission import Admission, AdmissionError
from duologue.serving.errors import error_response
from duologue.serving.metrics import Metrics
from duologue.serving.settings import Settings

# Probes may use any host name; they reveal only that the server is alive.
OPEN_PATHS = ("/healthz", "/readyz")

# Its route checks the client itself: client secrets are keys there.
CALLS = "/v1/realtime/calls"

# The page loads nothing from other origins. Only pages of allowed origins may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors "
    ),
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class RequestGuard:
    """ASGI middleware around the app. WebSockets pass, because their route sends its own errors."""

    def __init__(self, app: ASGIApp, settings: Settings, admission: Admission, metrics: Metrics) -> None:
        self._app, self._settings, self._admission, self._metrics = app, settings, admission, metrics
        frames = " ".join(("'self'", *settings.allowed_origins)) if settings.allowed_origins else "'none'"
        policy = PAGE_HEADERS["Content-Security-Policy"] + frames
        self._page_headers = {**HEADERS, **PAGE_HEADERS, "Content-Security-Policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", None) or "other"
                self._metrics.requests.labels(route, str(message["status"])).inc()
                given = MutableHeaders(scope=message)
                own = HEADERS if scope["path"].startswith("/v1/") else self._page_headers
                for name, value in own.items():
                    given.setdefault(name, value)
            try:
                async with asyncio.timeout(self._settings.stall_s):
                    await send(message)
            except TimeoutError:
                self._metrics.errors.labels("stalled").inc()
                raise ClientDisconnect from None

        try:
            if scope["path"] not in (*OPEN_PATHS, CALLS):
                self._admission.check_address(headers.get("host"), headers.get("origin"))
            if (scope["path"].startswith("/v1/") and scope["path"] != CALLS) or scope["path"] == "/metrics":
                self._admission.check_key(headers.get("authorization"))  # before a body is read
            length = headers.get("content-length", "")
            if length.isdecimal() and int(length) > self._settings.max_upload_bytes:
                raise AdmissionError(413, "too_large", self._too_large)
        except AdmissionError as error:
            self._metrics.errors.labels(error.code).inc()
            await error_response(error.message, error.status, error.code)(scope, receive, counted)
            return
        # No error is sent to a client that is gone; its work has been cancelled.
        with suppress(ClientDisconnect):
            await self._app(scope, self._bounded(receive), counted)

    def _bounded(self, receive: Receive) -> Receive:
        """Limits a body that did not declare its length."""
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._settings.max_upload_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return bounded

    @property
    def _too_large(self) -> str:
        return f"a request may have at most {self._settings.max_upload_bytes} bytes"
