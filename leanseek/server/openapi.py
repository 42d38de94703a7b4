"""/openapi.json: the endpoints and their request bodies, generated from the pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_GETS = {
    "/v1/models": "application/json",
    "/health": "application/json",
    "/metrics": "text/plain",
    "/openapi.json": "application/json",
    "/": "text/html",
}


def openapi(endpoints: Mapping[str, type[BaseModel]], root_path: str = "") -> dict[str, Any]:
    """The OpenAPI document of the given POST endpoints with their bodies, and of the GET endpoints."""
    models = sorted(set(endpoints.values()), key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {path: {"get": {"responses": _responses(kind)}} for path, kind in _GETS.items()}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"] = {"get": {"parameters": [name], "responses": _responses("application/json")}}
    for path, body in endpoints.items():
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        content = {"application/json": {"schema": reference}}
        kinds = ("application/json", "text/event-stream") if "stream" in body.model_fields else ("application/json",)
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": _responses(*kinds)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "leanseek", "version": "1", "description": "OpenAI-compatible server"},
        "components": {"schemas": definitions.get("$defs", {}) | {"Error": _ERROR}},
        "paths": paths,
    } | ({"servers": [{"url": root_path}]} if root_path else {})


def _responses(*kinds: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "the answer", "content": {kind: {} for kind in kinds}},
        "4XX": {"description": "the request is at fault", "content": error},
        "5XX": {"description": "the server is at fault", "content": error},
    }
