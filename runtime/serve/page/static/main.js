// The page: who tells whom.

import { $, announce, ask, onDrop, setText } from "./dom.js";
import * as api from "./api.js";
import * as compare from "./compare.js";
import * as form from "./form.js";
import * as history from "./history.js";
import * as image from "./image.js";
import * as queue from "./queue.js";
import * as stage from "./stage.js";

let follows = null;  // the job whose picture is shown when it is done
let opened = false;

const fail = (error) => { form.refuse(error); };

function show(entry) {
  follows = null;
  if (entry) stage.showEntry(entry); else stage.showNothing();
  history.mark(entry);
}

function showJob(id) {
  const job = queue.find(id);
  if (!job) return;
  follows = id;
  stage.showJob(job, queue.sources(id));
  history.mark(null);
}

async function draw() {
  form.refuse(null);
  try {
    const job = await api.submit(await form.body());
    queue.takeAnswer(job);
    const busy = follows && queue.find(follows) && queue.active(queue.find(follows));
    const entry = history.list().find((one) => one.job === job.id);
    if (!busy) { if (entry) show(entry); else showJob(job.id); }
    for (const part of ["stage", "stage-progress"]) $(part).scrollIntoView({ block: "nearest" });
    announce("In the queue");
  } catch (error) { fail(error); }
}

async function onJob(job) {
  queue.take(job);
  if (follows === job.id) {
    if (queue.active(job)) showJob(job.id);
    else if (job.state !== "done") { const next = queue.first(); if (next) showJob(next.id); else show(history.newest()); }
  }
  if (!job.pictures.length) return;
  const fresh = await history.take(job).catch(fail) ?? [];
  if (job.state !== "done") return;
  const next = queue.first();
  if (follows === job.id) {
    const last = fresh.at(-1) ?? history.list().find((one) => one.job === job.id);
    if (last) { stage.showEntry(last); history.mark(last); }
    if (next) follows = next.id;
  }
}

function onPreview(preview) {
  queue.takePreview(preview);
  if (follows === preview.id) showJob(preview.id);
}

/** All that the service has is here: when the page was opened, a job that is being drawn is shown again. */
function onReady() {
  queue.settle();
  const job = queue.first();
  if (job && !opened) showJob(job.id);
  opened = true;
}

async function restore(file) {
  try {
    const found = await api.settingsOf(file);
    form.restore(found, found.seed);
    form.refuse(null);
    announce("The settings were taken from the picture");
    $("prompt").focus();
  } catch (error) { fail(error); }
}

function beginActions() {
  const entry = () => stage.now()?.entry ?? null;
  $("reuse-all").addEventListener("click", () => { form.restore(entry().settings, entry().seed); announce("The settings were taken"); });
  $("start-from").addEventListener("click", async () => { await image.take(entry().blob); $("image-part").scrollIntoView({ block: "nearest" }); announce("The picture is the image to start from"); });
  $("compare").addEventListener("click", () => compare.open(entry(), history.list()));
  $("remove").addEventListener("click", async () => { show(await history.remove(entry())); $("prompt").focus(); });
  $("restore").addEventListener("click", () => $("restore-file").click());
  $("restore-file").addEventListener("change", () => { if ($("restore-file").files[0]) restore($("restore-file").files[0]); $("restore-file").value = ""; });
  onDrop(document.body, restore, (over) => { $("drop-sheet").hidden = !over; });
}

function beginTheme() {
  const themes = ["system", "light", "dark"];
  const name = () => document.documentElement.dataset.theme ?? "system";
  const tell = () => $("theme").setAttribute("aria-label", `Theme: ${name() === "system" ? "as the system has it" : name()}`);
  $("theme").addEventListener("click", () => {
    const next = themes[(themes.indexOf(name()) + 1) % themes.length];
    if (next === "system") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = next;
    try { localStorage.setItem("latentrt.theme", next); } catch { /* then it is as the system has it next time */ }
    tell();
  });
  tell();
}

function offer(choices) {
  form.offer(choices);
  stage.nameSamplers(choices.samplers);
  const entry = stage.now()?.entry;
  if (entry) stage.showEntry(entry, { again: true });
}

function onState(state) {
  const words = { on: "Connected", off: "No connection; trying again…" };
  $("connection").dataset.state = state;
  setText($("connection"), words[state]);
  if (state === "on") queue.restart();
  if (state === "on") api.choices().then(offer).catch(fail);
}

async function begin() {
  api.onKeyNeeded(() => ask({ title: "This service needs a key", text: "It is kept in this browser.", yes: "Use it", key: true }));
  form.begin({ draw, seedShown: () => stage.now()?.entry?.seed ?? history.newest()?.seed ?? null });
  image.begin({ toFit: (ratio) => form.setSize(...form.sizeOf(ratio)), fail });
  queue.begin({ show: showJob, fail });
  beginActions();
  beginTheme();
  stage.showNothing();
  await history.begin({ show });
  if (history.newest()) show(history.newest());
  api.follow({ state: onState, job: onJob, preview: onPreview, gone: ({ id }) => queue.gone(id), ready: onReady });
}

begin();
