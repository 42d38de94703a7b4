"""The ASGI application: routes, and the gate in front of them (API key, body limit, headers, errors)."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leanseek.server.chat import chat_completions
from leanseek.server.completions import completions
from leanseek.server.errors import ApiError, ServerError, error_response
from leanseek.server.events import EventStream, unless_left
from leanseek.server.openapi import openapi
from leanseek.server.responses import responses
from leanseek.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from leanseek.server.service import Service

MAX_BODY = 16 * 2**20  # bytes: several times the longest context as text
PAGE = Path(__file__).parent / "page"
# The chat page may load only its own files, so model output injected into it could not reach anything.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PUBLIC = ("/", "/health", "/metrics", "/openapi.json")  # served without a key, as is everything under /page/
_HOST = re.compile(r"([\w.~%!$&'()*+,;=-]*|\[[0-9a-fA-F:.]+\])(:[0-9]{0,5})?", re.ASCII)  # RFC 3986's host and port

Handler = Callable[[Service, Any], Coroutine[Any, Any, dict[str, Any] | EventStream]]


@dataclass(frozen=True)
class Access:
    """Who may use the server: without a key, everyone who can reach it; without origins, no pages of other sites.

    root_path: the prefix of every path behind a proxy ("/llm"), whether or not the proxy strips it

    Raises:
        ServerError: the key is empty, or the prefix is not a path.
    """

    api_key: str | None = None
    allowed_origins: Sequence[str] = ()
    root_path: str = ""

    def __post_init__(self) -> None:
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+/?", self.root_path, re.ASCII):
            raise ServerError(f"the root path {self.root_path!r} is not a path such as /llm")
        if self.api_key == "":  # an unset variable in a script, for example
            raise ServerError("the API key is empty; leave it out to serve without one")


def create_app(service: Service, access: Access | None = None) -> Starlette:
    """The application that serves one model."""
    access = access or Access()
    endpoints: dict[str, tuple[type[BaseModel], Handler]] = {
        "/v1/chat/completions": (ChatRequest, chat_completions),
        "/v1/completions": (CompletionRequest, completions),
        "/v1/responses": (ResponsesRequest, responses),
        "/tokenize": (TokenizeRequest, _tokenize),
        "/detokenize": (DetokenizeRequest, _detokenize),
    }
    root_path = access.root_path.rstrip("/")
    schema = openapi({path: body for path, (body, _) in endpoints.items()}, root_path)
    routes: list[BaseRoute] = [
        Route(path, _endpoint(service, body, handle), methods=["POST"]) for path, (body, handle) in endpoints.items()
    ]
    for path, answer in _pages(service, schema).items():
        routes.append(Route(path, answer))
    routes.append(Mount("/page", StaticFiles(directory=PAGE)))
    cors = Middleware(
        CORSMiddleware,
        allow_origins=access.allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,
    )
    gate = Middleware(_Gate, service=service, api_key=access.api_key, root_path=root_path)
    # _Gate handles all other exceptions: Starlette would handle them outside all middleware and raise them again.
    app = Starlette(
        routes=routes,
        middleware=[cors, gate] if access.allowed_origins else [gate],
        exception_handlers={HTTPException: error_response},
    )
    app.router.redirect_slashes = False  # the redirect would contain the Host that the client sent
    return app


class _Gate:
    """Wraps every request: response headers, the API key, the body limit, and error responses.

    It decides by `scope["path"]`, the path that routing uses, and by nothing else that the client sends.
    """

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None, root_path: str):
        self._app = app
        self._service = service
        self._api_key = api_key
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._root_path and (scope["path"] + "/").startswith(self._root_path + "/"):
            scope = {**scope, "path": scope["path"][len(self._root_path) :] or "/"}
        started = False
        body = 0

        async def counted_receive() -> Message:
            nonlocal body
            message = await receive()
            body += len(message.get("body", b""))
            if body > MAX_BODY:
                raise ApiError(413, f"the body is larger than {MAX_BODY:,} bytes")
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._service.metrics.responded(message["status"])
                message["headers"] = [*message["headers"], *_headers(scope["path"])]
            await send(message)

        try:
            self._admit(Request(scope))
            await self._app(scope, counted_receive, guarded_send)
        except ClientDisconnect:
            return  # the client is gone
        except Exception as error:
            response = await error_response(Request(scope), error)
            if not started:
                await response(scope, receive, guarded_send)

    def _admit(self, request: Request) -> None:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY:,} bytes")
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            raise ApiError(400, "send either Content-Length or Transfer-Encoding, not both")
        host = request.headers.get("host", "")
        if not _HOST.fullmatch(host):
            raise ApiError(400, "the Host header is not a host and a port")
        path = request.scope["path"]
        if self._api_key is not None and not (path in PUBLIC or path.startswith("/page/")):
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip(" ").encode("latin-1"), self._api_key.encode())
            if scheme.lower() != "bearer" or not known:
                message = "wrong or missing API key: send it as `Authorization: Bearer KEY`"
                raise ApiError(401, message, code="invalid_api_key")


def _headers(path: str) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-content-type-options", b"nosniff")]
    if path == "/" or path.startswith("/page/"):
        headers += [(b"content-security-policy", PAGE_POLICY.encode()), (b"cache-control", b"no-cache")]
    return headers


def _endpoint(
    service: Service, body: type[BaseModel], handle: Handler
) -> Callable[[Request], Awaitable[Response | EventStream]]:
    """A route handler: JSON in, JSON or events out."""

    async def run(request: Request) -> Response | EventStream:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers let another site's page send this only after CORS allows it
            raise ApiError(415, "the body must be JSON, sent with `Content-Type: application/json`")
        parsed = body.model_validate_json(await request.body())
        answer = await unless_left(request.receive, handle(service, parsed))
        return answer if isinstance(answer, EventStream) else _json(answer)

    return run


def _json(answer: dict[str, Any]) -> Response:
    return Response(json.dumps(answer, ensure_ascii=False).encode(), media_type="application/json")


# ---- small endpoints ----


def _pages(service: Service, schema: dict[str, Any]) -> dict[str, Callable[[Request], Awaitable[Response]]]:
    """The GET endpoints."""

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        if not request.path_params["name"]:  # /v1/models/
            return await models(request)
        service.check_model(request.path_params["name"])
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        return _health(service)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.page(), media_type=service.metrics.content_type)

    async def openapi_json(request: Request) -> Response:
        return JSONResponse(schema)

    async def chat_page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    return {
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/health": health,
        "/metrics": metrics,
        "/openapi.json": openapi_json,
        "/": chat_page,
    }


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "leanseek",
        "max_model_len": service.engine.max_model_len,
        "thinking_switch": service.template.thinking_switch,
    }


def _health(service: Service) -> Response:
    """200 while the server accepts requests; the body also shows the engine's load, for the chat page."""
    stats = service.engine.stats()
    accepting = service.engine.accepting
    stopped = "the server is stopping" if service.engine.alive else "the engine has stopped"
    figures = {
        "status": "ok" if accepting else stopped,
        "running": stats.running,
        "waiting": stats.waiting,
        "cache_usage": stats.pages_used / stats.pages_total,
        "cache_bytes": stats.cache_bytes,
    }
    return JSONResponse(figures, 200 if accepting else 503)


async def _tokenize(service: Service, request: TokenizeRequest) -> dict[str, Any]:
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either prompt or messages")
    if request.messages is not None:
        prompt = await service.render(request.messages, request.tools, request.chat_template_kwargs, request)
        tokens = await service.encode(prompt, add_special_tokens=False, whole=True)
    else:
        tokens = await service.encode(request.prompt or "", request.add_special_tokens, whole=True)
    return {"count": len(tokens), "max_model_len": service.engine.max_model_len, "tokens": tokens}


async def _detokenize(service: Service, request: DetokenizeRequest) -> dict[str, Any]:
    service.check_model(request.model)
    vocabulary = service.engine.config.vocab_size
    if max(request.tokens, default=0) >= vocabulary:
        raise ApiError(400, f"a token id is outside the vocabulary of {vocabulary}", param="tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, request.tokens, False)
    return {"prompt": text}
