/*
 * Publish an event from Node by one XADD, without a package.
 *
 *   await publish("redis://127.0.0.1:6379", ["orders"], { id: 7 }, { event: "created" });
 *
 * Or as a command: node publish.mjs redis://127.0.0.1:6379 orders "a text"
 *
 * With a client of your own: client.xAdd("{sse}:log", "*", { v: "1", topics: "orders", data: "…" }).
 */

import { connect } from "node:net";
import { fileURLToPath } from "node:url";

export function publish(url, topics, data, { event, retry, prefix = "sse" } = {}) {
  const { protocol, hostname, port, username, password, pathname } = new URL(url);
  if (protocol !== "redis:") throw new TypeError(`url must begin with redis://, got ${protocol}// Use a client that speaks TLS.`);
  const text = typeof data === "string" ? data : JSON.stringify(data);
  const fields = ["v", "1", "topics", topics.join(" "), "data", text];
  if (event) fields.push("event", event);
  if (retry !== undefined) fields.push("retry", String(retry));
  const commands = [["XADD", `{${prefix}}:log`, "*", ...fields]];
  if (pathname.length > 1) commands.unshift(["SELECT", pathname.slice(1)]);
  if (password) commands.unshift(["AUTH", decodeURIComponent(username) || "default", decodeURIComponent(password)]);

  return new Promise((resolve, reject) => {
    const socket = connect(Number(port) || 6379, hostname.replace(/^\[|\]$/g, ""));
    let answer = "";
    socket.setTimeout(5_000, () => socket.destroy(new Error("Redis did not answer in 5 s")));
    socket.on("error", reject);
    socket.on("close", () => reject(new Error("Redis must answer, but ended the connection")));
    socket.on("data", (bytes) => {
      answer += bytes;
      const refused = /(?:^|\r\n)-(.*)\r\n/.exec(answer)?.[1];
      if (refused) {
        reject(new Error(refused));
        return socket.destroy();
      }
      const id = /(\d+-\d+)\r\n$/.exec(answer)?.[1];
      if (!id) return;
      socket.end();
      resolve(id);
    });
    socket.write(commands.map(encode).join(""));
  });
}

// https://redis.io/docs/latest/develop/reference/protocol-spec/
function encode(words) {
  return `*${words.length}\r\n` + words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join("");
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [, , url, topic, data] = process.argv;
  console.log(await publish(url, [topic], data));
}
