import { Failure, answer, key, models } from "./chat.js";
import * as code from "./code.js";
import { fromFile, fromSample } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const touch = matchMedia("(pointer: coarse)").matches;
const QUESTION = "Describe the picture.";
const CHOSEN = "mllama-settings";

// A turn: {role, text, pictures, node}, and of an answer {figures, wrong, request}.
const turns = [];
let tray = []; // pictures of the next message
let editing = null; // the turn that it replaces
let running = null; // the AbortController of the answer that comes

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, onClick, className = "quiet") {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

function image(picture, text) {
  const made = element("img");
  made.src = picture.url;
  made.alt = text;
  return made;
}

// Settings, kept for the tab

const settings = { temperature: null, length: null, system: "", model: null };

function readSettings() {
  const temperature = Number($("temperature").value);
  settings.temperature = temperature < 0 ? null : temperature;
  settings.length = $("length").valueAsNumber > 0 ? Math.floor($("length").valueAsNumber) : null;
  settings.system = $("system").value.trim();
  settings.model = $("model-name").value || settings.model;
  const shown = String(settings.temperature ?? "the model’s own");
  $("temperature-shown").textContent = shown;
  $("temperature").setAttribute("aria-valuetext", shown);
  sessionStorage.setItem(CHOSEN, JSON.stringify(settings));
}

function showSettings() {
  Object.assign(settings, JSON.parse(sessionStorage.getItem(CHOSEN) || "{}"));
  $("temperature").value = settings.temperature ?? -0.05;
  $("length").value = settings.length ?? "";
  $("system").value = settings.system;
  readSettings();
}

// The request of the turns up to one, with pictures that `code` can name

function requestBody(upTo) {
  const messages = turns.slice(0, upTo).filter((turn) => turn.role === "user" || turn.text).map((turn) => {
    if (!turn.pictures.length) return { role: turn.role, content: turn.text };
    const parts = turn.pictures.map((picture) => ({ picture }));
    return { role: turn.role, content: turn.text ? [...parts, { type: "text", text: turn.text }] : parts };
  });
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const body = settings.model ? { model: settings.model, messages } : { messages };
  if (settings.temperature !== null) body.temperature = settings.temperature;
  if (settings.length !== null) body.max_tokens = settings.length;
  return body;
}

function withAddresses(body) {
  return JSON.parse(JSON.stringify(body, (name, value) =>
    value?.picture ? { type: "image_url", image_url: { url: value.picture.url } } : value));
}

// Turns on the page

function show(turn) {
  const item = element("li", `turn ${turn.role}`);
  const words = turn.role === "user" ? "You said" : "Answer";
  item.append(element("h3", "unseen", words));
  if (turn.pictures.length) {
    const pictures = element("div", "pictures");
    pictures.append(...turn.pictures.map((picture) => image(picture, `Picture: ${picture.name}`)));
    for (const one of pictures.children) one.addEventListener("load", () => running && toEnd());
    item.append(pictures);
  }
  turn.textNode = element("div", "text", turn.text);
  turn.textNode.hidden = turn.role === "user" && !turn.text;
  turn.foot = element("div", "foot");
  item.append(turn.textNode, turn.foot);
  turn.node = item;
  $("turns").append(item);
  if (turn.role === "user") {
    const actions = element("span", "actions");
    actions.append(button("Edit", () => edit(turn)));
    turn.foot.append(actions);
  }
}

function finish(turn) {
  turn.node.classList.remove("busy");
  turn.foot.replaceChildren();
  if (turn.figures) turn.foot.append(element("span", "figures", turn.figures));
  const actions = element("span", "actions");
  if (turn.wrong) {
    const wrong = element("div", "wrong");
    wrong.append(element("span", "", turn.wrong), button("Try again", () => again(turn), ""));
    turn.node.insertBefore(wrong, turn.foot);
    turn.textNode.hidden = !turn.text;
  } else {
    actions.append(button("Again", () => again(turn)), button("Copy", (event) => copy(event, turn.text)));
  }
  for (const [name, written] of [["curl", code.curl], ["Python", code.python]]) {
    const made = button(name, (event) => copy(event, written(turn.request, Boolean(key.get()))));
    made.setAttribute("aria-label", `Copy as ${name}`);
    made.title = `Copy the request as ${name}`;
    actions.append(made);
  }
  turn.foot.append(actions);
}

async function copy(event, text) {
  const target = event.currentTarget, old = target.textContent;
  try {
    await navigator.clipboard.writeText(text);
    target.textContent = "Copied";
  } catch {
    target.textContent = "The browser does not allow it";
  }
  say(target.textContent);
  setTimeout(() => { target.textContent = old; }, 1500);
}

function say(text) {
  $("said").textContent = text;
}

function cut(from) {
  for (const turn of turns.splice(from)) turn.node.remove();
  if (!turns.includes(editing)) editing = null;
}

function atEnd() {
  return innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
}

function toEnd() {
  scrollTo({ top: document.documentElement.scrollHeight });
}

function refresh() {
  $("welcome").hidden = turns.length > 0;
  $("new").hidden = !turns.length || Boolean(running);
  $("editing").hidden = !editing;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !$("text").value.trim() && !tray.length;
  $("tray").hidden = !tray.length;
  $("text").placeholder = turns.length ? "Ask on" : "Ask about a picture";
  for (const turn of turns) if (turn.role === "user") turn.foot.classList.toggle("away", Boolean(running));
}

// Asking

async function ask() {
  const turn = { role: "assistant", text: "", pictures: [], request: requestBody(turns.length) };
  turns.push(turn);
  show(turn);
  turn.node.classList.add("busy");
  running = new AbortController();
  refresh();
  toEnd();
  const start = performance.now();
  let first = 0, last = 0, count = 0;
  const onText = (text) => {
    const follow = atEnd();
    last = performance.now();
    first ||= last;
    count += 1;
    turn.text += text;
    turn.textNode.append(text);
    if (follow) toEnd();
  };
  let found = null, needsKey = false;
  try {
    found = await answer(withAddresses(turn.request), running.signal, onText);
    say("Answer: " + turn.text);
  } catch (error) {
    if (error.name === "AbortError") {
      turn.stopped = true;
      say("Stopped");
    } else {
      turn.wrong = sentence(error instanceof Failure ? error.message : "the answer cannot be read");
      needsKey = error.status === 401;
      say(turn.wrong);
    }
  }
  turn.figures = figures(turn, found, first && first - start, last - first, count);
  const follow = atEnd() || turn.wrong;
  running = null;
  finish(turn);
  refresh();
  if (follow) toEnd();
  if (needsKey) askForKey(turn);
  else if (!touch) $("text").focus();
}

function figures(turn, found, first, between, pieces) {
  const told = [];
  if (first) told.push(`${(first / 1000).toFixed(2)} s to the first token`);
  const tokens = found?.usage?.completion_tokens ?? pieces;
  const about = found?.usage ? "" : "about ";
  if (tokens > 1 && between > 0) told.push(`${about}${number((tokens - 1) / (between / 1000))} tokens/s`);
  if (found?.usage) {
    const { prompt_tokens: prompt, prompt_tokens_details: details } = found.usage;
    told.push(`${details?.cached_tokens ?? 0} of ${prompt} tokens cached`);
  }
  if (turn.stopped) told.push("stopped");
  if (found?.reason === "length") told.push("cut at its length");
  return told.join(" · ");
}

const sentence = (words) => words[0].toUpperCase() + words.slice(1).replace(/([^.?!])$/, "$1.");
const number = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

function send() {
  const text = $("text").value.trim();
  if (running || (!text && !tray.length)) return;
  if (editing) cut(turns.indexOf(editing));
  const turn = { role: "user", text, pictures: tray };
  turns.push(turn);
  show(turn);
  clearComposer();
  ask();
}

function again(turn) {
  if (running) return;
  cut(turns.indexOf(turn));
  ask();
}

function edit(turn) {
  if (running) return;
  editing = turn;
  $("text").value = turn.text;
  tray = [...turn.pictures];
  showTray();
  grow();
  $("text").focus();
}

function clearComposer() {
  editing = null;
  tray = [];
  $("text").value = "";
  trouble("");
  showTray();
  grow();
}

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

// Pictures of the next message

function showTray() {
  $("tray").replaceChildren(...tray.map((picture, i) => {
    const item = element("li");
    const remove = button("×", () => {
      tray.splice(i, 1);
      showTray();
      $("text").focus();
    }, "");
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    item.append(image(picture, picture.name), remove);
    return item;
  }));
  refresh();
}

async function add(reading) {
  trouble("");
  for (const one of reading) {
    try {
      const picture = await one();
      tray.push(picture);
    } catch (error) {
      trouble(error.message);
    }
  }
  showTray();
  if (tray.length && !$("text").value && !turns.length) {
    $("text").value = QUESTION;
    $("text").select();
    refresh();
  }
  if (!touch) $("text").focus();
}

const addFiles = (files) => add([...files].map((file) => () => fromFile(file)));

function showSamples() {
  $("samples").replaceChildren(...[1, 2, 3, 4].map((i) => {
    const address = `static/samples/${i}.png`;
    const item = element("li");
    const made = button("", () => add([() => fromSample(address)]), "");
    made.append(image({ url: address }, ""), `Sample ${i}`);
    item.append(made);
    return item;
  }));
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
  refresh();
}

// The key

const UNKNOWN_KEY = "The server does not know this key.";

function showKeyTrouble(text) {
  $("key-trouble").textContent = text;
  $("key-trouble").hidden = !text;
  $("key").select();
}

function askForKey(turn) {
  showKeyTrouble(key.get() ? UNKNOWN_KEY : "");
  $("key").value = "";
  $("key-form").onsubmit = async (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    if (!(await connect(true))) return;
    $("key-dialog").close();
    if (turn) again(turn);
  };
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

// Asks for the models, and for a key where there has to be one. Gives whether they are known.
async function connect(hasDialog = false) {
  try {
    const names = await models();
    if (!names.includes(settings.model)) settings.model = names[0];
    $("model-name").replaceChildren(...names.map((name) => new Option(name, name, false, name === settings.model)));
    $("model-choice").hidden = names.length < 2;
    $("model").textContent = settings.model;
    $("forget-key").hidden = !key.get();
    return true;
  } catch (error) {
    $("model").textContent = error.status === 401 ? "a key is needed" : error.message;
    if (hasDialog) showKeyTrouble(error.status === 401 ? UNKNOWN_KEY : error.message);
    else if (error.status === 401) askForKey(null);
    if (error.status === 401) key.forget();
    return false;
  }
}

// Events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
    event.preventDefault();
    send();
  }
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) running.abort();
  else if (editing) clearComposer();
});
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  addFiles(files);
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const over = name === "dragenter" || name === "dragover";
    if (over || name === "drop" || !event.relatedTarget) document.body.classList.toggle("dragging", over);
    if (name === "drop") addFiles(event.dataTransfer.files);
  });
}
for (const [opener, input] of [["choose", "files"], ["photo", "camera"]]) {
  $(opener).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", async () => {
    await addFiles($(input).files);
    $(input).value = "";
  });
}
$("stop").addEventListener("click", () => running?.abort());
$("cancel-edit").addEventListener("click", clearComposer);
$("new").addEventListener("click", () => {
  cut(0);
  clearComposer();
  $("text").focus();
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("input", readSettings);
$("settings").addEventListener("close", () => {
  readSettings();
  if (settings.model) $("model").textContent = settings.model;
});
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close();
});
$("forget-key").addEventListener("click", () => {
  key.forget();
  $("settings").close();
  connect();
});
$("key-later").addEventListener("click", () => $("key-dialog").close());

showSettings();
showSamples();
refresh();
connect();
