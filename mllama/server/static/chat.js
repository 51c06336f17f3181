// A request to the server, and its answer as it comes.

export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const KEY = "mllama-key";
export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export async function models() {
  const response = await asked("v1/models", {});
  return (await response.json()).data.map((model) => model.id);
}

// Calls onText with each piece of text; gives {reason, usage}.
export async function answer(body, signal, onText) {
  const response = await asked("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const found = { reason: null, usage: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return found;
    const event = JSON.parse(data);
    if (event.error) throw new Failure(event.error.message);
    found.usage = event.usage || found.usage;
    for (const choice of event.choices) {
      if (choice.delta.content) onText(choice.delta.content);
      found.reason = choice.finish_reason || found.reason;
    }
  }
  throw new Failure("The connection ended before the answer did.");
}

async function asked(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    throw new Failure(key.get() ? "The server does not know this key." : "This server asks for a key.", 401);
  }
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not an answer of this server's */ }
  throw new Failure(message, response.status);
}

// The data of server-sent events; comments are left out. Who reads no further ends the request.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The connection broke before the answer ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
