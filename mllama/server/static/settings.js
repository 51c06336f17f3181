// What a request says beside the conversation. It is kept for the tab.

import { $ } from "./dom.js";

const KEPT = "mllama-settings";
const UNSET = { temperature: null, length: null, system: "" };
const SHOWN_IF_UNSET = 1; // where the slider stands then

export const settings = { ...UNSET, model: null, ...JSON.parse(sessionStorage.getItem(KEPT) || "{}") };

export function showSettings() {
  $("temperature").value = settings.temperature ?? SHOWN_IF_UNSET;
  $("length").value = settings.length ?? "";
  $("system").value = settings.system;
  if (settings.model) $("model-name").value = settings.model;
  keep();
}

// Models of the server, of which the first is taken unless one was chosen.
export function offer(names) {
  if (!names.includes(settings.model)) settings.model = names[0];
  $("model-name").replaceChildren(...names.map((name) => new Option(name)));
  $("model-choice").hidden = names.length < 2;
  $("model").textContent = settings.model;
  showSettings();
}

function keep() {
  const shown = String(settings.temperature ?? "the model’s own");
  $("temperature-shown").textContent = shown;
  $("temperature").setAttribute("aria-valuetext", shown);
  $("temperature").classList.toggle("unset", settings.temperature === null);
  sessionStorage.setItem(KEPT, JSON.stringify(settings));
}

$("settings").addEventListener("input", (event) => {
  if (event.target === $("temperature")) settings.temperature = $("temperature").valueAsNumber;
  if ($("length").validity.valid) settings.length = $("length").valueAsNumber || null;
  settings.system = $("system").value.trim();
  if (event.target === $("model-name")) $("model").textContent = settings.model = $("model-name").value;
  keep();
});
$("settings").addEventListener("close", showSettings); // what was not valid is not left standing
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close(); // beside it
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("reset").addEventListener("click", () => {
  Object.assign(settings, UNSET);
  showSettings();
});
