"""Whatever a client sends, within the schema or not, is no 5xx: over the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from leanseek.engine import AsyncEngine
from leanseek.server.app import create_app
from leanseek.server.run import make_service

POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{name}", "/health", "/metrics", "/openapi.json", "/"]


@pytest.fixture(scope="module")
def api(model_folder: Path) -> Iterator[Any]:
    engine = AsyncEngine.load(model_folder, cache_gib=0.002, max_model_len=96)
    engine.start()
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(make_service(engine, "test-model")))
    engine.stop()


def test_the_schema_names_every_endpoint(api: Any) -> None:
    """Or those that are missing would not be tested below."""
    paths = (route.path.replace(":path", "") for route in api.app.routes if hasattr(route, "methods"))
    routes = {path.rstrip("/") or "/" for path in paths}  # "/v1/models/" is the same endpoint
    assert routes == {*POSTS, *GETS} == set(api.raw_schema["paths"])


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", POSTS)
def test_nothing_a_client_sends_is_a_server_error(api: Any, path: str, mode: GenerationMode) -> None:
    """Bodies that fit the schema, and bodies that nearly do."""

    @given(api[path]["POST"].as_strategy(generation_mode=mode))
    @settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # or most would end at a model that does not exist
        case.call_and_validate(checks=[not_a_server_error])

    send()


@pytest.mark.parametrize("path", POSTS[:3])
def test_no_stream_ends_in_a_server_error(api: Any, path: str) -> None:
    """An error after the first event has no status: it is an event."""
    statuses = set()

    @given(api[path]["POST"].as_strategy())
    @settings(max_examples=15, suppress_health_check=list(HealthCheck), deadline=None)
    def send(case: Any) -> None:
        if not isinstance(case.body, dict):
            return
        case.body.pop("model", None)
        case.body["stream"] = True
        response = case.call_and_validate(checks=[not_a_server_error])
        assert "server_error" not in response.text
        statuses.add(response.status_code)

    send()
    assert 200 in statuses, "nothing was streamed"


@pytest.mark.parametrize("path", GETS)
def test_nothing_that_is_read_is_a_server_error(api: Any, path: str) -> None:
    @given(api[path]["GET"].as_strategy())
    @settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
    def send(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    send()
