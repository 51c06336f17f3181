// Files to pictures: {url, kind, name, sample}. The url is what is sent; kind, name and sample say where it is from.

const LARGEST_FILE = 3e6; // bytes that are sent as they are
const LONGEST_SIDE = 2240; // pixels of one that is drawn anew; the model looks at fewer

export async function fromFile(file) {
  const name = file.name || "picture";
  if (!/^image\/[\w.+-]+$/.test(file.type)) throw new Error(`${name} is not a picture.`);
  return { url: await sent(file), kind: file.type, name };
}

export async function fromSample(address, name) {
  let response = null;
  try {
    response = await fetch(address);
  } catch { /* told below */ }
  if (!response?.ok) throw new Error("The server does not give the sample. Is it still running?");
  const file = await response.blob();
  return { url: await dataUrl(file), kind: file.type, name, sample: new URL(address, location).href };
}

async function sent(file) {
  if (file.size <= LARGEST_FILE) return dataUrl(file);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return dataUrl(file); // the server may know its format
  }
  const factor = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * factor));
  canvas.height = Math.max(1, Math.round(bitmap.height * factor));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.92);
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture cannot be read."));
    reader.readAsDataURL(blob);
  });
}
