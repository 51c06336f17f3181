import { Failure, answer, key, models } from "./chat.js";
import * as code from "./code.js";
import { $, button, element, focus, image, tell, touch } from "./dom.js";
import { fromFile, fromSample } from "./pictures.js";
import { offer, settings, showSettings } from "./settings.js";

const QUESTION = "Describe the picture.";
const SAMPLES = 4;

// A turn: {role, text, pictures}, the nodes that show it, and of an answer {request, figures, wrong}.
const turns = [];
let tray = []; // pictures of the next message
let reading = 0; // groups of pictures that will be there soon
let editing = null; // the turn that the next message replaces
let draft = null; // what was being written when editing began: {text, tray}
let running = null; // the AbortController of the answer that comes

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
  turn.node = element("li", `turn ${turn.role}`);
  turn.node.append(element("h2", "unseen", turn.role === "user" ? "You said" : "Answer"));
  if (turn.pictures.length) {
    const pictures = element("div", "pictures");
    pictures.append(...turn.pictures.map((picture) => image(picture, `Picture: ${picture.name}`)));
    for (const one of pictures.children) one.addEventListener("load", () => running && toEnd());
    turn.node.append(pictures);
  }
  turn.words = document.createTextNode(turn.text);
  turn.box = element("div", "text");
  turn.box.append(turn.words);
  turn.box.hidden = turn.role === "user" && !turn.text;
  turn.foot = element("div", "foot");
  turn.node.append(turn.box, turn.foot);
  if (turn.role === "user") {
    const actions = element("div", "actions");
    actions.append(button("Edit", () => edit(turn)));
    turn.foot.append(actions);
  }
  $("turns").append(turn.node);
}

function finish(turn) {
  turn.node.classList.remove("busy");
  turn.node.removeAttribute("aria-busy");
  showFigures(turn, turn.figures);
  if (turn.wrong) {
    const wrong = element("div", "wrong");
    tell(wrong, turn.wrong, button("Try again", () => again(turn), "again"));
    turn.node.insertBefore(wrong, turn.foot);
    turn.box.hidden = !turn.text;
  }
  const actions = element("div", "actions");
  if (!turn.wrong) actions.append(button("Again", () => again(turn), "quiet again"));
  if (turn.text) actions.append(button("Copy", (event) => copy(event, turn.text)));
  for (const [name, written] of [["curl", code.curl], ["Python", code.python]]) {
    const made = button(name, (event) => copy(event, written(turn.request, Boolean(key.get()))));
    made.setAttribute("aria-label", `Copy as ${name}`);
    made.title = `Copy the request as ${name}`;
    actions.append(made);
  }
  turn.foot.append(actions);
}

function showFigures(turn, figures) {
  const line = element("div", "figures");
  line.append(...figures.map((words) => element("span", "", words)));
  turn.foot.replaceChildren(line);
}

async function copy(event, text) {
  const target = event.currentTarget;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // at an address that is neither https nor this machine's
    $("to-copy").value = text;
    $("by-hand").showModal();
    $("to-copy").select();
    return;
  }
  if (target.dataset.told) return;
  const old = target.textContent;
  target.dataset.told = target.textContent = "Copied";
  say("Copied");
  setTimeout(() => {
    target.textContent = old;
    delete target.dataset.told;
  }, 1500);
}

function say(text) {
  $("said").textContent = text;
}

function cut(from) {
  for (const turn of turns.splice(from)) turn.node.remove();
  if (!turns.includes(editing)) editing = draft = null;
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
  $("send").disabled = reading > 0 || (!$("text").value.trim() && !tray.length);
  $("tray").hidden = !tray.length;
  $("text").placeholder = turns.length ? "Reply" : "Ask about a picture";
  document.body.classList.toggle("running", Boolean(running));
  for (const turn of turns) turn.node.classList.toggle("edited", turn === editing);
}

// What had the keyboard may be gone or hidden by now; then it goes to what is of use next.

function isFocusLost() {
  const at = document.activeElement;
  return !at || at === document.body || Boolean(at.closest("[hidden]"));
}

function toText() {
  if (!touch) focus($("text"));
}

// Asking

async function ask() {
  const turn = { role: "assistant", text: "", pictures: [], request: requestBody(turns.length) };
  turns.push(turn);
  show(turn);
  turn.node.classList.add("busy");
  turn.node.setAttribute("aria-busy", "true");
  running = new AbortController();
  refresh();
  if (isFocusLost()) focus($("stop"));
  toEnd();
  const start = performance.now();
  let first = 0, last = 0, count = 0, found = null, needsKey = false;
  const onText = (text) => {
    const follow = atEnd();
    last = performance.now();
    if (!count) showFigures(turn, [untilFirst((first = last) - start)]);
    count += 1;
    turn.text += text;
    turn.words.appendData(text);
    if (follow) toEnd();
  };
  try {
    found = await answer(withAddresses(turn.request), running.signal, onText);
    say(`Answer: ${turn.text}`);
  } catch (error) {
    if (error.name === "AbortError") {
      turn.stopped = true;
      say("Stopped");
    } else {
      turn.wrong = sentence(error instanceof Failure ? error.message : "the answer cannot be read");
      needsKey = error.status === 401;
    }
  }
  turn.figures = figures(turn, found, first && first - start, last - first, count);
  const follow = atEnd() || turn.wrong;
  running = null;
  finish(turn);
  refresh();
  if (turn.wrong) say(turn.wrong);
  if (follow) toEnd();
  if (isFocusLost()) toText();
  if (needsKey) askForKey(turn, turn.wrong);
  else if (!settings.model) connect();
}

const untilFirst = (time) => `${(time / 1000).toFixed(2)} s to first token`;
const sentence = (words) => words[0].toUpperCase() + words.slice(1).replace(/([^.?!])$/, "$1.");
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

function figures(turn, found, first, between, pieces) {
  const told = [];
  if (first) told.push(untilFirst(first));
  const tokens = found?.usage?.completion_tokens ?? pieces;
  const about = found?.usage ? "" : "about ";
  if (tokens > 1 && between > 0) told.push(`${about}${number((tokens - 1) / (between / 1000))} tokens/s`);
  if (found?.usage) {
    const { prompt_tokens: prompt, prompt_tokens_details: details } = found.usage;
    told.push(`${number(details?.cached_tokens ?? 0)} of ${number(prompt)} tokens cached`);
  }
  if (turn.stopped) told.push("stopped");
  else if (found && !turn.text) told.push("no words");
  if (found?.reason === "length") told.push("cut at its length");
  return told;
}

function send() {
  const text = $("text").value.trim();
  if (running || reading || (!text && !tray.length)) return;
  const kept = draft;
  if (editing) cut(turns.indexOf(editing));
  const turn = { role: "user", text, pictures: tray };
  turns.push(turn);
  show(turn);
  compose(kept);
  ask();
}

function again(turn) {
  if (running) return;
  cut(turns.indexOf(turn));
  ask();
}

function edit(turn) {
  if (running) return;
  const kept = draft ?? { text: $("text").value, tray };
  compose({ text: turn.text, tray: [...turn.pictures] });
  [editing, draft] = [turn, kept];
  refresh();
  focus($("text"));
}

// The composer with other content, or none. What was being edited stays as it was.
function compose(content) {
  editing = draft = null;
  tray = content?.tray ?? [];
  $("text").value = content?.text ?? "";
  tell($("trouble"), "");
  showTray();
  grow();
}

function cancelEdit() {
  compose(draft);
  toText();
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
  refresh();
}

// Pictures of the next message

function showTray() {
  $("tray").replaceChildren(...tray.map((picture, i) => {
    const item = element("li");
    const remove = button("×", () => {
      tray.splice(i, 1);
      showTray();
      toText();
    }, "");
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    item.append(image(picture, picture.name), remove);
    return item;
  }));
  refresh();
}

async function add(made) {
  const wrong = [];
  reading += 1;
  refresh();
  for (const one of made) {
    try {
      tray.push(await one());
    } catch (error) {
      wrong.push(error.message);
    }
  }
  reading -= 1;
  tell($("trouble"), wrong.join(" "));
  showTray();
  if (tray.length && !$("text").value && !turns.length) {
    $("text").value = QUESTION;
    $("text").select();
    grow();
  }
  toText();
}

const addFiles = (files) => add([...files].map((file) => () => fromFile(file)));

function showSamples() {
  for (let i = 1; i <= SAMPLES; i++) {
    const address = `static/samples/${i}.png`, name = `Sample ${i}`;
    const item = element("li");
    const made = button("", () => add([() => fromSample(address, name)]), "");
    made.append(image({ url: address }, ""), name);
    item.append(made);
    $("samples").append(item);
  }
}

// The key

function tellOfKey(text) {
  tell($("key-trouble"), text);
  $("key").select();
}

// For the whole page, or for an answer that is then asked for again. The words are those of the refusal.
function askForKey(turn, words) {
  tellOfKey(key.get() ? words : "");
  key.forget();
  $("key").value = "";
  $("key-form").onsubmit = async (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    const error = await connect();
    if (error) {
      tellOfKey(error.message);
      return key.forget();
    }
    $("key-dialog").close();
    if (turn && turns.includes(turn)) again(turn);
  };
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

// Asks for the models, and for a key where there has to be one. Gives what went wrong.
async function connect() {
  try {
    offer(await models());
    tell($("trouble"), "");
    $("forget-key").hidden = !key.get();
    return null;
  } catch (error) {
    const isKey = error.status === 401;
    $("model").textContent = isKey ? "a key is needed" : "not connected";
    if ($("key-dialog").open) return error;
    if (isKey) askForKey(null, error.message);
    else tell($("trouble"), sentence(error.message), button("Try again", connect, ""));
    return error;
  }
}

// Events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", (event) => {
  const sends = touch ? event.ctrlKey || event.metaKey : !event.shiftKey;
  if (event.key === "Enter" && sends && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (running) running.abort();
  else if (editing) cancelEdit();
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
  $(input).addEventListener("change", () => {
    addFiles($(input).files);
    $(input).value = ""; // so that the same file can be chosen again
  });
}
$("stop").addEventListener("click", () => running?.abort());
$("cancel-edit").addEventListener("click", cancelEdit);
$("new").addEventListener("click", () => {
  cut(0);
  compose(null);
  toText();
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
