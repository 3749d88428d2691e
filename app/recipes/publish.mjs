/*
 * Publish an event from Node by one XADD, without a package.
 *
 *   await publish("redis://127.0.0.1:6379", ["orders"], { id: 7 }, { event: "created" });
 *
 * With a client of your own: client.xAdd("{sse}:log", "*", { v: "1", topics: "orders", data: "…" }).
 */

import { connect } from "node:net";

export function publish(url, topics, data, { event, retry, prefix = "sse" } = {}) {
  const { hostname, port, username, password } = new URL(url);
  const text = typeof data === "string" ? data : JSON.stringify(data);
  const fields = ["v", "1", "topics", topics.join(" "), "data", text];
  if (event) fields.push("event", event);
  if (retry !== undefined) fields.push("retry", String(retry));
  const commands = [["XADD", `{${prefix}}:log`, "*", ...fields]];
  if (password) commands.unshift(["AUTH", username || "default", decodeURIComponent(password)]);

  return new Promise((resolve, reject) => {
    const socket = connect(Number(port) || 6379, hostname);
    let answer = "";
    socket.setTimeout(5_000, () => socket.destroy(new Error("Redis did not answer in 5 s")));
    socket.on("error", reject);
    socket.on("data", (bytes) => {
      answer += bytes;
      if (answer.startsWith("-") || answer.includes("\r\n-")) {
        socket.destroy();
        reject(new Error(answer.slice(answer.lastIndexOf("-") + 1).trim()));
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

if (process.argv[1] === import.meta.filename) {
  const [, , url, topic, data] = process.argv;
  console.log(await publish(url, [topic], data));
}
