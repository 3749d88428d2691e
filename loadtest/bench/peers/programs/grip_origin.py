"""
The application behind Pushpin: answers each GET with the instruction to hold a stream.

Its CPU is not counted: every application behind Pushpin is another.
"""

import asyncio
import sys

BODY = b": open\n\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """
    Answer the requests of one connection.
    """
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            target = head.split(b" ", 2)[1].decode()
            if not target.startswith("/events"):
                writer.write(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")
                continue
            topic = target.partition("topic=")[2]
            writer.write(
                (
                    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                    "Cache-Control: no-store\r\n"
                    f"Grip-Hold: stream\r\nGrip-Channel: {topic}\r\n"
                    f"Grip-Keep-Alive: :\\n\\n; format=cstring; timeout={sys.argv[2]}\r\n"
                    f"Content-Length: {len(BODY)}\r\n\r\n"
                ).encode()
                + BODY
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main() -> None:
    """
    Serve until killed.
    """
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


asyncio.run(main())
