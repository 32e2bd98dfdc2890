// Jobs that wait, are being drawn, or failed.

import { $, announce, fill, h, icon, setText } from "./dom.js";
import * as api from "./api.js";
import { describe } from "./stage.js";

const jobs = new Map();      // id: view
const previews = new Map();  // id: Map(picture: source)
const cards = new Map();     // id: element
const told = new Set();      // ids, since the service was last connected
let show = () => {}, fail = () => {};

export const find = (id) => jobs.get(id) ?? null;
export const sources = (id) => previews.get(id) ?? new Map();
export const active = (job) => job.state === "waiting" || job.state === "drawing";
export const first = () => [...jobs.values()].find(active) ?? null;

export function begin(listeners) {
  ({ show, fail } = listeners);
  $("cancel-all").addEventListener("click", () => api.cancelAll().catch(fail));
}

/** The service tells of all its jobs anew; those that it does not tell of are no more. */
export const restart = () => told.clear();
export function settle() {
  for (const id of [...jobs.keys()]) if (!told.has(id)) gone(id);
}

/** Take in what a job has come to. */
export function take(job) {
  told.add(job.id);
  const before = jobs.get(job.id);
  jobs.set(job.id, job);
  if (job.state === "cancelled") api.forget(job.id).catch(() => {});
  if (job.state !== before?.state) tell(job, before);
  if (!active(job)) previews.delete(job.id);
  render();
}

/** Take in the answer to a form. The job's own events may have been quicker, and know more. */
export function takeAnswer(job) {
  if (!told.has(job.id)) take(job);
}

function tell(job, before) {
  const prompt = job.asked.prompt.slice(0, 60);
  if (job.state === "drawing" && before) announce(`Drawing: ${prompt}`);
  if (job.state === "done" && before) announce(`Done: ${prompt}`);
  if (job.state === "failed") announce(`Failed: ${job.error?.message ?? prompt}`);
  if (job.state === "cancelled" && before) announce(`Cancelled: ${prompt}`);
}

export function takePreview({ id, picture, source }) {
  const job = jobs.get(id);
  if (!job || !active(job)) return;
  if (!previews.has(id)) previews.set(id, new Map());
  previews.get(id).set(picture, source);
  const card = cards.get(id);
  if (card) thumb(card, id);
}

/** Forget a job that the service has forgotten. */
export function gone(id) {
  jobs.delete(id);
  previews.delete(id);
  render();
}

export function render() {
  const listed = [...jobs.values()].filter((job) => active(job) || job.state === "failed");
  const drawn = listed.filter(active);
  for (const id of [...cards.keys()]) if (!listed.some((job) => job.id === id)) leave(id);
  fill($("queue"), listed.map(card));
  setText($("queue-count"), String(drawn.length));
  $("queue-empty").hidden = listed.length > 0;
  $("cancel-all").hidden = drawn.length === 0;
  const progress = drawn.reduce((sum, job) => sum + job.progress, 0) / drawn.length;
  document.title = drawn.length ? `${Math.round(100 * progress)} % · latentrt` : "latentrt";
  for (const element of $("queue").querySelectorAll("[data-only]")) element.hidden = drawn.length < 2;
}

/** Drop a card; where the keyboard was in it, it goes to the next one. */
function leave(id) {
  const card = cards.get(id);
  if (card.contains(document.activeElement)) {
    const next = card.nextElementSibling ?? card.previousElementSibling;
    (next?.querySelector("button") ?? $("prompt")).focus();
  }
  cards.delete(id);
}

function card(job) {
  if (!cards.has(job.id)) cards.set(job.id, make(job));
  const made = cards.get(job.id);
  made.dataset.state = job.state;
  setText(made.querySelector(".where"), describe(job));
  made.querySelector("progress").value = job.progress;
  const failed = job.state === "failed";
  const cancel = made.querySelector("[data-cancel]");
  const name = `${failed ? "Dismiss" : "Cancel"}: ${job.asked.prompt.slice(0, 60)}`;
  if (cancel.getAttribute("aria-label") !== name) { cancel.setAttribute("aria-label", name); cancel.title = failed ? "Dismiss" : "Cancel"; }
  made.querySelector("[data-only]").toggleAttribute("disabled", failed);
  return made;
}

function make(job) {
  const prompt = job.asked.prompt || "No prompt";
  const made = h("li", { class: "card", "data-job": job.id },
    h("button", { type: "button", class: "open", "aria-label": `Show: ${prompt.slice(0, 60)}`, click: () => show(job.id) }, h("span", { class: "thumb" })),
    h("div", { class: "words" }, h("p", { class: "said" }, prompt), h("p", { class: "where hint" }),
      h("progress", { max: 1, value: 0, "aria-label": "Progress" })),
    h("div", { class: "tools" },
      h("button", { type: "button", class: "quiet icon", "data-cancel": true, click: () => api.cancel(job.id).catch(fail) }, icon("close")),
      h("button", { type: "button", class: "quiet icon", "data-only": true, "aria-label": `Cancel all but: ${prompt.slice(0, 60)}`, title: "Cancel all but this", click: () => api.cancelAll(job.id).catch(fail) }, icon("only"))),
  );
  thumb(made, job.id);
  return made;
}

function thumb(card, id) {
  const source = [...sources(id).values()][0], holder = card.querySelector(".thumb");
  if (!source) return;
  if (!holder.firstChild) holder.append(h("img", { alt: "" }));
  holder.firstChild.src = source;
}
