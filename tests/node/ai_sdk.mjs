// The AI SDK of Vercel with its provider for compatible servers, asked about a picture.
// Arguments: the server's address, the model's name. What it got is printed as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "mllama",
  baseURL: `${url}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(name);
const image = new Uint8Array(await (await fetch(`${url}/static/samples/1.png`)).arrayBuffer());
const content = [{ type: "image", image, mediaType: "image/png" }, { type: "text", text: "Describe the picture." }];
const asked = { model, messages: [{ role: "user", content }], temperature: 0, maxRetries: 0 };
const found = {};

const whole = await generateText(asked);
found.whole = { text: whole.text, reason: whole.finishReason, usage: whole.usage };

const stream = streamText(asked);
found.text = "";
for await (const delta of stream.textStream) found.text += delta;
found.usage = await stream.usage;

const schema = z.object({ kind: z.enum(["circle", "square"]), large: z.boolean() });
found.output = (await generateText({ ...asked, output: Output.object({ schema }) })).output;

const look = tool({ description: "Look at a place.", inputSchema: z.object({ place: z.enum(["left", "right"]) }) });
const calling = { ...asked, tools: { look }, toolChoice: { type: "tool", toolName: "look" } };
const call = (await generateText(calling)).toolCalls[0];
found.call = { name: call.toolName, input: call.input };
for await (const part of streamText(calling).fullStream)
  if (part.type === "tool-call") found.streamedCall = { name: part.toolName, input: part.input };

try {
  await generateText({ ...asked, topP: 2 });
} catch (error) {
  found.error = { name: error.name, status: error.statusCode, message: error.message };
}

const abort = new AbortController();
const endless = { ...asked, providerOptions: { mllama: { ignore_eos: true } }, abortSignal: abort.signal };
found.parts = [];
for await (const part of streamText(endless).fullStream) {
  found.parts.push(part.type);
  if (part.type === "text-delta") abort.abort();
}

console.log(JSON.stringify(found));
