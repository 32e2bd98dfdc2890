// The image to start from, and its mask.

import { $, onDrop, setText } from "./dom.js";
import * as mask from "./mask.js";

const LONGEST = 2048;  // larger ones are made smaller here: no model draws them, and no service takes them
let image = null, masked = null, fit = () => {};

/** Return the image and the mask as files, null where there is no image. */
export const files = () => (image ? { image: image.blob, mask: masked } : null);

/** Take an image: a file, or a picture of the history. Raises where it cannot be read. */
export async function take(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const width = Math.round(bitmap.width * scale), height = Math.round(bitmap.height * scale);
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  if (image) URL.revokeObjectURL(image.url);
  const copy = await canvas.convertToBlob({ type: "image/png" });
  image = { blob: copy, url: URL.createObjectURL(copy), width, height };
  masked = null;
  mask.forget();
  show();
  fit(width / height);
}

export function clear() {
  if (image) URL.revokeObjectURL(image.url);
  image = masked = null;
  mask.forget();
  show();
}

function show() {
  const there = image !== null;
  $("image-view").hidden = !there;
  if (there) {
    $("image-view").src = image.url;
    $("image-view").alt = `The image to start from, ${image.width} by ${image.height} pixels`;
    $("image-part").open = true;
  } else $("image-view").removeAttribute("src");
  $("image-hint").hidden = there;
  for (const id of ["image-mask", "image-clear", "strength-part"]) $(id).hidden = !there;
  setText($("image-choose"), there ? "Another image…" : "Choose an image…");
  setText($("image-mask"), masked ? "Mask ✓" : "Mask…");
  setText($("image-count"), there ? (masked ? "with a mask" : "1") : "");
}

/** Have it work. toFit: is given a ratio of width to height when an image is taken; fail: an error */
export function begin({ toFit, fail }) {
  fit = toFit;
  const attempt = (file) => take(file).catch(() => fail(new Error("This image cannot be read: choose a PNG, JPEG or WebP.")));
  $("image-choose").addEventListener("click", () => $("image-file").click());
  $("image-file").addEventListener("change", () => {
    if ($("image-file").files[0]) attempt($("image-file").files[0]);
    $("image-file").value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) attempt(file);
  });
  $("image-clear").addEventListener("click", () => { clear(); $("image-choose").focus(); });
  $("image-mask").addEventListener("click", async () => {
    const found = await mask.edit(image);
    if (found === undefined) return;
    if (found && !masked) $("strength").value = 1;
    masked = found;
    $("strength").dispatchEvent(new Event("input", { bubbles: true }));
    show();
  });
  onDrop($("image-drop"), attempt, (over) => $("image-drop").toggleAttribute("data-over", over));
}
