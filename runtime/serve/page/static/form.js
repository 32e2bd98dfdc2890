// What is asked for: the fields, as a request has them and as a picture's settings had them.

import { $, h, setText } from "./dom.js";
import * as image from "./image.js";

const KEPT = "latentrt.form";
const RATIOS = [["1:1", 1], ["4:3", 4 / 3], ["3:4", 3 / 4], ["16:9", 16 / 9], ["9:16", 9 / 16]];
const SEEDS = 2 ** 32;
const PLAIN = ["prompt", "negative", "count", "model", "sampler", "steps", "guidance", "width", "height", "seed"];
let known = null, shownSeed = () => null;

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS;

/** Fill in what there is to choose; the first time also what the fields held when the page was left. */
export function offer(choices) {
  const first = known === null;
  known = choices;
  const chosen = $("model").value, left = first ? remembered() : null;
  $("model").replaceChildren(...choices.models.map((one) => h("option", { value: one.name }, one.name)));
  $("steps").max = choices.limits.steps;
  $("count").max = choices.limits.pictures;
  if (first) offerLoras(choices.loras);
  else if (choices.models.some((one) => one.name === chosen)) $("model").value = chosen;
  offerSamplers();
  if (first) { ownDefaults(); recall(left); }
  changed();
}

const model = () => known?.models.find((one) => one.name === $("model").value) ?? known?.models[0] ?? null;

function offerSamplers() {
  const own = model()?.sampler, chosen = $("sampler").value, works = new Set(model()?.samplers);
  const offered = known.samplers.filter((one) => works.has(one.name));
  const groups = [["", (title) => !title.endsWith("Karras")], ["Karras", (title) => title.endsWith("Karras")]];
  $("sampler").replaceChildren(
    h("option", { value: "" }, own ? `The model's own (${own})` : "The model's own"),
    ...groups.map(([label, belongs]) => h("optgroup", { label: label ? "Karras spacing" : "Samplers" },
      offered.filter((one) => belongs(one.title)).map((one) => h("option", { value: one.name }, one.title)))),
  );
  $("sampler").value = works.has(chosen) ? chosen : "";
}

function offerLoras(names) {
  $("loras-part").hidden = !names.length;
  $("loras").replaceChildren(...names.map((name, at) => h("li", {},
    h("label", {}, h("input", { type: "checkbox", value: name, id: `lora-${at}`, change: changed }), h("span", {}, name)),
    h("input", { type: "number", step: "0.05", min: "-10", max: "10", value: "1", "aria-label": `Strength of ${name}`, change: changed }),
  )));
}

const loraRows = () => [...$("loras").children].map((row) => {
  const [box, scale] = row.querySelectorAll("input");
  return { box, scale };
});
const loras = () => loraRows().filter(({ box }) => box.checked).map(({ box, scale }) => ({ name: box.value, scale: Number(scale.value || 1) }));

function ownDefaults() {
  const found = model();
  if (!found) return;
  Object.assign($("guidance"), { value: found.guidance });
  Object.assign($("strength"), { value: found.strength });
  setSize(...found.size);
}

export function setSize(width, height) {
  $("width").value = width;
  $("height").value = height;
  changed();
}

/** Return a size of the model's own area with a ratio of width to height. */
export function sizeOf(ratio) {
  const found = model(), area = found ? found.size[0] * found.size[1] : 512 * 512;
  const multiple = Math.max(found?.multiple ?? 8, area >= 512 * 512 ? 64 : 8);
  const side = (length) => Math.max(multiple, Math.round(length / multiple) * multiple);
  return [side(Math.sqrt(area * ratio)), side(Math.sqrt(area / ratio))];
}

function presets() {
  const now = `${$("width").value}x${$("height").value}`;
  $("presets").replaceChildren(...RATIOS.map(([name, ratio]) => {
    const [width, height] = sizeOf(ratio);
    return h("button", {
      type: "button", "aria-pressed": String(now === `${width}x${height}`), title: `${width} × ${height}`, "data-ratio": name,
      click: () => { setSize(width, height); $("presets").querySelector(`[data-ratio="${name}"]`).focus(); },
    }, name);
  }));
}

function changed() {
  if (!known) return;
  const multiple = model()?.multiple ?? 8;
  for (const side of ["width", "height"]) Object.assign($(side), { step: multiple, min: multiple });
  presets();
  $("image-part").hidden = !(model()?.image ?? true);
  const count = loras().length;
  setText($("loras-count"), count ? String(count) : "");
  setText($("strength-value"), Number($("strength").value).toFixed(2));
  remember();
}

function remember() {
  const now = Object.fromEntries(PLAIN.map((id) => [id, $(id).value]));
  Object.assign(now, { lock: locked(), strength: $("strength").value, loras: loras() });
  try { localStorage.setItem(KEPT, JSON.stringify(now)); } catch { /* then they are not kept */ }
}

function remembered() {
  try { return JSON.parse(localStorage.getItem(KEPT)); } catch { return null; }
}

function recall(found) {
  if (!found) return;
  for (const id of PLAIN) {
    const element = $(id), value = found[id];
    const there = element.tagName !== "SELECT" || [...element.options].some((option) => option.value === value);
    if (value !== undefined && there) element.value = value;
  }
  if (found.strength) $("strength").value = found.strength;
  setLock(Boolean(found.lock));
  setLoras((found.loras ?? []).map((one) => [one.name, one.scale]));
}

function setLoras(pairs) {
  const wanted = new Map(pairs.map(([name, scale]) => [name.replace(/\.safetensors$/, ""), scale]));
  for (const { box, scale } of loraRows()) {
    box.checked = wanted.has(box.value);
    if (box.checked) scale.value = wanted.get(box.value);
  }
}

const locked = () => $("lock").getAttribute("aria-pressed") === "true";
function setLock(on) { $("lock").setAttribute("aria-pressed", String(on)); }

export function setSeed(seed) {
  $("seed").value = seed;
  setLock(true);
  changed();
}

/** Return what is asked for, as the service takes it: JSON, or a form where there is an image. */
export async function body() {
  if (!locked() || !/^\d+$/.test($("seed").value)) $("seed").value = randomSeed();
  $("seed").value = $("seed").value.replace(/^0+(?=\d)/, "");
  changed();
  const asked = {
    model: $("model").value, prompt: $("prompt").value, n: whole("count"), size: `${whole("width")}x${whole("height")}`,
    steps: whole("steps"), seed: $("seed").value,
  };
  if ($("guidance").value) asked.guidance = Number($("guidance").value);
  if ($("negative").value) asked.negative_prompt = $("negative").value;
  if ($("sampler").value) asked.sampler = $("sampler").value;
  const chosen = loras();
  const files = image.files();
  if (!files) return chosen.length ? { ...asked, loras: chosen } : asked;
  const form = new FormData();
  asked.strength = Number($("strength").value);
  for (const [name, value] of Object.entries(asked)) form.append(name, value);
  for (const { name, scale } of chosen) { form.append("loras[][name]", name); form.append("loras[][scale]", scale); }
  form.append("image", await files.image, "image.png");
  if (files.mask) form.append("mask", await files.mask, "mask.png");
  return form;
}

const whole = (id) => Math.trunc(Number($(id).value));

/** Take the settings of a picture, as a result or a file's text has them; what one does not say stays as it is. */
export function restore(settings, seed) {
  const take = (id, value) => { if (value !== null && value !== undefined) $(id).value = value; };
  take("prompt", settings.prompt);
  $("negative").value = settings.negative_prompt ?? "";
  take("steps", settings.steps);
  take("guidance", settings.guidance);
  if (settings.model && known.models.some((one) => one.name === settings.model)) { $("model").value = settings.model; offerSamplers(); }
  const own = settings.sampler?.startsWith("own:") ? "" : settings.sampler;
  if (own !== null && own !== undefined && [...$("sampler").options].some((option) => option.value === own)) $("sampler").value = own;
  if (settings.size) setSize(...settings.size);
  take("strength", settings.strength ?? settings.further?.strength);
  const further = (settings.further?.loras ?? []).map((text) => [text.slice(0, text.lastIndexOf(":")), Number(text.slice(text.lastIndexOf(":") + 1))]);
  setLoras(settings.loras?.length ? settings.loras : further);
  if (seed !== null && seed !== undefined) setSeed(seed);
  changed();
}

/** Say what was refused, at its field. */
export function refuse(error) {
  const field = { negative_prompt: "negative", n: "count", size: "width", image: "image-choose", loras: "loras" }[error?.param] ?? error?.param;
  for (const element of $("form").querySelectorAll("[aria-invalid]")) {
    element.removeAttribute("aria-invalid");
    element.removeAttribute("aria-errormessage");
  }
  $("refusal").hidden = !error;
  setText($("refusal"), error ? error.message : "");
  const at = field && $(field);
  if (at && $("form").contains(at)) {
    at.setAttribute("aria-invalid", "true");
    at.setAttribute("aria-errormessage", "refusal");
  }
}

/** Have the fields work. draw: is called when a picture is asked for; seedShown: gives the seed of the picture shown */
export function begin({ draw, seedShown }) {
  shownSeed = seedShown;
  $("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    draw();
  });
  $("form").addEventListener("input", changed);
  $("model").addEventListener("change", () => { offerSamplers(); ownDefaults(); });
  $("seed").addEventListener("input", () => setLock($("seed").value !== ""));
  $("swap").addEventListener("click", () => setSize($("height").value, $("width").value));
  $("lock").addEventListener("click", () => { setLock(!locked()); changed(); });
  $("dice").addEventListener("click", () => setSeed(randomSeed()));
  $("reuse-seed").addEventListener("click", () => { const seed = shownSeed(); if (seed !== null) setSeed(seed); });
}
