// OpenAI's client for Node, asked about a picture. Arguments: the server's address, the model's name.
// What it got is printed as JSON.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const chat = client.chat.completions;
const file = Buffer.from(await (await fetch(`${url}/static/samples/1.png`)).arrayBuffer());
const picture = { type: "image_url", image_url: { url: `data:image/png;base64,${file.toString("base64")}` } };
const content = [picture, { type: "text", text: "Describe the picture." }];
const asked = { model, messages: [{ role: "user", content }], temperature: 0 };
const found = { models: [] };

for await (const entry of client.models.list()) found.models.push(entry.id);

const { data, response } = await chat.create(asked).withResponse();
found.whole = data;
found.type = response.headers.get("content-type");

found.text = "";
for await (const chunk of await chat.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  found.text += chunk.choices[0]?.delta.content ?? "";
  found.usage = chunk.usage;
}
found.helped = await chat.stream(asked).finalContent();

const Shape = z.object({ kind: z.enum(["circle", "square"]), large: z.boolean() });
const form = zodResponseFormat(Shape, "shape");
found.parsed = (await chat.parse({ ...asked, response_format: form })).choices[0].message.parsed;

const tools = [zodFunction({ name: "look", parameters: z.object({ place: z.enum(["left", "right"]) }) })];
const calling = { ...asked, tools, tool_choice: "required", parallel_tool_calls: false };
const called = (await chat.parse(calling)).choices[0];
found.reason = called.finish_reason;
found.call = called.message.tool_calls[0].function;
found.streamedCall = (await chat.stream(calling).finalMessage()).tool_calls[0].function;

try {
  await chat.create({ ...asked, top_p: 2 });
} catch (error) {
  found.error = { kind: error.constructor.name, status: error.status, param: error.param, code: error.code };
}

const abort = new AbortController();
found.chunks = 0;
try {
  const endless = { ...asked, stream: true, ignore_eos: true };
  for await (const chunk of await chat.create(endless, { signal: abort.signal }))
    if (++found.chunks === 3) abort.abort();
} catch (error) {
  found.aborted = error.constructor.name;
}

console.log(JSON.stringify(found));
