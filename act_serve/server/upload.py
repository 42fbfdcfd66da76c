"""An uploaded file, bounded and on disk, as a raw body or as the file of a form."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from act_serve.errors import RequestError, StoreError, TooLargeError

# What a form adds to its file: boundaries and headers.
_FORM_BYTES = 65_536


@asynccontextmanager
async def uploaded(request: Request, beside: Path, max_bytes: int) -> AsyncIterator[IO[bytes]]:
    """The one file of a request, from its start; it has no name on disk and is gone afterwards.

    Args:
        request: its body is the file, or a form (multipart/form-data) with one file in it.
        beside: an existing folder of the disk that a raw body is kept on.
        max_bytes: of the file.

    Raises:
        TooLargeError: it is larger.
        RequestError: it is a form without a file, malformed, or the client went away.
        StoreError: the disk refuses.
    """
    bounded = Request(request.scope, _Bounded(request, max_bytes))
    try:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with bounded.form(max_files=1, max_fields=1) as form:
                files = [value for value in form.values() if isinstance(value, UploadFile)]
                if not files:
                    raise RequestError("the form holds no file; send the archive as its file, or as the whole body")
                yield files[0].file
        else:
            with _file(beside) as file:
                async for chunk in bounded.stream():
                    await asyncio.to_thread(_write, file, chunk)
                file.seek(0)
                yield file
    except HTTPException as exc:
        raise RequestError(f"the form cannot be read: {exc.detail}") from exc
    except ClientDisconnect as exc:
        raise RequestError("the client closed the connection while it was sending") from exc


class _Bounded:
    """An ASGI receive that refuses what is over the limit, before it is read where its length is announced."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        self._receive, self._max_bytes, self._size = request.receive, max_bytes, 0
        self._check(int(length) if (length := request.headers.get("content-length", "")).isdecimal() else 0)

    async def __call__(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        self._check(self._size)
        return message

    def _check(self, size: int) -> None:
        if size > self._max_bytes + _FORM_BYTES:
            raise TooLargeError(f"the upload is larger than this server's limit of {self._max_bytes} bytes")


def _file(beside: Path) -> IO[bytes]:
    try:
        beside.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=beside)
    except OSError as exc:
        raise StoreError(f"nothing can be written beside the abilities: {exc.strerror}") from exc


def _write(file: IO[bytes], chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as exc:
        raise StoreError(f"the upload cannot be kept: {exc.strerror}; nothing was added") from exc
