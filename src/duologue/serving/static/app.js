// Connects the parts of the page: connection, microphone, player, transcript. `view.js` and `inside.js` draw them.

import { acknowledge } from "./acknowledge.js";
import { Conversation } from "./conversation.js";
import * as dialogs from "./dialogs.js";
import { Inside } from "./inside.js";
import { setUpKeys } from "./keys.js";
import { Microphone } from "./microphone.js";
import { Player, RATE } from "./playback.js";
import { Connection, modelOf } from "./protocol.js";
import * as settingsOf from "./settings.js";
import { base64Of, pcmOf, Recording, SentSound } from "./sound.js";
import { Timeline } from "./timeline.js";
import { View } from "./view.js";

const KEEP_OPEN_MS = 30000; // keeps the microphone open after push-to-talk, so that the next press loses no audio
const HARMLESS = "response_cancel_not_active";
const BUSY = "conversation_already_has_active_response"; // an answer started before the page knew

const began = new Date();
const zero = performance.now();
const now = () => performance.now() - zero;
const find = (id) => document.getElementById(id);

const settings = settingsOf.load();
const view = new View();
const inside = new Inside(find("inside"));
const timeline = new Timeline(find("timeline"), { you: find("meter-you"), they: find("meter-they") });
const conversation = new Conversation(now);
const connection = new Connection();
const microphone = new Microphone();
const player = new Player();
const recordings = { you: new Recording(RATE), they: new Recording(RATE) };

const state = {
  mode: "off", // "off" | "hands-free" | "holding" | "releasing"
  speaking: false, // an answer is playing
  sending: false, // a question is being sent
  waiting: false, // resend the question when the active answer ends
  model: "",
  transcribes: true, // whether the server transcribes
};
const silenced = new Set(); // items whose remaining audio is dropped
const ended = new Map(); // item -> end of its question, ms on the page's clock
let question = null; // {endedMs, pauseMs} of the latest question
let early = []; // audio buffered while the connection opens
let closing = 0;
const sent = new SentSound(RATE);
const purposes = new Map(); // event id of an update -> its purpose

// --- Connection -------------------------------------------------------------------------------------------------------

function configure(handsFree = state.mode === "hands-free") {
  for (const { what, session } of settingsOf.updates(settings, handsFree, state.transcribes)) {
    purposes.set(connection.send({ type: "session.update", session }), what);
  }
}

function turns(handsFree) {
  const turn_detection = handsFree ? settingsOf.detection(settings) : null;
  connection.send({ type: "session.update", session: { type: "realtime", audio: { input: { turn_detection } } } });
}

connection.addEventListener("state", ({ detail }) => {
  const { state: line, words, retryS } = detail;
  if (line === "open") {
    sent.clear();
    view.line(state.model || "Connected", "open");
    view.settled();
    if (detail.resumed) view.announce("Connected again.");
    else if (detail.again) view.seam("A new conversation: the server no longer has the earlier one");
    configure();
    for (const pcm of early.splice(0)) append(pcm);
  } else {
    conversation.lost(state.sending);
    for (const turn of conversation.turns) player.end(turn.id);
    state.sending = state.waiting = false;
    purposes.clear();
  }
  if (line === "connecting") view.line("Connecting", "connecting");
  if (line === "closed") {
    view.line(state.model || "Ready", "ready");
    // Reconnect at once during speech; the session may have reached its maximum duration.
    if (state.mode === "hands-free") words ? connection.open().catch(() => {}) : quiet();
    else if (words) view.notice(`${words} The conversation goes on when you do.`, { mild: true });
  }
  if (line === "waiting") {
    view.line("Not connected", "waiting");
    const soon = Math.max(1, Math.round(retryS));
    view.notice(`${words} Trying again in ${soon} s.`, {
      action: { words: "Try now", run: () => connection.retry() },
      passing: true,
    });
  }
  if (line === "refused") {
    view.line("Refused", "refused");
    quiet();
    const wantsKey = /key/i.test(words);
    const action = wantsKey
      ? { words: "Enter a key", run: () => dialogs.openSettings("key") }
      : { words: "Try again", run: () => connection.open() };
    view.notice(words, { action });
  }
  phase();
});

connection.addEventListener("server", ({ detail: event }) => {
  if (event.type === "error") return refused(event.error);
  if (event.type === "session.created") voices([event.session.audio?.output?.voice]);
  if (event.type === "input_audio_buffer.speech_started" && settings.interrupt) hush();
  if (event.type === "input_audio_buffer.speech_stopped") stopped(event);
  conversation.take(event);
  if (event.type === "response.output_item.added") answered(event.item.id);
  if (event.type === "response.output_audio.delta") sound(event);
  if (event.type === "response.output_audio.done") player.end(event.item_id);
  if (event.type === "response.done") done(event.response);
  return phase();
});

function done({ output }) {
  for (const item of output ?? []) player.end(item.id);
  if (!state.waiting) return;
  state.waiting = false;
  ask();
}

function refused({ message, code, event_id: id, param }) {
  const what = purposes.get(id);
  if (code === HARMLESS) return done({}); // the answer ended by itself
  if (code?.startsWith("item_truncate")) return; // none of it had been played
  if (code === BUSY) {
    state.waiting = true;
    connection.send({ type: "response.cancel" });
    return;
  }
  if (what) view.notice(`The server did not take the setting “${what}”: ${message}`, { mild: true });
  else view.notice(param ? `${message} (${param})` : message);
  if (!what) state.sending = false;
  phase();
}

function answered(id) {
  state.sending = false;
  const turn = conversation.turn(id);
  if (question) {
    turn.pauseMs = question.pauseMs;
    ended.set(id, question.endedMs);
  }
  question = null;
  choose(turn);
}

function sound({ item_id: id, delta }) {
  if (silenced.has(id)) return;
  const turn = conversation.turn(id);
  const ms = player.push(id, delta);
  if (!turn) return;
  turn.audioMs += ms;
  turn.spoken = true;
}

// Returns the end of the user's turn on the page's clock. The server reports a position in the audio sent, silence included.
function stopped({ audio_end_ms: endMs }) {
  const endedMs = sent.when(endMs - settingsOf.silenceMs(settings)) ?? now();
  question = { endedMs, pauseMs: now() - endedMs };
}

// --- User audio ---------------------------------------------------------------------------------------------

function append(pcm) {
  if (connection.send({ type: "input_audio_buffer.append", audio: base64Of(pcm) })) sent.add(pcm, now());
}

microphone.addEventListener("chunk", ({ detail: { pcm, at, stream, peak, level } }) => {
  if (state.mode === "off") return;
  timeline.add("you", peak, level);
  find("talk").style.setProperty("--level", Math.min(1, Math.sqrt(level) * 1.6).toFixed(2));
  recordings.you.add(pcm, { endS: now() / 1000, at, stream });
  held += pcm.length;
  if (connection.state === "open") append(pcm);
  else if (state.mode !== "hands-free") early.push(pcm);
});

microphone.addEventListener("lost", () => {
  view.notice("The microphone was unplugged or taken away. Choose another in the settings, or type below.");
  quiet();
});

async function listen() {
  clearTimeout(closing);
  await Promise.all([
    player.start(),
    microphone.start({ deviceId: settings.device, noiseSuppression: settings.noiseSuppression }),
  ]);
  dialogs.offerDevices();
}

async function handsFree() {
  if (state.mode !== "off") return quiet();
  state.mode = "hands-free";
  view.notice("");
  view.announce("Listening.");
  phase();
  connection.open().catch(() => {});
  if (connection.state === "open") turns(true);
  try {
    await listen();
    if (state.mode !== "hands-free") microphone.stop();
  } catch (error) {
    quiet();
    view.notice(error.message);
  }
  return phase();
}

/** Ends hands-free mode and releases the microphone. */
function quiet() {
  if (state.mode === "hands-free" && connection.state === "open") {
    connection.send({ type: "input_audio_buffer.clear" });
    turns(false);
  }
  if (state.mode === "hands-free") view.announce("Stopped listening.");
  state.mode = "off";
  early = [];
  microphone.stop();
  find("talk").style.setProperty("--level", 0);
  find("hold").setAttribute("aria-pressed", "false");
  phase();
}

let press = 0; // counts presses, so that a late permission does not reopen a released one
let held = 0; // samples of this press

async function hold() {
  if (state.mode !== "off") return;
  const mine = (press += 1);
  held = 0;
  state.mode = "holding";
  view.notice("");
  find("hold").setAttribute("aria-pressed", "true");
  interrupt();
  connection.send({ type: "input_audio_buffer.clear" });
  connection.open().catch(() => {});
  phase();
  try {
    await listen();
  } catch (error) {
    if (mine === press) quiet();
    view.notice(error.message);
  }
  phase();
}

async function release() {
  if (state.mode !== "holding") return;
  state.mode = "releasing"; // the last chunk still belongs to the turn
  press += 1;
  const endedMs = now();
  find("hold").setAttribute("aria-pressed", "false");
  await microphone.flush();
  state.mode = "off";
  find("talk").style.setProperty("--level", 0);
  clearTimeout(closing);
  closing = setTimeout(() => state.mode === "off" && microphone.stop(), KEEP_OPEN_MS);
  phase();
  if (!microphone.open) microphone.stop(); // released before the browser opened it
  if (held < 0.1 * RATE) {
    early = [];
    view.notice("That was too short. Hold the button or the space bar while you speak.", { mild: true });
    return;
  }
  await connection.open().catch(() => {});
  if (connection.state !== "open") return;
  question = { endedMs, pauseMs: 0 };
  connection.send({ type: "input_audio_buffer.commit" });
  ask();
}

function ask() {
  state.sending = true;
  connection.send({ type: "response.create" });
  phase();
}

// --- Interrupting ---------------------------------------------------------------------------------------------------

/** Stops playback at once and reports the played milliseconds to the server. */
async function hush() {
  for (const turn of conversation.turns) if (turn.status === "answering") silenced.add(turn.id);
  const cut = await player.clear();
  for (const { id, playedMs } of cut) {
    silenced.add(id);
    const turn = conversation.turn(id);
    if (turn) turn.playedMs = playedMs;
    connection.send({ type: "conversation.item.truncate", item_id: id, content_index: 0, audio_end_ms: Math.floor(playedMs) });
  }
  state.speaking = false;
  phase();
}

/** Interrupts the answer manually. With turn detection, the server cancels the response by itself. */
function interrupt() {
  const answering = conversation.answering;
  if (answering?.responseId) connection.send({ type: "response.cancel", response_id: answering.responseId });
  if (answering || state.speaking) hush();
}

// --- Answer audio ---------------------------------------------------------------------------------------------

player.addEventListener("started", ({ detail: { id, latencyMs } }) => {
  state.speaking = true;
  const turn = conversation.turn(id);
  const from = ended.get(id);
  if (turn && from !== undefined) {
    turn.heardAfterMs = now() - from + latencyMs;
    conversation.changed(turn);
  }
  phase();
});

player.addEventListener("finished", ({ detail: { id, playedMs } }) => {
  state.speaking = false;
  const turn = conversation.turn(id);
  if (turn) turn.playedMs = playedMs;
  phase();
});

player.addEventListener("silent", () => view.notice("The browser finds no loudspeaker: answers come in writing."));
player.addEventListener("broken", () => view.notice("The browser stopped playing sound. Load the page again."));

player.addEventListener("gap", ({ detail: { id } }) => {
  const turn = conversation.turn(id);
  if (!turn) return;
  turn.gaps += 1;
  conversation.changed(turn);
});

player.addEventListener("heard", ({ detail: { pcm, at, stream, peak, level, waitingMs } }) => {
  if (state.speaking) timeline.add("they", peak, level);
  recordings.they.add(pcmOf(pcm), { endS: now() / 1000, at, stream });
  inside.playback({ gaps: player.gaps, gapMs: player.gapMs, jitterMs: player.jitterMs, waitingMs });
});

// --- Page -------------------------------------------------------------------------------------------------------

conversation.addEventListener("turn", ({ detail: { turn } }) => {
  if (turn.role === "user" && turn.spoken && turn.status !== "listening" && !turn.peaks) {
    turn.peaks = timeline.since("you", performance.now() - Math.max(300, now() - turn.startedMs));
  }
  view.update(turn);
  inside.update(turn);
});

conversation.addEventListener("moved", ({ detail: { turn, previous } }) => view.move(turn, previous));

function choose(turn) {
  inside.show(turn);
  view.choose(turn);
}

view.addEventListener("select", ({ detail: { turn } }) => {
  choose(turn);
  if (dialogs.insideIsClosed()) dialogs.openInside(true);
});

function phase() {
  const listening = conversation.turns.findLast((turn) => turn.status === "listening");
  const answering = Boolean(conversation.answering) || state.sending;
  const on = state.mode === "hands-free";
  let words = "Ready";
  let name = "ready";
  if (connection.state === "waiting" || connection.state === "refused") [words, name] = ["Not connected", "ready"];
  else if (state.mode === "holding") [words, name] = ["Listening while you hold", "hearing"];
  else if (on && listening) [words, name] = ["Hearing you", "hearing"];
  else if (state.speaking) [words, name] = [on && settings.interrupt ? "Speaking · talk to interrupt" : "Speaking", "speaking"];
  else if (answering) [words, name] = ["Thinking", "thinking"];
  else if (connection.state === "connecting") [words, name] = ["Connecting", "ready"];
  else if (on) [words, name] = microphone.open ? ["Listening", "listening"] : ["Opening the microphone", "ready"];
  view.status(words, name);
  find("talk").classList.toggle("on", on);
  find("talk-words").textContent = on ? "Stop" : "Talk";
  find("talk").setAttribute("aria-label", on ? "Stop listening" : "Talk hands-free");
  find("hold").setAttribute("aria-disabled", String(on));
  find("stop").hidden = !(state.speaking || answering);
}

find("talk").addEventListener("click", handsFree);
find("stop").addEventListener("click", () => {
  interrupt();
  find("talk").focus({ preventScroll: true }); // this button is removed
});
find("notice-close").addEventListener("click", () => view.notice(""));

setUpKeys(find("hold"), {
  hold,
  release,
  isHolding: () => state.mode === "holding",
  escape: () => (dialogs.insideIsOver() ? dialogs.openInside(false) : interrupt()),
});

const text = find("text");
text.addEventListener("input", () => find("write").classList.toggle("filled", text.value.trim() !== ""));
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("write").requestSubmit();
});
find("write").addEventListener("submit", async (event) => {
  event.preventDefault();
  const words = text.value.trim();
  if (!words) return;
  text.value = "";
  find("write").classList.remove("filled");
  interrupt();
  const id = `msg_${crypto.getRandomValues(new Uint32Array(3)).join("")}`;
  const turn = conversation.typed(id, words);
  const endedMs = now();
  try {
    await Promise.all([connection.open(), player.start()]);
  } catch {
    turn.note = "Not sent: there is no connection.";
    return conversation.changed(turn);
  }
  question = { endedMs, pauseMs: 0 };
  const content = [{ type: "input_text", text: words }];
  connection.send({ type: "conversation.item.create", item: { id, type: "message", role: "user", content } });
  ask();
});

// --- Settings and new conversation -----------------------------------------------------------------------------------

dialogs.setUpInside();
dialogs.setUpSave(conversation, recordings, () => ({
  model: state.model,
  sessionId: connection.sessionId,
  began,
  settings,
  player,
}));
find("settings-button").addEventListener("click", () => dialogs.openSettings());
find("new-conversation").addEventListener("click", () => {
  quiet();
  player.clear();
  connection.forget();
  conversation.clear();
  view.clear();
  inside.show(null);
  recordings.you.clear();
  recordings.they.clear();
  question = null;
  state.speaking = state.sending = false;
  find("settings").close();
  view.announce("A new conversation.");
  phase();
});

settingsOf.bind(find("settings-form"), settings, (_, name) => {
  connection.key = settings.key;
  if (name === "key") {
    if (connection.state !== "open") look();
  } else if (name === "device" || name === "noiseSuppression") {
    microphone.stop();
    if (state.mode === "hands-free") listen().catch((error) => view.notice(error.message));
  } else if (connection.state === "open") configure();
});

const known = new Set();
function voices(names) {
  for (const name of names) if (name) known.add(name);
  dialogs.offerVoices([...known], settings.voice);
}

/** Shows the server's model; retries until the server answers. */
async function look(attempt = 0) {
  try {
    const model = await modelOf(settings.key);
    if (!model) {
      view.line("Needs a key", "refused");
      const action = { words: "Enter a key", run: () => dialogs.openSettings("key") };
      view.notice("This server needs an API key.", { action, passing: true });
      return;
    }
    state.model = model.trained ? model.id : `${model.id}, not trained`;
    state.transcribes = model.transcribes;
    voices(model.voices);
    dialogs.showModel(model, state.model);
    if (["closed", "open"].includes(connection.state)) view.line(state.model, "ready");
    view.settled();
  } catch {
    view.line("No answer", "waiting");
    view.notice("The server does not answer. Is it running?", { action: { words: "Try now", run: () => look() }, passing: true });
    setTimeout(() => connection.state === "closed" && !state.model && look(attempt + 1), Math.min(15000, 1000 * 2 ** attempt));
  }
}

acknowledge(player, connection);
connection.key = settings.key;
voices([]);
phase();
look();
