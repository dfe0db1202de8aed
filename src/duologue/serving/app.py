"""The web application: every route in one FastAPI app.

GET  /                          the web page
WS   /v1/realtime               live conversations
POST /v1/realtime/client_secrets  short-lived keys for web pages
POST /v1/realtime/calls         live conversations over WebRTC
POST /v1/audio/speech           text to speech
POST /v1/audio/transcriptions   speech to text
POST /v1/chat/completions       one answer, text and audio in and out
GET  /v1/models                 the served model
GET  /healthz /readyz /metrics  for operators
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.routing import Match, Mount
from starlette.types import Scope

from duologue.conversation.chatbot import Chatbot
from duologue.machine import version_of
from duologue.serving.calls import CallOrigins, call_routes
from duologue.serving.client_secrets import ClientSecrets, client_secret_routes
from duologue.serving.completions import completion_routes
from duologue.serving.errors import ApiError, add_error_handlers, documented
from duologue.serving.middleware import RequestGuard
from duologue.serving.realtime import ConnectionManager, realtime_routes
from duologue.serving.recording import remove_leftovers
from duologue.serving.service import Service
from duologue.serving.settings import Settings
from duologue.serving.speech import speech_routes
from duologue.serving.transcriptions import transcription_routes

PAGE = Path(__file__).parent / "static"


class ModelObject(BaseModel):
    """The served model and the choices it offers. `records` says that the server keeps every conversation."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "duologue"
    trained: bool
    languages: list[str]
    voices: list[str]
    transcribes: bool
    follows_instructions: bool = False
    num_parameters: int | None = None
    questions: list[str] = []
    records: bool = False


class ModelList(BaseModel):
    """The list of models, which holds one."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ServerStatus(BaseModel):
    status: str


class _Page(Mount):
    """Static files at the root. Paths of the API are left to its routes, so that a wrong method gets a 405."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.NONE, {}) if scope["path"].startswith("/v1/") else super().matches(scope)


def create_app(bot: Chatbot, settings: Settings | None = None) -> FastAPI:
    """Builds the app that serves one chatbot.

    `app.state.service` holds the state that the routes share. `app.state.service.admission.drain()` refuses new
    clients, and `await app.state.service.admission.wait_until_idle()` waits for the others.
    """
    service = Service(bot, settings or Settings())
    connections = ConnectionManager(service, ClientSecrets())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service.settings.record_folder is not None:
            service.settings.record_folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(service.settings.record_folder)
        yield
        service.admission.drain()
        await connections.end_calls()
        service.resumable.clear()

    app = FastAPI(title="Duologue", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    add_error_handlers(app, service.metrics)
    guarded = [Depends(service.key)]
    for routes in (speech_routes, transcription_routes, completion_routes):
        app.include_router(routes(service), dependencies=guarded)
    app.include_router(_model_routes(service), dependencies=guarded)
    app.include_router(_status_routes(service))
    app.include_router(client_secret_routes(service, connections.secrets), dependencies=guarded)
    app.include_router(realtime_routes(connections))
    app.include_router(call_routes(connections))
    app.router.routes.append(_Page("/", StaticFiles(directory=PAGE, html=True), name="page"))
    app.add_middleware(RequestGuard, settings=service.settings, admission=service.admission, metrics=service.metrics)
    # Outermost, so that an allowed page can read an error response.
    if service.settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.allowed_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # OpenAI's clients send `x-stainless-*`, `openai-organization` and more
            expose_headers=["Location", "Retry-After"],
        )
    app.add_middleware(CallOrigins, secrets=connections.secrets)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["models"])
    models = service.bot.models
    served = ModelObject(
        id=service.model,
        trained=models.card.trained,
        languages=list(models.card.languages),
        voices=list(models.card.voices),
        transcribes=models.recognizer is not None,
        follows_instructions=models.card.follows_instructions,
        num_parameters=models.num_parameters,
        questions=list(models.card.questions),
        records=service.settings.record_folder is not None,
    )

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", summary="List the models", responses=documented())
    async def all_models() -> ModelList:
        return ModelList(data=[served])

    @router.head("/v1/models/{model}", include_in_schema=False)
    @router.get("/v1/models/{model}", summary="Describe one model", responses=documented(404))
    async def one_model(model: str) -> ModelObject:
        if model != served.id:
            raise ApiError(f"there is no model {model!r} here, only {served.id!r}", "model_not_found", "model", 404)
        return served

    return router


def _status_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["server"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", summary="Liveness")
    async def healthz() -> ServerStatus:
        return ServerStatus(status="ok")

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", summary="Readiness for new conversations", responses={503: {"model": ServerStatus}})
    async def readyz() -> JSONResponse:
        if service.admission.draining.is_set():
            return JSONResponse(ServerStatus(status="stopping").model_dump(), 503)
        return JSONResponse(ServerStatus(status="ready").model_dump())

    @router.head("/metrics", include_in_schema=False, dependencies=[Depends(service.key)])
    @router.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        dependencies=[Depends(service.key)],
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented()},
    )
    async def metrics() -> Response:
        gather = service.gather_metrics
        page = service.metrics.exposition() if gather is None else await gather()
        return Response(page, media_type=service.metrics.content_type)

    return router


def _document(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document. Validation errors are 400 here, not FastAPI's 422."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=version_of("duologue"),
            summary="A spoken chatbot: it listens, thinks and answers aloud.",
            description="Live conversations are at the WebSocket `/v1/realtime`, see docs/protocol.md.",
            routes=app.routes,
        )
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
