"""The routes."""

import hmac
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from anabranch.serving.server.backend import State
from anabranch.serving.server.config import is_loopback
from anabranch.serving.server.exchange import Exchange, Front
from anabranch.serving.server.formats import ChatFormat, CompletionFormat
from anabranch.serving.server.refusal import ApiError


def make_app(front: Front) -> FastAPI:
    """The application. /health is open to all; the rest needs the key, where there is one."""
    routes = _Routes(front)
    handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _unknown}
    app = FastAPI(title="Anabranch", openapi_url=None, exception_handlers=handlers)
    app.add_api_route("/health", routes.health)
    guard = [Depends(routes.authorise)]
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"], dependencies=guard)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], dependencies=guard)
    app.add_api_route("/v1/models", routes.models, dependencies=guard)
    app.add_api_route("/v1/models/{name:path}", routes.model, dependencies=guard)
    app.add_api_route("/metrics", routes.metrics, dependencies=guard)
    return app


class _Routes:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._model = {"id": front.reader.model, "object": "model", "created": 0, "owned_by": "anabranch"}

    async def authorise(self, request: Request) -> None:
        """Raise ApiError without the key. Where there is none, a name that is not this machine's is a web page's
        trick to reach it through a browser (DNS rebinding)."""
        key = self._front.settings.api_key
        if key is None:
            if not is_loopback(request.url.hostname or ""):
                raise ApiError(403, "address the server by its loopback name", code="wrong_host")
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            message = "give the server's key as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")

    async def completions(self) -> Response:
        return Exchange(self._front, self._front.reader.completion, CompletionFormat)

    async def chat(self) -> Response:
        return Exchange(self._front, self._front.reader.chat, ChatFormat)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model]}

    async def model(self, name: str) -> dict[str, Any]:
        if name != self._model["id"]:
            raise ApiError(404, f"no model {name!r}", param="model", code="model_not_found")
        return self._model

    async def metrics(self) -> Response:
        return Response(self._front.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def health(self) -> Response:
        backend = self._front.backend
        state = "draining" if self._front.gate.draining else backend.state.value
        status = 200 if state == State.READY.value else 503
        return JSONResponse({"status": state, "restarts": backend.restarts}, status)


async def _refused(_: Request, error: ApiError) -> Response:
    return error.response()


async def _unknown(_: Request, error: HTTPException) -> Response:
    return ApiError(error.status_code, error.detail).response()
