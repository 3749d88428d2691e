// Check custom resources: names and types by TypeScript, values by JSON schema.
//
//   node custom.cjs FOLDER <objects.json
//
// The schemas alone let unknown fields pass, because the API server prunes them
// silently; the types do not. Prints one line per fault.
const { execFileSync } = require("node:child_process");
const { readFileSync, writeFileSync, rmSync } = require("node:fs");
const { createRequire } = require("node:module");
const { pathToFileURL } = require("node:url");
const path = require("node:path");

const folder = path.resolve(process.argv[2]);
const PACKAGES = {
  "monitoring.coreos.com": "prometheus-operator",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "gateway.envoyproxy.io": "envoy-gateway",
};

async function load(name) {
  try {
    return createRequire(path.join(folder, "package.json"))(name);
  } catch (error) {
    if (error.code !== "ERR_PACKAGE_PATH_NOT_EXPORTED" && error.code !== "ERR_REQUIRE_ESM") throw error;
  }
  const [scope, pack, ...rest] = name.split("/");
  const root = path.join(folder, "node_modules", scope, pack, ...rest);
  return import(pathToFileURL(path.join(root, "index.mjs")).href).catch(
    () => import(pathToFileURL(path.join(root, "index.js")).href));
}

async function main() {
  const objects = JSON.parse(readFileSync(0, "utf8"));
  const faults = [];
  const lines = [];
  const names = [];
  for (const [number, object] of objects.entries()) {
    const [group, version] = object.apiVersion.split("/");
    const name = `${object.kind} ${object.metadata.name}`;
    if (!(group in PACKAGES)) {
      faults.push(`${name}: no schema is known for ${object.apiVersion}`);
      continue;
    }
    const module = `@kubernetes-models/${PACKAGES[group]}/${group}/${version}`;
    const kinds = await load(module);
    if (!(object.kind in kinds)) {
      faults.push(`${name}: ${module} has no ${object.kind}`);
      continue;
    }
    try {
      new kinds[object.kind](object).validate();
    } catch (error) {
      faults.push(`${name}: ${error.message}`);
    }
    // The class itself knows its version and kind.
    const { apiVersion, kind, ...rest } = object;
    lines.push(`import { ${object.kind} as K${number} } from "${module}"; new K${number}(${JSON.stringify(rest)});`);
    names.push(name);
  }
  const file = path.join(folder, `objects-${process.pid}.ts`);
  writeFileSync(file, lines.join("\n"));
  try {
    execFileSync(path.join(folder, "node_modules/.bin/tsc"),
      ["--noEmit", "--strict", "--skipLibCheck", "--moduleResolution", "bundler", "--module", "esnext", "--types", "", file],
      { cwd: folder, encoding: "utf8" });
  } catch (error) {
    for (const line of (error.stdout || String(error)).split("\n").filter(Boolean)) {
      const at = /\.ts\((\d+),/.exec(line);
      faults.push(`${at ? names[at[1] - 1] : "tsc"}: ${line.replace(/^.*error /, "")}`);
    }
  } finally {
    rmSync(file, { force: true });
  }
  for (const fault of faults) console.log(fault);
}

main();
