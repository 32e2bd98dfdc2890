// What the page asks the service for: every request carries the session, and the key where there is one.

const SESSION = "latentrt.session", KEY = "latentrt.key";

/** Keep a text in the browser where it lets us, for as long as the page lives where it does not. */
const kept = new Map();
function keep(name, value) {
  kept.set(name, value);
  try { localStorage.setItem(name, value); } catch { /* kept above */ }
}
function recall(name) {
  try { return localStorage.getItem(name) ?? kept.get(name) ?? null; } catch { return kept.get(name) ?? null; }
}

function session() {
  let found = recall(SESSION);
  if (!/^[\w-]{16,64}$/.test(found ?? "")) {
    found = [...crypto.getRandomValues(new Uint8Array(24))].map((one) => one.toString(16).padStart(2, "0")).join("");
    keep(SESSION, found);
  }
  return found;
}

export class Refusal extends Error {
  constructor(status, error, retryAfter) {
    super(error?.message ?? `the service answered ${status}`);
    this.status = status;
    this.param = error?.param ?? null;
    this.code = error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}

let askKey = async () => null;
let asking = null, declined = false;  // who gave no key is asked again when they draw, not by every request
export const onKeyNeeded = (ask) => { askKey = ask; };

/** Fetch a path, relative to the page. Raises Refusal; asks for a key where one is needed, once for all requests. */
export async function call(path, { method = "GET", json, body, signal } = {}) {
  const headers = { "x-latentrt-session": session() };
  const key = recall(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (json !== undefined) headers["content-type"] = "application/json";
  const sent = { method, headers, signal, body: json === undefined ? body : write(json) };
  const answer = await fetch(path, sent).catch(() => {
    throw new Refusal(0, { message: "The service does not answer. The page tries to reach it again; then ask once more." });
  });
  if (answer.ok) return answer;
  if (answer.status === 401 && !declined) {
    asking ??= askKey().finally(() => { asking = null; });
    const given = await asking;
    declined = !given;
    if (given) {
      keep(KEY, given);
      return call(path, { method, json, body, signal });
    }
  }
  const found = await answer.json().catch(() => null);
  throw new Refusal(answer.status, found?.error, Number(answer.headers.get("retry-after")) || null);
}

/** Read JSON. Seeds have up to 64 bits and JavaScript's numbers 53: a longer one stays the text that it is. */
const parse = (text) => JSON.parse(text, (name, value, context) => (
  name === "seed" && typeof value === "number" && !Number.isSafeInteger(value) ? context?.source ?? String(value) : value));
const read = async (answer) => parse(await answer.text());
/** Write JSON, with a seed that is a text as the number that it is. */
const write = (asked) => JSON.stringify(asked).replace(/"seed":"(\d+)"/, '"seed":$1');

export const choices = async () => read(await call("jobs/choices"));
export async function submit(form) {
  declined = false;
  return read(await call("jobs", { method: "POST", ...(form instanceof FormData ? { body: form } : { json: form }) }));
}
export const cancel = async (id) => call(`jobs/${id}`, { method: "DELETE" });
export const forget = cancel;
export const cancelAll = async (but = null) => call("jobs/cancel", { method: "POST", json: { but } });
export const picture = async (id, number) => (await call(`jobs/${id}/pictures/${number}`)).blob();
export const settingsOf = async (file) => read(await call("jobs/settings", { method: "POST", body: file }));

/** Follow the session's jobs for as long as the page lives. listeners: by event; `state` is told "on" and "off" */
export async function follow(listeners) {
  for (let pause = 500; ; pause = Math.min(8000, pause * 2)) {
    try {
      const answer = await call("jobs/events");
      listeners.state("on");
      pause = 500;
      for await (const { kind, data } of events(answer.body)) listeners[kind]?.(data);
    } catch { /* it is not there, or went away: the page says so, and tries again */ }
    listeners.state("off");
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

/** Give the events of a stream. EventSource sends no headers, so that a session and a key would be in the address. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split(/\r?\n\r?\n/);
    text = parts.pop();
    for (const part of parts) {
      const fields = { event: "", data: [] };
      for (const line of part.split(/\r?\n/)) {
        if (line.startsWith("event:")) fields.event = line.slice(6).trim();
        if (line.startsWith("data:")) fields.data.push(line.slice(5).replace(/^ /, ""));
      }
      if (fields.data.length) yield { kind: fields.event, data: parse(fields.data.join("\n")) };
    }
  }
}
