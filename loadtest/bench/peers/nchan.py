"""
Nchan, the publish-subscribe module of nginx, from Debian's packages.
"""

import os
import shutil
import subprocess
from pathlib import Path

from ..process import Server, answers, free_port
from ..publisher import HttpPublisher
from .base import HEARTBEAT_SECONDS, TOPIC, Absent, Peer, Running

# A distribution builds the module for its own nginx only, so its nginx is named
# by path: another nginx found first on PATH would refuse the module.
NGINX = ("/usr/sbin/nginx", "/usr/bin/nginx")
MODULES = ("/usr/lib/nginx/modules/ngx_nchan_module.so",)
CURE = "apt-get install nginx libnginx-mod-nchan (and systemctl disable --now nginx, the benchmark needs no service)"

CONFIG = """
load_module {module};
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile {descriptors};
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    nchan_shared_memory_size 128M;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /publish {{
            nchan_publisher;
            nchan_channel_id $arg_topic;
            nchan_message_buffer_length 1000;
            nchan_message_timeout 600s;
        }}
        location = /events {{
            nchan_subscriber eventsource;
            nchan_channel_id $arg_topic;
            nchan_subscriber_first_message newest;
            nchan_eventsource_ping_interval {heartbeat};
        }}
        location = /healthz {{ return 204; }}
    }}
}}
"""


class Nchan(Peer):
    """
    One nginx worker with Nchan; a burst is as many posts as events: it has no batch.
    """

    name = "nchan"
    title = "Nchan, C inside nginx"
    label = "Nchan"
    resumes = True

    def _find(self) -> tuple[str, str]:
        nginx = next((path for path in NGINX if os.access(path, os.X_OK)), None) or shutil.which("nginx")
        module = next((path for path in MODULES if Path(path).exists()), None)
        if nginx is None or module is None:
            raise Absent(f"Nchan is not installed: {CURE}")
        return nginx, module

    def version(self) -> str:
        """
        Name the packages' versions.
        """
        nginx, _ = self._find()
        said = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False).stderr
        package = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        return f"nchan {package or '?'}, {said.rpartition(' ')[2].strip()}"

    def start(self, folder: Path, *, processes: int = 1, heartbeat: int = HEARTBEAT_SECONDS) -> Running:
        """
        Start nginx with one worker.
        """
        nginx, module = self._find()
        port = free_port()
        home = folder / "nchan"
        home.mkdir(exist_ok=True)
        config = home / "nginx.conf"
        config.write_text(
            CONFIG.format(
                module=module,
                # As root nginx changes user, and then could not use our folder.
                user="user root;" if os.geteuid() == 0 else "",
                descriptors=20000,
                connections=19000,
                folder=home,
                port=port,
                heartbeat=heartbeat,
            )
        )
        server = Server("nginx", [nginx, "-p", str(home), "-e", "stderr", "-c", str(config)], log=folder / "nchan.log")
        server.wait_until(answers(port))
        publisher = HttpPublisher(port, self._render)
        return Running(
            [("127.0.0.1", port)],
            f"/events?topic={TOPIC}",
            publisher.publish,
            [server],
            [publisher.end, server.end],
        )

    @staticmethod
    def _render(burst: list[str]) -> list[tuple[str, dict[str, str], bytes]]:
        path = f"/publish?topic={TOPIC}"
        return [(path, {"Content-Type": "text/plain"}, data.encode()) for data in burst]
