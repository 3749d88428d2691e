/*
 * What the page's scripts share. Everything that came from outside is inserted
 * as text, never as markup.
 */

export const byId = (id) => document.getElementById(id);
export const words = (text) => [...new Set(text.split(/\s+/).filter(Boolean))];
export const integers = new Intl.NumberFormat("en");
export const wholeSeconds = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
export const clock = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3,
});

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Problems (RFC 9457): what was wrong, which value, and what to do.

export async function readProblem(answer) {
  const title = `${answer.status} ${answer.statusText}`.trim();
  const type = answer.headers.get("content-type") ?? "";
  if (!type.includes("json")) return { title };
  try {
    return { title, ...(await answer.json()) };
  } catch {
    return { title };
  }
}

export function showProblem(place, problem) {
  place.replaceChildren();
  place.hidden = !problem;
  if (!problem) return;
  const status = problem.status ? `${problem.status} ` : "";
  const title = String(problem.title ?? "The request failed");
  place.append(element("strong", "", title.startsWith(status) ? title : status + title));
  const { name, rule, value, cure, detail } = problem;
  if (name !== undefined && rule !== undefined) {
    const said = element("p");
    said.append(element("code", "", String(name)), ` ${rule}`);
    if (value !== undefined) said.append(", got ", element("code", "", shortened(value)));
    said.append(".");
    place.append(said);
  } else if (detail) {
    place.append(element("p", "", String(detail)));
  }
  if (cure) place.append(element("p", "", String(cure)));
}

function shortened(value) {
  const said = typeof value === "string" ? value : JSON.stringify(value);
  return said.length > 200 ? `${said.slice(0, 200)}…` : said;
}
