"""leanseek serve: OpenAI's API and a chat page for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leanseek.cli.generate import AllowLinks, Threads


def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a Hugging Face folder or a run")],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 for any free one")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LEANSEEK_API_KEY", help="key that clients must send; none by default")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="name in the API; the folder's by default")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a Jinja chat template instead of the model's")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="tokens of a prompt and its answer; by default as many as model and cache allow")
    ] = None,
    cache_gib: Annotated[float, typer.Option(help="memory limit of the latent cache")] = 1.0,
    max_queue: Annotated[int, typer.Option(help="requests that may wait; further ones get a 429")] = 256,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N  (default: a GPU if there is one, else the CPU)")
    ] = None,
    threads: Threads = None,
    allow_links: AllowLinks = False,
    int8_head: Annotated[
        bool, typer.Option("--int8-head", help="store the output head in 8 bits, with a scale per row")
    ] = False,
    packed_copy: Annotated[
        bool, typer.Option(help="keep the packed weights in a file beside the model, so that the next start is instant")
    ] = True,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="another site whose pages may call this server (CORS); may be repeated")
    ] = None,
    root_path: Annotated[str, typer.Option(help="the prefix of every path behind a proxy, such as /llm")] = "",
    keep_alive_timeout: Annotated[
        float, typer.Option(min=0, help="seconds to keep a connection open between two requests")
    ] = 75.0,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="seconds for running requests to finish after a signal to stop")
    ] = 30.0,
) -> None:
    """Serve a model: OpenAI's API under /v1, a chat page at /."""
    from leanseek.machine.device import use_threads
    from leanseek.server.app import Access
    from leanseek.server.connections import Limits
    from leanseek.server.run import serve as run

    use_threads(threads)
    access = Access(api_key, allowed_origin or (), root_path)
    limits = Limits(keep_alive_s=keep_alive_timeout, shutdown_s=shutdown_timeout)
    options = {"max_model_len": max_model_len, "cache_gib": cache_gib, "max_queue": max_queue, "device": device}
    options |= {"int8_head": int8_head, "packed_copy": packed_copy, "allow_links": allow_links}
    run(model, host, port, served_model_name, access, limits, chat_template, **options)
