// The mask's editor: strokes, rectangles and whole parts, each of which can be undone.

import { $, h, setText } from "./dom.js";

const REGIONS = [
  ["Whole", 0, 0, 1, 1], ["Left half", 0, 0, 0.5, 1], ["Right half", 0.5, 0, 0.5, 1],
  ["Top half", 0, 0, 1, 0.5], ["Bottom half", 0, 0.5, 1, 0.5], ["Middle", 0.25, 0.25, 0.5, 0.5],
];
const PAINT = "#e0218a";  // seen on any picture; the file that is sent has white in its place
let acts = [], stroke = null, size = { width: 1, height: 1 };
const canvas = $("mask-canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });

export function forget() { acts = []; }

/** Have an image's mask painted. Gives a PNG, white where it is drawn anew; null for no mask; undefined for no change. */
export function edit(image) {
  const before = [...acts];
  size = { width: image.width, height: image.height };
  Object.assign(canvas, size);
  $("mask-image").src = image.url;
  for (const [id, most] of [["rect-x", size.width], ["rect-y", size.height], ["rect-w", size.width], ["rect-h", size.height]]) $(id).max = most;
  $("rect-w").value = Math.round(size.width / 2);
  $("rect-h").value = Math.round(size.height / 2);
  const dialog = $("mask-dialog");
  dialog.returnValue = "";
  dialog.showModal();
  redraw();
  return new Promise((resolve) => {
    dialog.addEventListener("close", async () => {
      if (dialog.returnValue === "") { acts = before; resolve(undefined); return; }
      if (dialog.returnValue === "none") acts = [];
      resolve(acts.length && share() > 0 ? await file() : null);
    }, { once: true });
  });
}

function act(one) { acts.push(one); redraw(); }

function redraw() {
  context.clearRect(0, 0, size.width, size.height);
  for (const one of acts) paint(one);
  if (stroke) paint(stroke);
  const percent = Math.round(100 * share());
  setText($("mask-share"), `${percent} % of the image is painted.`);
  $("undo").disabled = !acts.length;
}

function paint(one) {
  context.save();
  context.fillStyle = context.strokeStyle = PAINT;
  context.globalCompositeOperation = one.invert ? "xor" : one.erase ? "destination-out" : "source-over";
  if (one.points) {
    Object.assign(context, { lineCap: "round", lineJoin: "round", lineWidth: one.width });
    context.beginPath();
    context.moveTo(...one.points[0]);
    for (const point of one.points) context.lineTo(...point);
    context.stroke();
  } else context.fillRect(...(one.rect ?? [0, 0, size.width, size.height]));
  context.restore();
}

/** Return the painted share of the image, 0 to 1. */
function share() {
  const { data } = context.getImageData(0, 0, size.width, size.height);
  let count = 0;
  for (let at = 3; at < data.length; at += 4) count += data[at] > 127;
  return count / (size.width * size.height);
}

async function file() {
  const made = new OffscreenCanvas(size.width, size.height), brush = made.getContext("2d");
  brush.drawImage(canvas, 0, 0);
  for (const [way, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
    brush.globalCompositeOperation = way;
    brush.fillStyle = colour;
    brush.fillRect(0, 0, size.width, size.height);
  }
  return made.convertToBlob({ type: "image/png" });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * size.width, (event.clientY - box.top) / box.height * size.height];
}

const erasing = () => $("erase").getAttribute("aria-pressed") === "true";
const number = (id) => Number($(id).value) || 0;

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  const width = Math.max(1, Number($("brush").value) / 100 * Math.max(size.width, size.height));
  stroke = { points: [place(event)], width, erase: erasing() };
  redraw();
});
canvas.addEventListener("pointermove", (event) => {
  if (!stroke) return;
  stroke.points.push(place(event));
  paint(stroke);
});
const end = () => { if (stroke) { const done = stroke; stroke = null; act(done); } };
canvas.addEventListener("pointerup", end);
canvas.addEventListener("pointercancel", end);

const undo = () => { acts.pop(); redraw(); };
$("undo").addEventListener("click", undo);
$("mask-dialog").addEventListener("keydown", (event) => {
  if (event.key === "z" && (event.ctrlKey || event.metaKey) && event.target.type !== "number") { event.preventDefault(); undo(); }
});
$("erase").addEventListener("click", () => $("erase").setAttribute("aria-pressed", String(!erasing())));
$("invert").addEventListener("click", () => act({ invert: true }));
$("mask-none").addEventListener("click", () => act({ erase: true }));
$("brush").addEventListener("input", () => setText($("brush-value"), `${$("brush").value} %`));
$("rect-add").addEventListener("click", () => act({ erase: erasing(), rect: ["rect-x", "rect-y", "rect-w", "rect-h"].map(number) }));
$("regions").append(...REGIONS.map(([name, x, y, width, height]) => h("button", {
  type: "button",
  click: () => act({ erase: erasing(), rect: [x * size.width, y * size.height, width * size.width, height * size.height] }),
}, name)));
$("mask-done").addEventListener("click", () => $("mask-dialog").close("mask"));
$("mask-drop").addEventListener("click", () => $("mask-dialog").close("none"));
