/*
 * The token that the page's requests show, where the server asks for one.
 *
 * Kept in this page's memory alone: in no address, no storage and no cookie, and
 * forgotten when the page is left.
 */

import { byId } from "./parts.js";

let token = "";
const waiting = new Set(); // who asked for the next one

/**
 * For sse-client.js: the token, or nothing without one.
 *
 * While `open()` says that the stream is there, a new one is wanted for it: then
 * the next that is entered.
 */
export function supply(open = () => false) {
  if (!token) return undefined;
  return ({ renew }) => {
    if (!renew || !open()) return token;
    ask("Your token expires soon. Enter a new one and connect: the stream goes on.");
    return new Promise((resolve) => waiting.add(resolve));
  };
}

/** Headers of the page's own requests. */
export const authorization = () => (token ? { Authorization: `Bearer ${token}` } : {});

/** Which tabs share a stream: those with the same address, and the same token if there is one. */
export async function sharing(address) {
  if (!token) return true;
  if (!globalThis.crypto?.subtle) return false; // without TLS there are no locks either
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(`${address} ${token}`));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Take what was entered. True where streams waited for it, and go on with it. */
export function takeToken() {
  // What was copied from a terminal may bring its line end.
  const entered = byId("token").value.trim();
  const renewed = waiting.size > 0 && entered !== "" && entered !== token;
  token = entered;
  ask("");
  if (renewed) for (const resolve of waiting) resolve(token);
  waiting.clear();
  return renewed;
}

function ask(text) {
  byId("token-asked").textContent = text;
}
