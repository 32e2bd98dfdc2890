// Pictures that were drawn, as this browser keeps them.

import { $, ask, fill, h, setText } from "./dom.js";
import * as api from "./api.js";
import * as store from "./store.js";

let entries = [], marked = null, show = () => {};
const tiles = new Map();    // key: element
const REMOVED = "latentrt.removed", MOST_REMOVED = 500;  // keys of pictures that the service may still have
const fetching = new Set();

export const list = () => entries;
export const newest = () => entries[0] ?? null;
export const find = (key) => entries.find((one) => one.key === key) ?? null;

export async function begin(listeners) {
  ({ show } = listeners);
  $("clear").addEventListener("click", clear);
  $("history").addEventListener("keydown", move);
  entries = await store.all();
  render();
}

/** Fetch and keep the pictures of a job that are not here yet; give those that are new. */
export async function take(job) {
  const fresh = [];
  for (const { picture, seed, settings, seconds } of job.pictures) {
    const key = `${job.id}/${picture}`;
    if (fetching.has(key) || find(key) || removed().includes(key)) continue;
    fetching.add(key);
    try {
      const blob = await api.picture(job.id, picture);
      const named = { ...settings, model: job.model };  // as it is asked for here, not as its bundle calls itself
      const entry = { key, job: job.id, picture, created: job.created, blob, thumb: await store.thumbnail(blob), seed, settings: named, seconds };
      entries = [entry, ...entries].sort((one, other) => other.created - one.created || other.picture - one.picture);
      render();
      await store.add(entry);
      fresh.push(entry);
    } finally {
      fetching.delete(key);
    }
  }
  return fresh;
}

function removed() {
  try { return JSON.parse(localStorage.getItem(REMOVED)) ?? []; } catch { return []; }
}

/** Remove a picture; give the one that takes its place. */
export async function remove(entry) {
  try { localStorage.setItem(REMOVED, JSON.stringify([...removed(), entry.key].slice(-MOST_REMOVED))); } catch { /* it may come back */ }
  const at = entries.indexOf(entry);
  entries = entries.filter((one) => one !== entry);
  render();
  await store.remove(entry.key);
  if (!entries.some((one) => one.job === entry.job)) api.forget(entry.job).catch(() => {});
  return entries[at] ?? entries[at - 1] ?? null;
}

async function clear() {
  const text = `${entries.length} pictures are removed from this browser. This cannot be undone.`;
  if (!(await ask({ title: "Clear the history?", text, yes: "Clear" }))) return;
  const old = entries;
  entries = [];
  render();
  for (const entry of old) await store.remove(entry.key);
  for (const id of new Set(old.map((one) => one.job))) api.forget(id).catch(() => {});
  show(null);
  $("prompt").focus();
}

export function render() {
  for (const key of [...tiles.keys()]) if (!find(key)) { URL.revokeObjectURL(tiles.get(key).dataset.url); tiles.delete(key); }
  fill($("history"), entries.map(tile));
  reach(marked);
  setText($("history-count"), String(entries.length));
  $("history-empty").hidden = entries.length > 0;
  $("clear").hidden = entries.length === 0;
}

function tile(entry) {
  if (!tiles.has(entry.key)) {
    const url = URL.createObjectURL(entry.thumb);
    const name = `${entry.settings.prompt || "No prompt"}, seed ${entry.seed}`;
    tiles.set(entry.key, h("li", { "data-url": url, "data-key": entry.key },
      h("button", { type: "button", click: () => show(entry), title: name }, h("img", { src: url, alt: name, loading: "lazy" }))));
  }
  return tiles.get(entry.key);
}

/** Mark the picture that is shown. */
export function mark(entry) {
  marked = entry?.key ?? null;
  for (const [key, element] of tiles) {
    const button = element.firstElementChild;
    if (key === marked) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  reach(marked);
}

/** Have Tab stop at one picture alone, the one that is shown or the first: arrow keys lead to the others. */
function reach(key) {
  const stop = tiles.has(key) ? key : entries[0]?.key;
  for (const [other, element] of tiles) element.firstElementChild.tabIndex = other === stop ? 0 : -1;
}

function move(event) {
  const all = [...$("history").children], at = all.findIndex((one) => one.contains(event.target));
  const columns = all.filter((one) => one.offsetTop === all[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: all.length - 1 - at }[event.key];
  const next = step === undefined ? null : all[at + step];
  if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (!next) return;
  reach(next.dataset.key);
  next.firstElementChild.focus();
}
