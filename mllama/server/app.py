"""The application: routes, checks before them, and the description of both."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from mllama.grammar.compiling import GrammarCompiler
from mllama.server import errors
from mllama.server.auth import HostCheck, KeyCheck, is_loopback
from mllama.server.body import BodyBudget
from mllama.server.described import (
    REFS,
    ChatCompletion,
    ChatCompletionChunk,
    Health,
    ModelEntry,
    ModelList,
    Responses,
    TextCompletion,
    TextCompletionChunk,
    Version,
    answers,
    refusals,
    schemas,
)
from mllama.server.errors import RequestError
from mllama.server.fetching import Fetcher
from mllama.server.held import Forms
from mllama.server.metrics import Metrics
from mllama.server.page import add_page
from mllama.server.pictures import Pictures
from mllama.server.protocol import Engine
from mllama.server.routes import Routes
from mllama.server.schema import ChatRequest, CompletionRequest
from mllama.server.settings import Settings
from mllama.server.watching import Gate
from mllama.server.work import Preparation, check_model

_NOT_HERE = ("responses", "embeddings")
_BASE64_THREADS = 2
_HEALTH = {200: "requests are answered", 503: "they are not, or not yet"}


def create_app(
    engine: Engine, settings: Settings, compiler: GrammarCompiler, template_writes_calls: bool
) -> FastAPI:
    """An application that answers with an engine; `app.state.gate` begins to drain it.

    Args:
        compiler: of grammars, for the engine's vocabulary.
        template_writes_calls: whether the engine's template does, see `call_prompts.writes_calls`.
    Raises: ValueError for a host of pictures that is none.
    """
    gate, metrics = Gate(), Metrics(engine)
    threads = ThreadPoolExecutor(_BASE64_THREADS, "mllama-base64")
    fetcher = Fetcher(settings.image_hosts, settings.limits.max_bytes)
    pictures = Pictures(fetcher, threads, max_images=settings.max_images, limits=settings.limits)
    budget = BodyBudget(settings.max_bytes_in_flight)
    preparation = Preparation(settings, pictures, Forms(compiler), template_writes_calls)
    routes = Routes(engine, settings, preparation, metrics, gate, budget)
    app = FastAPI(
        title="mllama",
        version=settings.version,
        docs_url=None,  # whose page loads from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=_checks(settings),
    )
    app.state.gate = gate
    errors.install(app)
    _add_answers(app, routes)
    _add_facts(app, engine, settings, gate, metrics)
    add_page(app)
    _describe(app)
    return app


def _checks(settings: Settings) -> list[Middleware]:
    """The first is the outermost: a preflight brings no key."""
    checks = []
    if not settings.api_keys:
        names = {*settings.allowed_hosts, settings.host}
        literals = not is_loopback(settings.host)
        checks.append(Middleware(HostCheck, names=names, literals=literals))
    if settings.allowed_origins:
        checks.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    checks.append(Middleware(KeyCheck, keys=settings.api_keys))
    return checks


def _add_answers(app: FastAPI, routes: Routes) -> None:
    chat = answers(ChatCompletion, ChatCompletionChunk)
    text = answers(TextCompletion, TextCompletionChunk)
    for path, endpoint, model, responses in (
        ("/v1/chat/completions", routes.chat, ChatRequest, chat),
        ("/v1/completions", routes.completions, CompletionRequest, text),
    ):
        schema = {"$ref": REFS.format(model=model.__name__)}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        app.post(
            path,
            response_class=JSONResponse,
            responses=responses,
            openapi_extra={"requestBody": body},
        )(endpoint)

    async def not_here(request: Request) -> Response:
        """Told apart from a mistake in the path."""
        raise RequestError(404, f"{request.url.path} is not offered here; use /v1/chat/completions")

    for name in _NOT_HERE:
        app.post(f"/v1/{name}", include_in_schema=False)(not_here)
        app.get(f"/v1/{name}", include_in_schema=False)(not_here)


def _add_facts(
    app: FastAPI, engine: Engine, settings: Settings, gate: Gate, metrics: Metrics
) -> None:
    created = 0  # of no meaning here; clients expect a number

    refused = refusals("4XX")
    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    states = {s: {"model": Health, "description": d} for s, d in _HEALTH.items()} | refused

    def entry(name: str) -> ModelEntry:
        return {"id": name, "object": "model", "created": created, "owned_by": "mllama"}

    @app.get("/health", responses=states)
    @app.get("/v1/health", operation_id="v1_health", responses=states)
    async def health() -> JSONResponse:
        """200 when requests are answered, else 503."""
        state = "draining" if gate.draining else engine.health()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", response_class=Response, responses=text | refused)
    async def metrics_text() -> Response:
        """In the form of Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", responses=refused)
    async def version() -> Version:
        """Of the package."""
        return {"version": settings.version}

    @app.get("/v1/models", responses=refused)
    async def models() -> ModelList:
        """Names under which the model is asked for."""
        return {"object": "list", "data": [entry(name) for name in settings.models]}

    @app.get("/v1/models/{name:path}", responses=refused)
    async def model(name: str) -> ModelEntry:
        """One of them."""
        return entry(check_model(name, settings))


def _describe(app: FastAPI) -> None:
    """Add the bodies, which FastAPI does not read here, to /openapi.json."""

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            found["components"]["schemas"] |= schemas(
                ChatRequest, CompletionRequest, ChatCompletionChunk, TextCompletionChunk
            )
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = description  # type: ignore[method-assign]
