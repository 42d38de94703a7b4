"""From a model folder to a server that runs until it is told to stop."""

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

STEP_S = 5.0  # a step that takes longer ends with the process
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
    """Serve a model until SIGTERM or SIGINT; then finish what runs, take nothing new, and return.

    What still runs after `limits.shutdown_s` is ended with an error. A second signal ends the process at once. `port` 0
    means a free one, which is printed. `chat_template` is a file to take instead of the model's.

    Raises:
        InputError: the folder, an option or the port cannot be used.
    """
    if model_name is not None and not (0 < len(model_name) <= _NAME and model_name.isprintable()):
        raise ServerError(f"the served model's name must be 1 to {_NAME} printable characters: {shorten(model_name)!r}")
    listener = _bind(host, port)  # first: it fails in an instant, loading takes long
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
    """What the application needs around an engine.

    Raises:
        ServerError: the model has no tokenizer.
        TemplateError: its chat template is broken.
    """
    if engine.tokenizer is None:
        raise ServerError("the model has no tokenizer.json; the server needs one beside the weights")
    template = template_of(engine.tokenizer, engine.config, chat_template)
    return Service(engine, engine.tokenizer, template, model_name, Metrics(engine, model_name))


def _bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServerError(f"cannot listen on {host}:{port} ({reason}); choose another with --host or --port") from None
    return listener
