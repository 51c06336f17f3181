"""The page: files of this package, which load nothing from elsewhere, and pictures that the demo renders."""

from __future__ import annotations

import functools
import io
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from mllama.demo import sample_picture
from mllama.server.errors import RequestError

_FOLDER = Path(__file__).with_name("static")
_INDEX = "index.html"
_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_SEEDS = (186, 254, 199, 396)  # square, of shapes that differ and that the demo model names right
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """Serve the page under / and its files under /static/, which need no key."""
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _KINDS}

    def answered(name: str) -> Response:
        kind = _KINDS[Path(name).suffix]
        return Response(files[name], media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return answered(_INDEX)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files or name == _INDEX:
            raise RequestError(404, "the page has no such file")
        return answered(name)

    @app.get("/static/samples/{number}.png", include_in_schema=False)
    def sample(number: str) -> Response:
        if number not in map(str, range(1, len(_SEEDS) + 1)):
            raise RequestError(404, f"there are samples 1 to {len(_SEEDS)}")
        data = _drawn(_SEEDS[int(number) - 1])
        return Response(data, media_type="image/png", headers=_HEADERS)


@functools.cache
def _drawn(seed: int) -> bytes:
    file = io.BytesIO()
    sample_picture(seed)[0].save(file, "PNG")
    return file.getvalue()
