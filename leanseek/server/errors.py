"""Errors as OpenAI's API shapes them: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

from __future__ import annotations

import logging
import math
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from leanseek.engine import Crowded, EngineStopped, QueueFull, RequestFailed
from leanseek.errors import InputError
from leanseek.reading import shorten

logger = logging.getLogger("leanseek.server")
MAX_MESSAGE = 2000  # characters
RETRY_AFTER_STOP_S = 5  # a restart takes about that long


class ServerError(InputError):
    """The server cannot start as asked; one line that says how to mend it."""


class ApiError(Exception):
    """A request that ends with a status of 4xx or 5xx."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = shorten(str(self), MAX_MESSAGE)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any exception; those that are our fault are logged with their traceback."""
    match error:
        case ApiError():
            return error
        case HTTPException():  # routing: 404, 405
            return ApiError(error.status_code, error.detail)
        case ValidationError():
            return _of_validation(error)
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after)
        case Crowded():
            message = "many requests with slow templates or output forms are being worked on; try again later"
            return ApiError(429, message, code="queue_full", retry_after_s=RETRY_AFTER_STOP_S)
        case EngineStopped():
            return ApiError(503, str(error), code="stopping", retry_after_s=RETRY_AFTER_STOP_S)
        case InputError():
            return ApiError(400, str(error))
        case RequestFailed():  # the engine has logged it
            return ApiError(500, str(error))
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details")


def _of_validation(error: ValidationError) -> ApiError:
    """Of several errors the deepest, and of those the one that is not about the kind of a value: where it may be of
    many kinds, that is about the kind that was meant."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    told = max(errors, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    if told["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {told['msg']}")
    where = ".".join(str(part) for part in told["loc"] if isinstance(part, int) or _is_field(part))
    return ApiError(400, f"{where}: {told['msg']}" if where else told["msg"], param=where or None)


def _is_field(part: str) -> bool:
    """Pydantic's paths also name the kinds of a union: `str`, `list[...]`, `InputMessage`."""
    return part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool")


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the application."""
    told = as_api_error(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return JSONResponse(told.body, told.status, headers | told.headers)
