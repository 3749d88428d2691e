"""
Pushpin, from Debian's packages, before a one-line application.
"""

import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from ..process import Server, answers, free_port
from ..publisher import HttpPublisher, json_body
from .base import HEARTBEAT_SECONDS, TOPIC, Absent, Peer, Running
from .quart_recipe import PROGRAMS

CURE = "apt-get install pushpin condure zurl (and systemctl disable --now pushpin, the benchmark needs no service)"

CONFIG = """
[global]
include={{libdir}}/internal.conf
rundir={folder}
ipc_prefix=bench-
port_offset=0
stats_connection_ttl=120

[runner]
services=condure,zurl,pushpin-proxy,pushpin-handler
http_port=127.0.0.1:{port}
logdir={folder}
log_level=1
client_buffer_size=8192
client_maxconn=19000

[proxy]
routesfile={folder}/routes
zurl_out_specs=ipc://{folder}/bench-zurl-in
zurl_out_stream_specs=ipc://{folder}/bench-zurl-in-stream
zurl_in_specs=ipc://{folder}/bench-zurl-out
updates_check=off
sig_key=bench

[handler]
push_in_spec=tcp://127.0.0.1:{ports[0]}
push_in_sub_specs=tcp://127.0.0.1:{ports[1]}
push_in_http_addr=127.0.0.1
push_in_http_port={ports[2]}
push_in_http_max_body_size=1000000
command_spec=tcp://127.0.0.1:{ports[3]}
stats_spec=ipc://{folder}/bench-stats
# Its default of 2,500 a second would measure the limit.
message_rate=10000000
message_hwm=10000000
"""


class Pushpin(Peer):
    """
    A reverse proxy that holds the streams: connection manager, proxy, handler, HTTP client.
    """

    name = "pushpin"
    title = "Pushpin"
    label = "Pushpin"

    def version(self) -> str:
        """
        Name the programs' versions.
        """
        if not all(shutil.which(name) for name in ("pushpin", "condure", "zurl")):
            raise Absent(f"Pushpin is not installed: {CURE}")
        said = subprocess.run(["pushpin", "--version"], capture_output=True, text=True, check=False)
        front = subprocess.run(["condure", "--version"], capture_output=True, text=True, check=False)
        return f"{said.stdout.strip()}, {front.stdout.strip()}"

    def start(self, folder: Path, *, processes: int = 1, heartbeat: int = HEARTBEAT_SECONDS) -> Running:
        """
        Start the application, then Pushpin's own runner.
        """
        self.version()
        home = folder / "pushpin"
        home.mkdir(exist_ok=True)
        port, origin_port, *ports = (free_port() for _ in range(6))
        origin = Server(
            "origin",
            [sys.executable, str(PROGRAMS / "grip_origin.py"), str(origin_port), str(heartbeat)],
            log=folder / "pushpin-origin.log",
        )
        origin.wait_until(answers(origin_port))
        (home / "routes").write_text(f"* 127.0.0.1:{origin_port}\n")
        config = home / "pushpin.conf"
        config.write_text(CONFIG.format(folder=home, port=port, ports=ports))
        server = Server(
            "pushpin",
            ["pushpin", "--config", str(config), "--merge-output"],
            log=folder / "pushpin.log",
            env={**os.environ, "HOME": str(home)},
        )

        def ready() -> bool:
            with socket.socket() as probe:
                return answers(port)() and probe.connect_ex(("127.0.0.1", ports[2])) == 0

        server.wait_until(ready)
        numbers = itertools.count(1763712000001)

        def render(burst: list[str]) -> list[tuple[str, dict[str, str], bytes]]:
            items = [
                {
                    "channel": TOPIC,
                    "formats": {"http-stream": {"content": f"id: {next(numbers)}\ndata: {data}\n\n"}},
                }
                for data in burst
            ]
            return [("/publish/", {"Content-Type": "application/json"}, json_body({"items": items}))]

        publisher = HttpPublisher(ports[2], render)
        return Running(
            [("127.0.0.1", port)],
            f"/events?topic={TOPIC}",
            publisher.publish,
            [server],
            [publisher.end, server.end, origin.end],
        )
