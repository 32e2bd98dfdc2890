// The large view: a picture that is being drawn, or one that is done, with what it was drawn with.

import { $, h, seconds, setText } from "./dom.js";

let url = null, shown = null, titles = new Map();

/** Have samplers called as people read them. */
export function nameSamplers(samplers) { titles = new Map(samplers.map(({ name, title }) => [name, title])); }
const titled = (name) => titles.get(name.replace(/^own:/, "")) ?? name;

/** Return what is shown: {job} or {entry}, null for nothing. */
export const now = () => shown;

function view(element, kind) {
  $("stage").dataset.kind = kind;
  $("stage").replaceChildren(...[element].flat());
}

export function showNothing() {
  shown = null;
  view([h("p", {}, "Describe a picture, and press Draw."), h("p", { class: "hint" }, "Ctrl+Enter draws from anywhere on the page.")], "empty");
  for (const id of ["actions", "about", "stage-progress"]) $(id).hidden = true;
}

/** Show a job: its newest previews, and where it has come to. sources: of the previews, by picture */
export function showJob(job, sources) {
  const same = shown?.job === job.id;
  shown = { job: job.id };
  const wanted = [...sources.entries()].sort(([one], [other]) => one - other);
  const images = same ? [...$("stage").querySelectorAll("img")] : [];
  if (!wanted.length) {
    if (!same || images.length) view(h("p", { class: "hint" }, "The first preview comes with the first steps."), "empty");
  } else if (images.length === wanted.length) wanted.forEach(([, source], at) => { images[at].src = source; });
  else view(wanted.map(([number, source]) => h("img", { src: source, alt: `Preview of picture ${number + 1}: ${job.asked.prompt}` })), "preview");
  $("stage").dataset.many = String(wanted.length > 1);
  $("actions").hidden = $("about").hidden = true;
  $("stage-progress").hidden = false;
  $("stage-bar").value = job.progress;
  setText($("stage-status"), describe(job));
}

/** Return where a job has come to, in words. */
export function describe(job) {
  if (job.state === "waiting") return job.position ? `Number ${job.position} in line` : "Being prepared";
  if (job.state === "failed") return job.error?.message ?? "It could not be drawn.";
  if (job.state === "cancelled") return "Cancelled";
  if (job.state === "done") return "Done";
  const left = job.eta_s === null ? "" : ` · ${seconds(job.eta_s)} left`;
  return job.step >= job.steps ? `Step ${job.steps} of ${job.steps} · decoding` : `Step ${job.step} of ${job.steps}${left}`;
}

export function showEntry(entry, { again = false } = {}) {
  if (shown?.entry?.key === entry.key && !again) return;
  if (url) URL.revokeObjectURL(url);
  shown = { entry };
  url = URL.createObjectURL(entry.blob);
  const [width, height] = entry.settings.size;
  const image = h("img", { src: url, alt: entry.settings.prompt || "A picture without a prompt", width, height });
  view(image, width < 256 ? "small" : "done");
  $("stage").dataset.many = "false";
  $("stage-progress").hidden = true;
  $("actions").hidden = $("about").hidden = false;
  $("download").href = url;
  $("download").download = fileName(entry);
  $("about").replaceChildren(...about(entry));
}

export function fileName(entry) {
  const words = entry.settings.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 48);
  return `${words || "picture"}-${entry.seed}.png`;
}

/** Return what a picture was drawn with, as pairs of name and text. */
export function facts(entry) {
  const { settings } = entry;
  return [
    ["Model", settings.model], ["Sampler", titled(settings.sampler)], ["Steps", settings.steps], ["Guidance", settings.guidance],
    ["Seed", entry.seed], ["Size", settings.size.join(" × ")],
    ...Object.entries(settings.further ?? {}).map(([name, value]) => [
      name[0].toUpperCase() + name.slice(1).replaceAll("_", " "), Array.isArray(value) ? value.join(", ") : value]),
  ].map(([name, value]) => [name, String(value)]);
}

function about(entry) {
  const terms = (pairs) => pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
  const times = Object.entries(entry.seconds).filter(([, value]) => value > 0)
    .map(([name, value]) => [name[0].toUpperCase() + name.slice(1), seconds(value)]);
  return [
    h("p", { class: "said" }, entry.settings.prompt),
    entry.settings.negative_prompt ? h("p", { class: "hint" }, `Not: ${entry.settings.negative_prompt}`) : "",
    h("dl", { class: "facts", "aria-label": "Settings" }, terms(facts(entry))),
    h("dl", { class: "facts times", "aria-label": "Seconds by stage" }, terms(times)),
  ];
}
