// Small helpers for the document, and what screen readers are told.

export const $ = (id) => document.getElementById(id);

/** Make an element: h("p", {class: "hint"}, "text", otherElement). A function is a listener. */
export function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Put children in place of those that an element has, and do nothing where they are the same. */
export function fill(element, ...children) {
  const flat = children.flat();
  if (flat.length === element.childNodes.length && flat.every((child, at) => child === element.childNodes[at])) return;
  element.replaceChildren(...flat);
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const PACE_MS = 5000;
let last = -PACE_MS, next = null, timer = 0;

/** Tell screen readers something: at most every five seconds, the newest news. */
export function announce(text) {
  next = text;
  if (timer) return;
  timer = setTimeout(() => {
    timer = 0;
    last = performance.now();
    $("live").textContent = next;
  }, Math.max(0, last + PACE_MS - performance.now()));
}

export function seconds(value) {
  if (value === null || value === undefined) return "";
  if (value >= 90) return `${Math.round(value / 60)} min`;
  return value >= 10 ? `${Math.round(value)} s` : value >= 1 ? `${value.toFixed(1)} s` : `${Math.round(value * 1000)} ms`;
}

$("ask-no").addEventListener("click", () => $("ask-dialog").close("no"));

/** Ask for a yes, or for a key. Gives null for no. */
export function ask({ title, text, yes, key = false }) {
  const dialog = $("ask-dialog");
  setText($("ask-title"), title);
  setText($("ask-text"), text);
  setText($("ask-yes"), yes);
  $("ask-field").hidden = !key;
  $("ask-input").value = "";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes" ? $("ask-input").value.trim() || (key ? null : true) : null);
    }, { once: true });
  });
}

/** Give a listener the files that are dropped on an element. */
export function onDrop(element, take, over = () => {}) {
  let depth = 0;
  const holds = (event) => [...event.dataTransfer.types].includes("Files");
  element.addEventListener("dragenter", (event) => { if (holds(event)) { depth += 1; over(true); event.preventDefault(); } });
  element.addEventListener("dragover", (event) => { if (holds(event)) event.preventDefault(); });
  element.addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) over(false); });
  element.addEventListener("drop", (event) => {
    depth = 0;
    over(false);
    const file = [...event.dataTransfer.files].find((one) => one.type.startsWith("image/"));
    if (!file || event.defaultPrevented) return;
    event.preventDefault();
    take(file);
  });
}
