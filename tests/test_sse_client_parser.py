"""
The browser client's parser passes the same cases as the application's, and the file stays small.

Here in Node; tests/browser/test_client_in_chromium.py has the same in Chromium, and all else of the client.
"""

import gzip
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "app" / "static" / "sse-client.js"
CASES = Path(__file__).with_name("parser_cases.json")
CHECK = Path(__file__).with_name("parser_cases.js").read_text()


def node(require, script: str) -> str:
    """Run *script* as a module that has imported all of the client; return what it prints."""
    head = f"import * as client from {json.dumps(CLIENT.as_uri())}; import {{ readFileSync }} from 'node:fs';\n"
    command = [require("node"), "--input-type=module", "-e", head + script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert 0 == run.returncode, run.stderr
    return run.stdout


class TestParser:
    def test_the_shared_cases(self, require):
        """
        The outcome is the standard's, whole, byte by byte, and cut in two at every place.
        """
        script = f"""
            const cases = JSON.parse(readFileSync({json.dumps(str(CASES))}));
            const check = {CHECK};
            console.log(JSON.stringify(check(client.Parser, cases)));
        """
        told = json.loads(node(require, script))

        assert [] == told["wrong"]
        assert told["checked"] > 1000

    def test_huge_event_in_small_pieces(self, require):
        """
        Time is linear: four times the bytes take four times as long; were it quadratic, sixteen.
        """
        script = """
            const piece = new Uint8Array(16).fill(120);
            const seconds = (count) => {
              let least = Infinity;
              for (let round = 0; round < 3; round += 1) {
                const before = process.cpuUsage().user;
                const parser = new client.Parser();
                parser.feed(new TextEncoder().encode("data: "));
                for (let at = 0; at < count; at += 1) parser.feed(piece);
                const [event] = parser.feed(new TextEncoder().encode("\\n\\n"));
                if (event.text.length !== 16 * count) throw new Error(event.text.length);
                least = Math.min(least, process.cpuUsage().user - before);
              }
              return least;
            };
            seconds(20_000);
            console.log(seconds(400_000) / seconds(100_000));
        """

        assert float(node(require, script)) < 9


class TestFile:
    def test_size(self):
        """
        A page loads it in under 6 KB.
        """
        assert len(gzip.compress(CLIENT.read_bytes(), 9)) < 6 * 1024
