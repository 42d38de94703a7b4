"""Loads a model folder and serves it until a signal arrives."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from leanseek.engine import AsyncEngine
from leanseek.reading import shorten
from leanseek.server.app import Access, create_app
from leanseek.server.connections import Limits, Server
from leanseek.server.errors import ServerError
from leanseek.server.metrics import Metrics
from leanseek.server.service import Service
from leanseek.server.templates import template_of

STEP_S = 5.0  # how long to wait for the last step before the process exits
_NAME = 256  # characters


def serve(
    model: Path,
    host: str,
    port: int,
    model_name: str | None,
    access: Access,
    limits: Limits | None = None,
    chat_template: Path | None = None,
    **engine_options: Any,
) -> None:
    """Serve a model until SIGTERM or SIGINT; then finish running requests, refuse new ones, and return.

    Requests still running after `limits.shutdown_s` end with an error. A second signal ends the process at once.
    `port` 0 means a free port, which is printed. `chat_template` is a file to use instead of the model's template.

    Raises:
        InputError: the folder, an option or the port cannot be used.
    """
    if model_name is not None and not (0 < len(model_name) <= _NAME and model_name.isprintable()):
        raise ServerError(f"the served model's name must be 1 to {_NAME} printable characters: {shorten(model_name)!r}")
    listener = _bind(host, port)  # first, because it fails at once, and loading takes long
    with listener:
        engine = AsyncEngine.load(model, **engine_options)
        name = shorten(model.resolve().name, _NAME) if model_name is None else model_name
        service = make_service(engine, name, chat_template)
        engine.start()
        try:
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            greeting = f"leanseek: {service.model_name} at {address}, OpenAI's API at {address}/v1"
            Server(create_app(service, access), service, limits or Limits(), greeting).run(sockets=[listener])
        finally:
            service.close()
            engine.stop(STEP_S)


def make_service(engine: AsyncEngine, model_name: str, chat_template: Path | None = None) -> Service:
    """The engine with everything else that the application needs.

    Raises:
        ServerError: the model has no tokenizer.
        TemplateError: its chat template is broken.
    """
    if engine.tokenizer is None:
        raise ServerError("the model has no tokenizer.json; the server needs one beside the weights")
    template = template_of(engine.tokenizer, engine.config, chat_template)
    return Service(engine, engine.tokenizer, template, model_name, Metrics(engine, model_name))


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerError(f"cannot listen on {host}:{port} ({reason}); choose another with --host or --port") from None
    return listener
