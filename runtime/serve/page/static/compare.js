// Two pictures over one another, divided by a slider, and what differs in their settings.

import { $, h, setText } from "./dom.js";
import { facts } from "./stage.js";

let entries = [];
const urls = { a: null, b: null };

/** Compare a picture with another of the list: first with the one that follows it. */
export function open(entry, list) {
  entries = list;
  const at = entries.findIndex((one) => one.key === entry.key);
  const other = entries[at + 1] ?? entries[at - 1] ?? entry;
  for (const [side, chosen] of [["a", entry], ["b", other]]) {
    $(`compare-${side}`).replaceChildren(...entries.map((one) => h("option", { value: one.key }, `${one.settings.prompt.slice(0, 60)} · ${one.seed}`)));
    $(`compare-${side}`).value = chosen.key;
  }
  $("compare-at").value = 50;
  $("compare-dialog").showModal();
  show();
}

function show() {
  const chosen = {};
  for (const side of ["a", "b"]) {
    chosen[side] = entries.find((one) => one.key === $(`compare-${side}`).value);
    if (urls[side]) URL.revokeObjectURL(urls[side]);
    urls[side] = URL.createObjectURL(chosen[side].blob);
    $(`compare-${side}-view`).src = urls[side];
    $(`compare-${side}-view`).alt = `${side === "a" ? "Left" : "Right"}: ${chosen[side].settings.prompt}`;
  }
  $("compare-view").style.setProperty("--ratio", String(chosen.a.settings.size[0] / chosen.a.settings.size[1]));
  $("compare-table").replaceChildren(table(chosen.a, chosen.b));
  divide();
}

function divide() {
  const at = $("compare-at").value;
  $("compare-view").style.setProperty("--at", `${at}%`);
  setText($("compare-value"), `${at} %`);
}

function table(one, other) {
  const all = (entry) => new Map([["Prompt", entry.settings.prompt], ["Negative prompt", entry.settings.negative_prompt ?? ""], ...facts(entry)]);
  const left = all(one), right = all(other);
  const names = [...new Set([...left.keys(), ...right.keys()])].filter((name) => left.get(name) !== right.get(name));
  if (!names.length) return h("p", { class: "hint" }, "Both were drawn with the same settings.");
  return h("table", {}, h("caption", {}, "What differs"),
    h("thead", {}, h("tr", {}, ["Setting", "Left", "Right"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, names.map((name) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, left.get(name) ?? "–"), h("td", {}, right.get(name) ?? "–")))));
}

$("compare-a").addEventListener("change", show);
$("compare-b").addEventListener("change", show);
$("compare-at").addEventListener("input", divide);
$("compare-close").addEventListener("click", () => $("compare-dialog").close());
