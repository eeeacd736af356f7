"""The page's server: what is sent is checked here, what is shown comes from the session."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from ..errors import DeviceError
from ..gradcam import LAYERS
from ..images import ImageError
from .session import Gone, Session

PAGE = Path(__file__).parent / "page"
SCORES = 5  # classes at a pixel, the likeliest
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def create_app(session: Session, most_bytes: int) -> FastAPI:
    """The application: a page, and under /api what it asks for. Errors are JSON, {"detail": a sentence}.

    Only requests to this machine's own names are answered, and files are taken only in a form that other sites' pages cannot
    send, so that no page elsewhere can use the server through a browser on this machine.
    """
    app = FastAPI(title="SegNeXt", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    worker = ThreadPoolExecutor(1, "model")  # one thread for all that computes: another would bring its own pool of threads

    async def work(function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    @app.middleware("http")
    async def add_headers(request: Request, call_next) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(ImageError)
    async def broken(_: Request, error: ImageError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(Gone)
    async def gone(_: Request, error: Gone) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 404)

    @app.exception_handler(DeviceError)
    async def too_large(_: Request, error: DeviceError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 507)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": f"the server failed: {type(error).__name__}"}, 500, HEADERS)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # which nobody gets

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 422)

    @app.get("/api/model")
    async def model() -> dict:
        return {
            "name": session.name,
            "classes": session.classes,
            "palette": session.palette,
            "layers": LAYERS,
            "mostBytes": most_bytes,
        }

    @app.post("/api/photos")
    async def add(request: Request, name: Annotated[str, Query(max_length=255)] = "the file") -> dict:
        if request.headers.get("content-type") != "application/octet-stream":
            raise HTTPException(415, "the request's body must be the file, as application/octet-stream")
        photo = await work(session.add, await received(request, most_bytes), name)
        height, width = photo.labels.shape
        return {
            "key": photo.key,
            "width": width,
            "height": height,
            "original": photo.original[::-1],
            "shares": list((await work(session.shares, photo)).items()),
            "seconds": list(photo.seconds.items()),
        }

    @app.get("/api/photos/{key}/photo")
    async def shown(key: str) -> Response:
        return await work(encoded, await work(session.picture, session.photo(key)), "JPEG")

    @app.get("/api/photos/{key}/labels")
    async def labels(key: str) -> Response:
        return Response(session.photo(key).labels.tobytes(), media_type="application/octet-stream")

    @app.get("/api/photos/{key}/mask.png")
    async def mask(key: str) -> Response:
        return await work(encoded, await work(session.mask, session.photo(key)), "PNG")

    @app.get("/api/photos/{key}/pixel")
    async def pixel(key: str, x: int, y: int) -> dict:
        photo = session.photo(key)
        require_inside(x, y, photo.labels.shape)
        scores = await work(session.scores, photo, x, y)
        best = scores.topk(min(SCORES, len(scores)))
        return {
            "class": int(photo.labels[y, x]),
            "scores": list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        }

    @app.get("/api/photos/{key}/gradcam")
    async def gradcam(
        key: str,
        category: Annotated[int, Query(alias="class")],
        layer: Literal[LAYERS] = "stage4",
        x: int | None = None,
        y: int | None = None,
    ) -> Response:
        photo = session.photo(key)
        if not 0 <= category < len(session.classes):
            raise HTTPException(422, f"there is no class {category}; there are {len(session.classes)}")
        if (x is None) != (y is None):
            raise HTTPException(422, "a pixel has x and y")
        if x is not None:
            require_inside(x, y, photo.labels.shape)
        start = perf_counter()
        picture = await work(session.heat, photo, category, layer, None if x is None else (x, y))
        seconds = perf_counter() - start
        response = await work(encoded, picture, "JPEG")
        response.headers["Server-Timing"] = f"gradcam;dur={1000 * seconds:.1f}"
        return response

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


async def received(request: Request, most_bytes: int) -> bytes:
    """The body, which is given up as soon as it is too large."""
    refused = HTTPException(413, f"the file is larger than {most_bytes / 10**6:g} MB")
    if int(request.headers.get("content-length", 0)) > most_bytes:
        raise refused
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most_bytes:
            raise refused
    if not data:
        raise HTTPException(400, "the file is empty")
    return bytes(data)


def encoded(picture: Image.Image, kind: str) -> Response:
    file = BytesIO()
    picture.save(file, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return Response(file.getvalue(), media_type=f"image/{kind.lower()}")


def require_inside(x: int, y: int, size: tuple[int, int]) -> None:
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise HTTPException(422, f"the pixel {x},{y} is not inside of a picture of {width}x{height}")
