"""HTTP by hand over a socket: what is really sent, chunk by chunk, and requests no client library would make."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    chunks: list[bytes] = field(default_factory=list)  # of chunked encoding; the one body otherwise

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


def request_bytes(path: str, body: object, *, method: str = "POST", host: str = "localhost") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    return head.encode() + raw


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read_head(reader: asyncio.StreamReader) -> Answer:
    first, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in fields)}
    return Answer(int(first.split()[1]), headers)


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """Empty at the end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    data = await reader.readexactly(size)
    assert await reader.readexactly(2) == b"\r\n"
    return data


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    answer = await read_head(reader)
    if answer.headers.get("transfer-encoding") == "chunked":
        while block := await read_chunk(reader):
            answer.chunks.append(block)
    else:
        answer.chunks.append(await reader.readexactly(int(answer.headers.get("content-length", 0))))
    return answer


async def exchange(port: int, path: str, body: object) -> Answer:
    return await send(port, request_bytes(path, body))


async def send(port: int, raw: bytes) -> Answer:
    """The answer to exactly these bytes."""
    async with connection(port) as (reader, writer):
        writer.write(raw)
        return await read_answer(reader)


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST rather than FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
