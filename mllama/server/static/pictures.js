// Files to pictures: a data URL, and a name for people and for code that is copied.

const LARGEST_FILE = 3e6; // bytes that are sent as they are
const LONGEST_SIDE = 2240; // pixels of one that is drawn anew; the model looks at fewer

export async function fromFile(file) {
  if (!file.type.startsWith("image/")) throw new Error(`${file.name || "That"} is not a picture.`);
  if (file.size <= LARGEST_FILE) return { url: await dataUrl(file), name: file.name || "picture.png" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return { url: await dataUrl(file), name: file.name }; // the server may know its format
  }
  const factor = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * factor);
  canvas.height = Math.round(bitmap.height * factor);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { url: canvas.toDataURL("image/jpeg", 0.92), name: file.name };
}

export async function fromSample(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error("The server has no such sample.");
  return { url: await dataUrl(await response.blob()), name: "sample.png", sample: new URL(address, location).href };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture cannot be read."));
    reader.readAsDataURL(blob);
  });
}
