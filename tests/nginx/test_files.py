"""Every file in every form: `nginx -t` on both versions, gixy, and what their first lines promise."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from app.stack import ROOT, nginx_version
from tests.nginx.conftest import NATIVE, certificate, reload
from tests.nginx.ways import way

NGINX = ROOT / "nginx"
SNIPPETS = sorted(path.name for path in (NGINX / "snippets").glob("*.conf"))
BINARIES = ("1.30", "system")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of nginx/ with a certificate where the files expect one."""
    copy = tmp_path / "nginx"
    shutil.copytree(NGINX, copy)
    certificate(copy / "tls")
    return copy


def checked(binary: str, file: Path) -> str:
    """Return what `nginx -t` says of a configuration that is good and silent; fail otherwise."""
    prefix = file.parent / "prefix"
    prefix.mkdir(exist_ok=True)
    command = [binary, "-t", "-p", f"{prefix}/", "-e", "stderr", "-c", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "[warn]" not in run.stderr, run.stderr
    return run.stderr


def older(binary: str, *version: int) -> bool:
    return nginx_version(binary) < version


def directives(text: str) -> list[str]:
    """Return the lines of a configuration without comments and indentation."""
    return [line for each in text.splitlines() if (line := each.strip()) and not line.startswith("#")]


# What Debian's and nginx.org's nginx.conf have around conf.d, but for the system's own folders.
STOCK = """
pid nginx.pid;
events {}
http {
    client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c; uwsgi_temp_path d; scgi_temp_path e;
    include conf.d/*.conf;
}
"""


def template(certificates: Path, tls: str, plain: str) -> str:
    """Return the whole server, renamed as its first lines say, listening on *tls* and *plain* alone."""
    text = (NGINX / "templates/sse.example.com.conf").read_text()
    text = text.replace("/etc/ssl/sse.example.com", str(certificates)).replace("sse.example.com", "kit.test")
    text = re.sub(r"(?m)^\s*listen \[::\]:.*\n", "", text)
    return text.replace("listen 443 ", f"listen {tls} ").replace("listen 80;", f"listen {plain};")


def downgraded(text: str) -> str:
    """Do with a TLS listener what its first lines say for nginx before 1.25.1."""
    return re.sub(r"(?m)^(\s*listen \d+ ssl)", r"\1 http2", re.sub(r"(?m)^\s*http2 on;\n", "", text))


class TestSyntax:
    @pytest.mark.parametrize("version", BINARIES)
    @pytest.mark.parametrize("upstream", ["static", "resolve"])
    @pytest.mark.parametrize("listen", ["listen.conf", "listen.tls.conf"])
    def test_every_form(self, binaries, folder, version, listen, upstream):
        """Plain and TLS, static and `resolve`; `resolve` needs 1.27.3, and older versions say so."""
        binary = binaries(version)
        text = (folder / listen).read_text()
        (folder / "listen.conf").write_text(downgraded(text) if older(binary, 1, 25, 1) else text)
        arguments = ["static", "10.0.0.5:8000"] if upstream == "static" else ["resolve", "app.kit.test:8000", "127.0.0.1"]
        printed = subprocess.run(["sh", str(NGINX / "upstream.sh"), *arguments], capture_output=True, text=True, check=True)
        (folder / "upstream.conf").write_text(printed.stdout)

        if upstream == "resolve" and older(binary, 1, 27, 3):
            with pytest.raises(AssertionError, match='"resolver" directive is not allowed here'):
                checked(binary, folder / "nginx.conf")
        else:
            checked(binary, folder / "nginx.conf")

    @pytest.mark.parametrize("version", BINARIES)
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("snippets/sse-sticky.conf", "snippets/sse-sticky-cookie.conf"),
            ("snippets/sse-sticky.conf", "snippets/sse-sticky.resolve.conf"),
            ("snippets/sse-real-ip.conf", "snippets/sse-proxy-protocol.conf"),
        ],
    )
    def test_other_forms_of_a_snippet(self, binaries, folder, version, old, new):
        """Each stands where the usual one stood; `sticky cookie` needs 1.29.6."""
        binary = binaries(version)
        conf = folder / "nginx.conf"
        assert old in conf.read_text()
        conf.write_text(conf.read_text().replace(old, new))

        if "cookie" in new and older(binary, 1, 29, 6):
            with pytest.raises(AssertionError, match='unknown directive "sticky"'):
                checked(binary, conf)
        else:
            checked(binary, conf)

    @pytest.mark.parametrize("version", BINARIES)
    def test_template(self, binaries, folder, version):
        """The whole server fits into an nginx.conf that includes conf.d, as Debian's and nginx.org's do."""
        binary = binaries(version)
        text = template(folder / "tls", "8443", "8080")  # ports that need no root
        (folder / "conf.d").mkdir()
        (folder / "conf.d/sse.conf").write_text(downgraded(text) if older(binary, 1, 25, 1) else text)
        (folder / "stock.conf").write_text(STOCK)

        checked(binary, folder / "stock.conf")

    @pytest.mark.parametrize("version", BINARIES)
    @pytest.mark.parametrize("name", SNIPPETS)
    def test_works_as_its_first_lines_say(self, binaries, folder, version, name):
        """A snippet says its context, what it needs, and the versions it works with; with these alone it loads."""
        binary = binaries(version)
        text = (folder / "snippets" / name).read_text()
        comment = " ".join(line.removeprefix("# ") for line in text.split("\n\n")[0].splitlines())
        context = re.match(r"Context: (location|http|server|upstream)", comment)
        assert context, comment
        assert re.search(r"[Ww]orks\W.*with nginx 1\.22|Needs nginx 1\.\d+\.\d+", comment), comment
        needed = set(re.findall(r"(sse-[a-z.-]+\.http\.conf)", comment)) if "http.conf" not in name else set()
        for each in (*needed, name):  # and what these need in turn
            needed |= set(re.findall(r"Needs[^.]*\(?(sse-user-key\.http\.conf)", (folder / "snippets" / each).read_text()))
            if "$sse_user_key" in (folder / "snippets" / each).read_text():
                needed.add("sse-user-key.http.conf")
        needed.discard(name)
        since = re.search(r"Needs nginx (\d+)\.(\d+)\.(\d+)", comment)
        if since and older(binary, *map(int, since.groups())):
            return  # refused, as test_other_forms_of_a_snippet sees
        included = f"include snippets/{name};"
        parts = {
            "http": included if context[1] == "http" else "",
            "upstream": included if context[1] == "upstream" else "",
            "server": included if context[1] == "server" else "",
            "location": included if context[1] == "location" else "",
        }
        conf = folder / "alone.conf"
        before = "".join(f"    include snippets/{each};\n" for each in sorted(needed))
        conf.write_text(
            "pid nginx.pid;\nevents {}\nhttp {\n"
            f"{before}    {parts['http']}\n"
            f"    upstream app {{ zone app 64k; {parts['upstream']} server 127.0.0.1:8001; }}\n"
            f"    server {{ listen 8080; {parts['server']}\n"
            f"        location @sse_native {{ proxy_pass http://app; }}\n"
            f"        location @sse_later {{ return 200; }}\n"
            f"        location /here {{ {parts['location']} proxy_pass http://app; }}\n    }}\n}}\n"
        )

        checked(binary, conf)


class TestTemplate:
    def test_the_same_as_nginx_conf(self):
        """The whole server says what nginx.conf says, but for addresses, names and certificates."""
        conf, whole = (directives((NGINX / name).read_text()) for name in ("nginx.conf", "templates/sse.example.com.conf"))

        def limits(lines: list[str]) -> set[str]:
            return {line for line in lines if re.match(r"(client_\w+_(size|timeout)|large_client|keepalive)", line)}

        def locations(lines: list[str]) -> list[str]:
            start = lines.index("error_page 413 429 500 502 503 504 @sse_problem;")
            return lines[start : lines.index("location = /.sse-problem {", start) + 5]

        assert locations(conf) == locations(whole)
        assert limits(conf) == limits(whole)
        assert {line for line in conf if ".http.conf;" in line} == {line for line in whole if ".http.conf;" in line}
        (plain,) = (line for line in whole if re.match(r"listen 443 ", line))
        assert plain.replace("443", "[::]:443") in whole
        assert "listen [::]:80;" in whole

    @pytest.mark.parametrize("name", ["tls", "h2"])
    async def test_serves(self, nginx, toys, tls, name):
        """Renamed, it streams over TLS, and sends on who comes without."""
        (toy,) = await toys()
        front = nginx([toy.server], way=name)
        (front.prefix / "conf.d").mkdir()
        text = template(tls, f"127.0.0.1:{front.port}", f"127.0.0.1:{front.metrics_port}")
        (front.prefix / "conf.d/sse.conf").write_text(text)
        (front.prefix / "nginx.conf").write_text(STOCK)
        await reload(front)
        async with way(name, front.port) as client, way("plain", front.metrics_port) as other:
            stream = await client.ask("/events?topic=a", NATIVE)
            toy.say(b"data: 0\n\n")
            await stream.until(lambda s: s.data == ["0"])
            sent_on = await other.ask("/events?topic=a")

        assert (308, "https://kit.test/events?topic=a") == (sent_on.status, sent_on.headers["location"])


class TestSecurity:
    # Checked, and right as it is; each with its reason.
    SKIPPED: ClassVar[dict[str, str]] = {
        "host_spoofing": "$host has no port, and the application compares the Origin of a page with the whole Host",
        "worker_rlimit_nofile_vs_connections": "worker_connections counts both sides of a stream already",
        "hsts_header": "binds a whole domain for months: its owner's decision, not a snippet's",
    }

    @pytest.mark.parametrize("form", ["listen.conf", "listen.tls.conf", "template"])
    def test_gixy(self, folder, form):
        """gixy-ng finds nothing of medium severity or more, and no known hole of the version that we name."""
        if form == "template":
            text = (folder / "templates/sse.example.com.conf").read_text()
            (folder / "nginx.conf").write_text(f"worker_rlimit_nofile 40000;\nevents {{ worker_connections 16384; }}\nhttp {{\n{text}\n}}\n")
        else:
            (folder / "listen.conf").write_text((folder / form).read_text())
        command = [
            str(Path(sys.executable).parent / "gixy"), "-ll", "-f", "text", "--nginx-version", "1.30.6",
            "--skips", ",".join(self.SKIPPED), str(folder / "nginx.conf"),
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, check=False)

        assert 0 == run.returncode, run.stdout + run.stderr
        assert "Medium: 0" in run.stdout, run.stdout
        assert "High: 0" in run.stdout, run.stdout

    def test_gixy_sees(self, folder):
        """The same check turns red for a header that a client could write."""
        conf = folder / "nginx.conf"
        conf.write_text(conf.read_text().replace("server_name _;", "server_name _; add_header X-A $uri;", 1))
        command = [str(Path(sys.executable).parent / "gixy"), "-ll", str(conf)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)

        assert 0 != run.returncode


class TestComments:
    def test_values_have_reasons(self):
        """Every file of snippets/ explains itself before its first directive."""
        for name in SNIPPETS:
            text = (NGINX / "snippets" / name).read_text()
            assert text.startswith("# Context: "), name
            assert text.count("#") >= 3, name

    def test_all_are_in_the_readme_and_in_the_config_map(self):
        """No snippet is forgotten where people look, nor where Kubernetes takes them."""
        readme = (NGINX / "README.md").read_text()
        kustomization = (NGINX / "kustomization.yaml").read_text()
        # One may stand in another's place: NAME=snippets/OTHER.
        mapped = set(re.findall(r"(?m)^ +- snippets/(\S+)$", kustomization))
        mapped |= {name for pair in re.findall(r"(?m)^ +- (\S+)=snippets/(\S+)$", kustomization) for name in pair}
        for name in SNIPPETS:
            assert f"(snippets/{name})" in readme, name
        assert set(SNIPPETS) == mapped

    def test_the_floor_is_one(self):
        """The security floor is the same in the README and in what fetches nginx for tests."""
        (floor,) = re.findall(r"(?m)^floor=(\S+)", (ROOT / ".make/nginx.sh").read_text())

        assert f"at least {floor}" in (NGINX / "README.md").read_text()


class TestMetrics:
    async def test_on_a_port_of_its_own(self, nginx, toys):
        """Counters and liveness answer there, whatever the application does, and not on the public port."""
        (toy,) = await toys()
        toy.answer = 404
        front = nginx([toy.server], version="system")
        async with way("plain", front.metrics_port) as inside, way("plain", front.port) as outside:
            for _ in range(3):
                await outside.ask("/events", NATIVE)
            counters = (await (await inside.ask("/metrics")).whole()).decode()
            alive = await (await inside.ask("/livez")).whole()
            public = await outside.ask("/livez")

        assert re.search(r"Active connections: \d+", counters)
        assert b"ok\n" == alive
        assert 404 == public.status
