// The line to the server: its state in words, its settings, and its events.

import { answered, hush, sound } from "./answers.js";
import { ask } from "./asking.js";
import { connection, conversation, now, player, sent, settings, state, view } from "./parts.js";
import { refusal, whyRefused } from "./refusals.js";
import * as settingsOf from "./settings.js";
import { phase } from "./status.js";
import { quiet, sendKept, stopMeter } from "./talking.js";

const HARMLESS = "response_cancel_not_active";
const BUSY = "conversation_already_has_active_response"; // an answer started before the page knew
const TRIES = 2; // without an opened connection before the page asks why
const purposes = new Map(); // event id of an update -> its purpose
let voices = () => {};

/** @param {(names: string[]) => void} offer called with the voices of a session */
export function onVoices(offer) {
  voices = offer;
}

/** Sends all settings. */
export function configure(handsFree = state.mode === "hands-free") {
  for (const { what, session } of settingsOf.updates(settings, handsFree, state.model)) {
    purposes.set(connection.send({ type: "session.update", session }), what);
  }
}

function opened({ resumed, again }) {
  sent.clear();
  view.line(state.model.name || "Connected", "open");
  view.settled();
  if (resumed) view.announce("Connected again.");
  else if (again) view.seam("A new conversation: the server no longer has the earlier one");
  configure();
  sendKept();
}

function dropped() {
  conversation.lost(state.sending);
  for (const turn of conversation.turns) player.end(turn.id);
  state.sending = state.waiting = false;
  purposes.clear();
  if (connection.lost) stopMeter();
}

function closed(words) {
  view.line(state.model.name || "Ready", "ready");
  // Reconnect at once during speech; the session may have reached its maximum duration.
  if (state.mode === "hands-free") words ? connection.open().catch(() => {}) : quiet();
  else if (words) view.notice(`${words} The conversation goes on when you do.`, { mild: true });
}

async function waits({ words, retryS, code, attempt }) {
  view.line("Not connected", "waiting");
  const soon = Math.max(1, Math.round(retryS));
  view.notice(`${words} Trying again in ${soon} s.`, {
    action: { words: "Try now", run: () => connection.retry() },
    passing: true,
  });
  if (code !== 1006 || connection.sessionId || attempt !== TRIES) return;
  const why = await whyRefused();
  if (why) connection.refuse(why);
}

function isRefused(words) {
  view.line("Refused", "refused");
  quiet();
  const { words: shown, action } = refusal(words, () => connection.open().catch(() => {}));
  view.notice(shown, { action });
}

connection.addEventListener("state", ({ detail }) => {
  if (detail.state === "open") opened(detail);
  else dropped();
  if (detail.state === "connecting") view.line("Connecting", "connecting");
  if (detail.state === "closed") closed(detail.words);
  if (detail.state === "waiting") waits(detail);
  if (detail.state === "refused") isRefused(detail.words);
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

// Returns the end of the user's turn on the page's clock. The server reports a position in the audio sent, silence included.
function stopped({ audio_end_ms: endMs }) {
  const endedMs = sent.when(endMs - settingsOf.silenceMs(settings)) ?? now();
  state.question = { endedMs, pauseMs: now() - endedMs };
}
