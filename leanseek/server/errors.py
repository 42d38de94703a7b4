"""Every error in the format of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

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
    """The server cannot start with these options; the message says in one line how to fix that."""


class ApiError(Exception):
    """Ends a request with a 4xx or 5xx status."""

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
    """The error that the client sees for an exception. Unexpected exceptions are logged with their traceback."""
    match error:
        case ApiError():
            return error
        case HTTPException():  # routing: 404, 405
            return ApiError(error.status_code, error.detail)
        case ValidationError():
            return _validation_error(error)
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after)
        case Crowded():
            message = "too many requests with slow chat templates or output forms are running; try again later"
            return ApiError(429, message, code="queue_full", retry_after_s=RETRY_AFTER_STOP_S)
        case EngineStopped():
            return ApiError(503, str(error), code="stopping", retry_after_s=RETRY_AFTER_STOP_S)
        case InputError():
            return ApiError(400, str(error))
        case RequestFailed():  # the engine has logged it
            return ApiError(500, str(error))
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details")


def _validation_error(error: ValidationError) -> ApiError:
    """Reports the deepest error, preferably not one about a value's type: in a union, the other errors come from the
    member that the client meant."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    deepest = max(errors, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    if deepest["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {deepest['msg']}")
    where = ".".join(str(part) for part in deepest["loc"] if isinstance(part, int) or _is_field(part))
    return ApiError(400, f"{where}: {deepest['msg']}" if where else deepest["msg"], param=where or None)


def _is_field(part: str) -> bool:
    """Pydantic's paths also name the members of a union: `str`, `list[...]`, `InputMessage`."""
    return part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool")


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the application."""
    api_error = as_api_error(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return JSONResponse(api_error.body, api_error.status, headers | api_error.headers)
