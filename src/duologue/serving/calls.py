"""`/v1/realtime/calls`: opens a real-time session over WebRTC. The client sends an SDP offer and gets an SDP answer."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers, UploadFile
from starlette.types import ASGIApp, Receive, Scope, Send

from duologue.serving.client_secrets import ClientSecrets
from duologue.serving.errors import ApiError, documented
from duologue.serving.middleware import CALLS
from duologue.serving.objects import find_voice
from duologue.serving.realtime import ConnectionManager
from duologue.serving.tools import check_tools

MAX_SDP = 200_000  # characters
_OFFER = {"schema": {"type": "string"}}


class CallOrigins(CORSMiddleware):
    """CORS for the pages that client secrets were made for: they may open calls."""

    def __init__(self, app: ASGIApp, secrets: ClientSecrets) -> None:
        super().__init__(app, allow_methods=["POST"], allow_headers=["*"], expose_headers=["Location"])
        self._secrets = secrets

    def is_allowed_origin(self, origin: str) -> bool:
        return self._secrets.has_origin(origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_call = scope["type"] == "http" and scope["path"] == CALLS
        if is_call and self.is_allowed_origin(Headers(scope=scope).get("origin", "")):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def call_routes(connections: ConnectionManager) -> APIRouter:
    router = APIRouter()
    service = connections.service

    @router.post(
        CALLS,
        tags=["realtime"],
        summary="Open a session over WebRTC",
        status_code=201,
        response_class=Response,
        responses={
            201: {"description": "The SDP answer; `Location` names the call.", "content": {"application/sdp": {}}},
            **documented(400, 413, 429, 501, 503),
        },
        openapi_extra={"requestBody": {"content": {"application/sdp": _OFFER, "multipart/form-data": {}}}},
    )
    async def calls(request: Request, model: str = "") -> Response:
        key, config = connections.admit(request.headers, model)
        if importlib.util.find_spec("aiortc") is None:
            raise ApiError(
                "this server has no WebRTC: run pip install -e '.[webrtc]' in the folder of Duologue",
                "webrtc_not_installed",
                status=501,
            )
        from duologue.serving.call import Call

        offer, session = await _offer(request)
        config = config.updated({**session, "model": config.model or session.get("model") or model})
        find_voice(service.bot.models.card, config.audio.output.voice, "session.audio.output.voice")
        check_tools(service.bot.models.calls_tools, config.tools, config.tool_choice, "session")
        call = Call()
        answer = await call.answer(offer)
        try:
            connections.start_call(call, config, key)
        except BaseException:
            await call.close()
            raise
        return Response(answer, 201, {"Location": f"{CALLS}/{call.id}"}, media_type="application/sdp")

    return router


async def _offer(request: Request) -> tuple[str, dict[str, Any]]:
    """Returns the SDP offer and the session of a request: plain SDP, or a form with `sdp` and `session` (JSON)."""
    session: Any = {}
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        form = await request.form()
        parts = {name: await _text(part) for name, part in form.items()}
        offer = parts.get("sdp", "")
        try:
            session = json.loads(parts.get("session") or "{}")
        except (ValueError, RecursionError):
            raise ApiError("session is not JSON", "invalid_json", "session") from None
    else:
        offer = (await request.body()).decode("utf-8", "replace")
    if not isinstance(session, dict):
        raise ApiError("session is not a JSON object", param="session")
    if not offer or len(offer) > MAX_SDP:
        raise ApiError("the request holds no SDP offer", "missing_required_parameter", "sdp")
    return offer, session


async def _text(part: str | UploadFile) -> str:
    return part if isinstance(part, str) else (await part.read()).decode("utf-8", "replace")
