"""
Every recipe runs: what is published in another language arrives as it was sent.

React itself is not here: the hook meets the three functions of React that it uses.
"""

import asyncio
import importlib.util
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.live import DEADLINE, Site, becomes, connect, logged, run, subscribed

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "app" / "recipes"
STATIC = RECIPES.parent / "static"
TEXT = 'größe "quoted" \\ $HOME `x` 😀\nsecond line'


@pytest.fixture(scope="module")
def served(require) -> Iterator[tuple]:
    require("redis-server", "valkey-server")
    with Site() as site:
        server = site.redis()
        yield server, site.app(server, task_root=str(RECIPES.parent))


@pytest.fixture
def recipe():
    """The recipe for Python, as a service that copied it imports it."""
    spec = importlib.util.spec_from_file_location("publish", RECIPES / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_node(served, require):
    server, app = served
    async with subscribed(app, "recipes/node") as stream:
        await run(require("node"), str(RECIPES / "publish.mjs"), server.url, "recipes/node", TEXT)

        await stream.until_data(TEXT)
    await run(require("node"), str(RECIPES / "publish.mjs"), f"redis://127.0.0.1:{server.port}/1", "recipes/node", TEXT)
    with redis.Redis(port=server.port, db=1) as other:
        assert 1 == other.xlen("{sse}:log")


async def test_node_where_redis_ends(require):
    """
    Who ends the connection has not taken the event: it fails, and says so.
    """

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"XADD")
        await reader.read(4096)
        writer.close()

    async with await asyncio.start_server(leave, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(AssertionError, match="Redis must answer, but ended the connection"):
            await run(require("node"), str(RECIPES / "publish.mjs"), f"redis://127.0.0.1:{port}", "a", "b")


async def test_php(served, require):
    server, app = served
    async with subscribed(app, "recipes/php") as stream:
        await run(
            require("php"), str(RECIPES / "publish.php"), "127.0.0.1", str(server.port), "recipes/php", TEXT
        )

        await stream.until_data(TEXT)


async def test_shell_by_redis(served, require):
    server, app = served
    require("redis-cli")
    async with subscribed(app, "recipes/shell") as stream:
        await run("sh", str(RECIPES / "publish.sh"), "redis", str(server.port), "recipes/shell", TEXT)

        await stream.until_data(TEXT)


async def test_shell_by_http(served, require):
    _, app = served
    require("curl")
    async with subscribed(app, "recipes/http") as stream:
        await run("sh", str(RECIPES / "publish.sh"), "http", app.url, "recipes/http", '{"id": 7}')

        await stream.until_data('{"id":7}')


async def test_python_to_one_user(served, recipe):
    server, app = served
    async with (
        subscribed(app, query={"user": "ann@example.com"}) as hers,
        subscribed(app, query={"user": "bob"}) as his,
    ):
        with connect(server) as redis:
            place = recipe.publish(redis, [recipe.user_topic("ann@example.com")], {"text": "hello"}, "notification")
            recipe.publish(redis, ["broadcast"], "to all")

        await hers.until_data('{"text": "hello"}', "to all")
        await his.until_data("to all")
    assert ["to all"] == his.data
    assert hers.ids[0].endswith(place)


async def test_dashboard_and_room(served, recipe):
    server, app = served
    async with subscribed(app, "dashboard/*") as board, subscribed(app, "rooms/1") as room:
        with connect(server) as redis:
            recipe.publish(redis, ["dashboard/load"], 0.7, "load")
            recipe.publish(redis, ["rooms/2"], "next door")
            recipe.publish(redis, ["rooms/1"], "in here")
            recipe.publish(redis, ["dashboard/users"], 12, "users")

        await board.until_data("0.7", "12")
        await room.until_data("in here")
    assert ["in here"] == room.data


async def test_the_publishers_own_acl(served, require):
    """
    The Redis user of the README may publish, and nothing else.
    """
    server, app = served
    line = next(line for line in (RECIPES / "README.md").read_text().splitlines() if line.startswith("ACL"))
    with connect(server) as redis:
        redis.execute_command(*line.replace("PASSWORD", "secret").split())
    async with subscribed(app, "recipes/acl") as stream:
        url = f"redis://publisher:secret@127.0.0.1:{server.port}"
        script = (
            f"import {{ publish }} from {json.dumps((RECIPES / 'publish.mjs').as_uri())};"
            f"await publish({json.dumps(url)}, ['recipes/acl'], {{ id: 7 }}, {{ event: 'created' }});"
            f"await publish({json.dumps(url)}, ['recipes/acl'], '', {{ prefix: 'other' }})"
            ".then(() => process.exit(1), ({ message }) => console.log(message));"
        )
        said = await run(require("node"), "--input-type=module", "-e", script)

        await stream.until_data('{"id":7}')
    assert "NOPERM" in said


def printed() -> dict[str, tuple[list[str], list[str]]]:
    """Return commands and output of each section of the recipes' README, as they are printed."""
    found = {}
    for section in (RECIPES / "README.md").read_text().split("\n### ")[1:]:
        name, rest = section.split("\n", 1)
        text = rest.split("```text\n", 1)[1].split("```", 1)[0]
        found[name] = (re.findall(r"(?m)^\$ (.+)$", rest.split("```text", 1)[0]), text.splitlines())
    return found


@pytest.mark.parametrize("name", printed())
async def test_as_printed(served, require, name):
    """
    Whoever follows the README sees what it shows.
    """
    require("curl")
    _, app = served
    commands, expected = printed()[name]
    read, *publish = [shlex.split(command.replace("http://localhost:8080", app.url)) for command in commands]
    curl = await asyncio.create_subprocess_exec(*read, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    assert curl.stdout
    shown: list[str] = []
    try:
        async with asyncio.timeout(DEADLINE):
            while (line := (await curl.stdout.readline()).decode()) != "event: stream.open\n":
                assert line, "the stream has ended"
            await curl.stdout.readuntil(b"\n\n")
            if publish:
                await run(*publish[0])
            while len(shown) < len(expected):
                line = (await curl.stdout.readline()).decode()
                assert line, (shown, "is all there was")
                if line.startswith(("event: ", "data: ")) and not line.startswith("event: stream."):
                    pattern = re.escape(expected[len(shown)]).replace("…", ".*")
                    if publish or re.fullmatch(pattern, line.strip()):
                        shown.append(line.strip())
                        assert re.fullmatch(pattern, line.strip()), shown
    finally:
        curl.kill()
        await curl.wait()

    assert 6 == len(printed())


async def test_python_typed(served, tmp_path):
    """
    What the README says that `follow.py` says, it says.
    """
    _, app = served
    section = (ROOT / "README.md").read_text().split("## In Python", 1)[1].split("\n## ", 1)[0]
    follow, publish = re.findall(r"(?m)^\$ (.+)$", section)
    said = section.split("```text\n", 1)[1].split("```", 1)[0]
    command = shlex.split(follow.replace("http://localhost:8080", app.url))[1:]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout
    try:
        async with asyncio.timeout(DEADLINE):
            await becomes(lambda: streams_of(app, "orders"), "it follows the topic")
            await run(*shlex.split(publish.replace("http://localhost:8080", app.url)))
            lines = [await process.stdout.readline() for _ in said.splitlines()]
    finally:
        process.kill()
        await process.wait()

    assert said == b"".join(lines).decode()


async def streams_of(app, topic):
    """How many streams of *topic* the process has opened."""
    return [line for line in logged(app, "stream_opened") if topic in line["topics"]]


if shutil.which("go"):

    async def test_go(tmp_path, stack):
        """
        Every event once and in order, over many streams, while the process is killed and comes back.
        """
        kit = await asyncio.to_thread(stack, apps=1, nginx=False, env={"SSE_MAX_AGE_SECONDS": "0.5", "SSE_HEARTBEAT_SECONDS": "0.4", "SSE_RETRY_MS": "20"})
        server, [app] = kit.redis, kit.apps
        await run("go", "build", "-o", str(tmp_path / "listen"), str(RECIPES / "listen.go"))
        process = await asyncio.create_subprocess_exec(
            str(tmp_path / "listen"), app.url, "recipes/go", stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout
        try:
            async with asyncio.timeout(DEADLINE):
                await becomes(lambda: streams_of(app, "recipes/go"), "it follows the topic")
                with connect(server) as redis:
                    for number in range(100):
                        if number == 50:
                            await asyncio.to_thread(app.restart, signal.SIGKILL)
                        redis.xadd("{sse}:log", {"v": "1", "topics": "recipes/go", "data": f"{number}\nö"})
                        await asyncio.sleep(0.02)
                lines = [(await process.stdout.readline()).decode().split(" ", 2) for _ in range(100)]
        finally:
            process.kill()
            await process.wait()

        assert [f'"{number}\\nö"\n' for number in range(100)] == [line[2] for line in lines]
        assert {"message"} == {line[1] for line in lines}
        assert len(await streams_of(app, "recipes/go")) >= 3


REACT = """
// The three functions of React that the hook uses, for one component.
let slots = [], at = 0, effects = [], render = () => {};
export const useState = (first) => {
  const slot = at++;
  if (!(slot in slots)) slots[slot] = first;
  return [slots[slot], (value) => { slots[slot] = value; queueMicrotask(() => render()); }];
};
export const useRef = (first) => { const slot = at++; return (slots[slot] ??= { current: first }); };
export const useEffect = (run, needs) => effects.push([at++, run, needs]);
export const show = (component) => {
  render = () => {
    at = 0; effects = []; component();
    for (const [slot, run, needs] of effects) {
      const before = slots[slot];
      if (before && before.needs.every((need, i) => need === needs[i])) continue;
      before?.undo?.();
      slots[slot] = { needs, undo: run() };
    }
  };
  render();
  return () => slots.forEach((slot) => slot?.undo?.());
};
"""

COMPONENT = """
import { show } from "react";
import { useEvents } from "./use-events.js";
const [, , url] = process.argv;
let topics = ["recipes/react"], opens = 0, states = [];
const remove = show(() => {
  const { state } = useEvents(url, { topics, mode: "fetch" }, {
    created: ({ id }) => { console.log(JSON.stringify({ id, opens, states })); if (id === 2) remove(); },
    "stream.open": () => { opens += 1; console.log("open"); },
  });
  if (states.at(-1) !== state) states.push(state);
});
"""


async def test_react_hook(served, require, tmp_path):
    """
    One stream for all renders, handlers that are up to date, and none left when the component goes.
    """
    server, app = served
    (tmp_path / "node_modules/react").mkdir(parents=True)
    (tmp_path / "node_modules/react/index.js").write_text(REACT)
    (tmp_path / "node_modules/react/package.json").write_text('{"type": "module", "main": "index.js"}')
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "component.js").write_text(COMPONENT)
    shutil.copy(RECIPES / "use-events.js", tmp_path)
    shutil.copy(STATIC / "sse-client.js", tmp_path)
    process = await asyncio.create_subprocess_exec(
        require("node"), str(tmp_path / "component.js"), f"{app.url}/events", stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE):
        assert b"open\n" == await process.stdout.readline()
        with connect(server) as redis:
            for number in (1, 2):
                redis.xadd(
                    "{sse}:log", {"v": "1", "topics": "recipes/react", "event": "created", "data": f'{{"id": {number}}}'}
                )
        told = [json.loads(await process.stdout.readline()) for _ in range(2)]
        assert 0 == await process.wait()

    assert [1, 2] == [each["id"] for each in told]
    assert 1 == told[-1]["opens"]
    assert ["new", "connecting", "open"] == told[-1]["states"]
