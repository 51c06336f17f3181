// A request as something to run elsewhere. Pictures are read from files of their names, samples from the server.

const address = () => new URL("v1", location).href;
// A file that is called otherwise is not found; no name may end the text it stands in.
const named = (picture) => picture.name.replace(/\p{Cc}/gu, "_");
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// JSON with a mark in the place of each picture's address, what finds the marks, and the pictures.
function marked(body) {
  const word = `picture-${Math.random().toString(36).slice(2)}-`;
  const pictures = [];
  const text = JSON.stringify(body, (name, value) => {
    if (!value?.picture) return value;
    pictures.push(value.picture);
    return { type: "image_url", image_url: { url: `${word}${pictures.length - 1}.` } };
  }, 2);
  return { text, pictures, mark: `${word}(\\d+)\\.` };
}

export function curl(body, hasKey) {
  const { text, pictures, mark } = marked(body);
  const escaped = text.replace(/[\\$`]/g, "\\$&").replace(new RegExp(mark, "g"), (_, i) => {
    const picture = pictures[i];
    const source = picture.sample ? `curl -s ${quoted(picture.sample)} | base64` : `base64 < ${quoted(named(picture))}`;
    return `data:${picture.kind};base64,$(${source} | tr -d '\\n')`;
  });
  const auth = hasKey ? '  -H "Authorization: Bearer $MLLAMA_API_KEY" \\\n' : "";
  return `curl ${quoted(`${address()}/chat/completions`)} \\\n  -H "Content-Type: application/json" \\\n${auth}` +
    `  --data-binary @- <<JSON\n${escaped}\nJSON\n`;
}

export function python(body, hasKey) {
  const { pictures } = marked(body);
  const lines = hasKey ? ["import os"] : [];
  if (pictures.length) {
    lines.push("from base64 import b64encode");
    if (pictures.some((picture) => !picture.sample)) lines.push("from pathlib import Path");
    if (pictures.some((picture) => picture.sample)) lines.push("from urllib.request import urlopen");
  }
  if (lines.length) lines.push("");
  lines.push("from openai import OpenAI", "");
  const key = hasKey ? 'os.environ["MLLAMA_API_KEY"]' : '"none"';
  lines.push(`client = OpenAI(base_url="${address()}", api_key=${key})`);
  pictures.forEach((picture, i) => {
    const bytes = picture.sample
      ? `urlopen(${JSON.stringify(picture.sample)}).read()`
      : `Path(${JSON.stringify(named(picture))}).read_bytes()`;
    lines.push(`picture_${i} = "data:${picture.kind};base64," + b64encode(${bytes}).decode()`);
  });
  lines.push("", "answer = client.chat.completions.create(");
  for (const [name, value] of Object.entries(body)) {
    // JSON is Python where it has neither true, false nor null, and a request of this page has none.
    const { text, mark } = marked(value);
    const written = text.replace(new RegExp(`"${mark}"`, "g"), "picture_$1");
    lines.push(`    ${name}=${written.replaceAll("\n", "\n    ")},`);
  }
  lines.push(")", "print(answer.choices[0].message.content)", "");
  return lines.join("\n");
}
