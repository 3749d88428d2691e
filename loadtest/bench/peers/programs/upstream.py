"""
A model's server that speaks OpenAI's chat completions: the same tokens for everybody, the first at once.

    python upstream.py PORT PAUSE_MS TOKEN...
"""

import asyncio
import json
import sys

PAUSE = int(sys.argv[2]) / 1000
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: object) -> bytes:
    """
    Return one event in a chunk of its own.
    """
    text = data if isinstance(data, str) else json.dumps(data)
    block = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(block), block)


CHUNKS = [chunk({"choices": [{"index": 0, "delta": {"content": token}}]}) for token in sys.argv[3:]]
END = chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + chunk("[DONE]") + b"0\r\n\r\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """
    Answer the requests of one connection.
    """
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"get "):
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                continue
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
            writer.write(HEAD)
            for number, piece in enumerate(CHUNKS):
                if number:
                    await asyncio.sleep(PAUSE)
                writer.write(piece)
            writer.write(END)
            if b"connection: close" in head:
                break
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    """
    Serve for ever.
    """
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
