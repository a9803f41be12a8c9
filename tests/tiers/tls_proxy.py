"""Take TLS off: `tls_proxy.py PORT TO_PORT CERTIFICATE`."""

from __future__ import annotations

import asyncio
import ssl
import sys
from contextlib import suppress


async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Hand on what comes, until one side ends."""
    with suppress(OSError):
        while data := await source.read(1 << 18):
            target.write(data)
            await target.drain()
    target.close()


async def main() -> None:
    """Serve until killed."""
    port, to_port, certificate = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def connect(
        source: asyncio.StreamReader, target: asyncio.StreamWriter
    ) -> None:
        try:
            behind = await asyncio.open_connection("127.0.0.1", to_port)
        except OSError:
            target.close()
            return
        await asyncio.gather(pump(source, behind[1]), pump(behind[0], target))

    server = await asyncio.start_server(connect, "127.0.0.1", port, ssl=context)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
