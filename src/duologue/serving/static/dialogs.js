// Dialogs: inside of an answer (narrow screens), save, settings.

import { download, soundOf, wordsOf } from "./save.js";
import * as settingsOf from "./settings.js";

const narrow = matchMedia("(width < 62rem)");
const find = (id) => document.getElementById(id);

export function openInside(open) {
  find("room").classList.toggle("closed", !open);
  find("room").classList.toggle("over", open && narrow.matches);
  find("inside-button").setAttribute("aria-expanded", String(open));
  if (narrow.matches) (open ? find("inside-close") : find("inside-button")).focus();
}

export const insideIsOver = () => find("room").classList.contains("over");
export const insideIsClosed = () => find("room").classList.contains("closed");

/** Sets up the panel's button. */
export function setUpInside() {
  find("inside-button").addEventListener("click", () => openInside(insideIsClosed()));
  find("inside-close").addEventListener("click", () => openInside(false));
}

/** @param {() => object} about returns the further arguments of `wordsOf` when saving */
export function setUpSave(conversation, recordings, about) {
  const { you, they } = recordings;
  const stem = () => `duologue-${about().began.toISOString().slice(0, 19).replaceAll(":", "")}`;
  const json = () => {
    const words = JSON.stringify(wordsOf(conversation, { ...about(), you, they }), null, 2);
    download(new Blob([`${words}\n`], { type: "application/json" }), `${stem()}.json`);
  };
  const wav = () => download(soundOf(you, they), `${stem()}.wav`);
  find("save-json").addEventListener("click", json);
  find("save-wav").addEventListener("click", wav);
  find("save-both").addEventListener("click", () => {
    json();
    wav();
  });
  find("save-button").addEventListener("click", () => {
    const some = conversation.turns.length > 0;
    const sounds = Number.isFinite(Math.min(you.start, they.start));
    find("save-words").textContent = some
      ? "Made in this page and kept on this device: what was said with its figures, and the sound, you on the left and Duologue on the right."
      : "There is nothing to save yet.";
    find("save-both").disabled = find("save-wav").disabled = !sounds;
    find("save-json").disabled = !some;
    find("save").showModal();
  });
}

const fields = () => find("settings-form").elements;

/** @param {string} name field to focus, if not the first */
export function openSettings(name = "") {
  offerDevices();
  find("settings").showModal();
  if (name) fields()[name].focus();
}

function sizeOf(parameters) {
  if (!parameters) return "";
  const [number, word] = parameters < 1e9 ? [Math.round(parameters / 1e6), "million"] : [(parameters / 1e9).toFixed(1), "billion"];
  return `, ${number < 1 ? "less than 1" : number} ${word} parameters`;
}

/** Shows the model's name and size, whether it is trained, and only the settings that it follows. */
export function showModel({ id, trained, transcribes, follows_instructions: follows, num_parameters: parameters, records }) {
  find("transcribe-row").hidden = !transcribes;
  find("instructions-row").hidden = !follows;
  const words = `Model: ${id}${sizeOf(parameters)}.`;
  find("server-words").textContent = words;
  const untrained = " It is not trained: it shows how everything works, but its answers mean nothing.";
  find("model-words").textContent = words + (trained ? "" : untrained);
  find("records-words").hidden = !records;
}

export function offerVoices(names, chosen) {
  find("voice-row").hidden = names.length < 2;
  settingsOf.offer(fields().voice, [["", "the model's own"], ...names.map((name) => [name, name])], chosen);
}

export async function offerDevices() {
  const all = (await navigator.mediaDevices?.enumerateDevices().catch(() => [])) ?? [];
  const inputs = all.filter((device) => device.kind === "audioinput" && device.deviceId);
  const options = inputs.map((device, index) => [device.deviceId, device.label || `Microphone ${index + 1}`]);
  settingsOf.offer(fields().device, [["", "the browser's choice"], ...options], fields().device.value);
}
