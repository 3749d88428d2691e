"""
Measure what one idle stream costs nginx, for the figures of nginx/README.md.

    python -m tests.nginx.measure [STREAMS] [NGINX]

Proportional memory (PSS) of nginx's workers before and with STREAMS streams
(default 1,000), on each way; user space alone. Descriptors are counted, too.
"""

import asyncio
import itertools
import sys
import tempfile
from pathlib import Path

from app.stack import ROOT, Nginx, nginx_version
from tests.nginx.conftest import Toy, certificate, workers
from tests.nginx.ways import WAYS, way


def pss(nginx: Nginx) -> int:
    """Return bytes of all workers."""
    total = 0
    for pid in workers(nginx):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def descriptors(nginx: Nginx) -> int:
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in workers(nginx))


async def measured(name: str, binary: str, count: int) -> tuple[float, float]:
    """Return bytes and descriptors per stream."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        certificate(folder / "tls")
        toy = Toy()
        server = await asyncio.start_server(toy.serve, "127.0.0.1", 0, backlog=4096)
        toy.port = server.sockets[0].getsockname()[1]
        nginx = Nginx(folder, [toy.server], binary=binary, tls=None if name == "plain" else folder / "tls")
        nginx.start()
        await asyncio.to_thread(nginx.wait_ready)
        try:
            async with way(name, nginx.port) as client:
                # What a worker takes once, at its first streams, is no stream's.
                for number in range(20):
                    await client.ask(f"/events?user=w{number}", source=f"127.0.1.{number % 2 + 1}" if name == "h2" else None)
                before, open_before = pss(nginx), descriptors(nginx)
                for batch in itertools.batched(range(count), 50, strict=False):
                    await asyncio.gather(
                        *(
                            client.ask(f"/events?user={n}", source=f"127.1.{n // 100}.2" if name == "h2" else None)
                            for n in batch
                        )
                    )
                toy.say(b"data: x\n\n")
                await asyncio.sleep(0.5)
                return (pss(nginx) - before) / count, (descriptors(nginx) - open_before) / count
        finally:
            nginx.close()
            server.close()


async def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    binary = sys.argv[2] if len(sys.argv) > 2 else str(ROOT / ".cache/nginx/nginx")
    print(f"nginx {'.'.join(map(str, nginx_version(binary)))}, {count} idle streams")
    for name in WAYS:
        if name == "h2" and nginx_version(binary) < (1, 25):
            print("h2: not with this version, whose heads wait for the first event")
            continue
        size, files = await measured(name, binary, count)
        print(f"{name:6} {size / 1000:6.1f} KB  {files:5.2f} descriptors per stream", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
