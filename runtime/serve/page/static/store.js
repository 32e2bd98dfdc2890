// The browser's own copies of pictures: in IndexedDB, or in memory where the browser gives none.

const MOST = 300, THUMB = 256;
const fallback = new Map();
let opened = null;

function open() {
  opened ??= new Promise((resolve) => {
    try {
      const asked = indexedDB.open("latentrt", 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore("pictures", { keyPath: "key" }).createIndex("created", "created");
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = asked.onblocked = () => resolve(null);
    } catch { resolve(null); }
  });
  return opened;
}

async function run(mode, act) {
  const base = await open();
  if (!base) return undefined;
  return new Promise((resolve, reject) => {
    const task = base.transaction("pictures", mode);
    const asked = act(task.objectStore("pictures"));
    task.oncomplete = () => resolve(asked?.result);
    task.onerror = task.onabort = () => reject(task.error);
  });
}

/** Return all pictures, the newest first. */
export async function all() {
  const found = (await run("readonly", (store) => store.getAll())) ?? [...fallback.values()];
  return found.sort((one, other) => other.created - one.created || other.picture - one.picture);
}

/** Keep a picture; the oldest make room. A browser that has none keeps it until the page is left. */
export async function add(entry) {
  if (!(await open())) { fallback.set(entry.key, entry); return; }
  try {
    await run("readwrite", (store) => store.put(entry));
  } catch {
    const oldest = (await all()).slice(-20);
    for (const { key } of oldest) await remove(key);
    await run("readwrite", (store) => store.put(entry)).catch(() => fallback.set(entry.key, entry));
  }
  for (const { key } of (await all()).slice(MOST)) await remove(key);
}

export async function remove(key) {
  fallback.delete(key);
  await run("readwrite", (store) => store.delete(key));
}

/** Return a small copy of a picture. */
export async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, THUMB / Math.max(bitmap.width, bitmap.height));
  if (scale === 1) return blob;
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/webp", quality: 0.85 });
}
