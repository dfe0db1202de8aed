// Starts the page: what is typed, pressed and chosen reaches the parts, and the model is looked up.

import { acknowledge } from "./acknowledge.js";
import { choose, interrupt } from "./answers.js";
import { suggest } from "./asking.js";
import * as dialogs from "./dialogs.js";
import { setUpKeys } from "./keys.js";
import { configure, onVoices } from "./line.js";
import { began, connection, conversation, find, inside, microphone, now, player, recordings, settings, state, timeline, view } from "./parts.js";
import { modelOf } from "./protocol.js";
import { refusal } from "./refusals.js";
import * as settingsOf from "./settings.js";
import { phase } from "./status.js";
import { handsFree, hold, listen, quiet, release } from "./talking.js";

conversation.addEventListener("turn", ({ detail: { turn } }) => {
  if (turn.role === "user" && turn.spoken && turn.status !== "listening" && !turn.peaks) {
    turn.peaks = timeline.since("you", performance.now() - Math.max(300, now() - turn.startedMs));
  }
  view.update(turn);
  inside.update(turn);
});

conversation.addEventListener("moved", ({ detail: { turn, previous } }) => view.move(turn, previous));

view.addEventListener("select", ({ detail: { turn } }) => {
  choose(turn);
  if (dialogs.insideIsClosed()) dialogs.openInside(true);
});

// --- Buttons and keys ----------------------------------------------------------------------------------------------------

find("stop").addEventListener("click", () => {
  interrupt();
  find("talk").focus({ preventScroll: true }); // this button is removed
});
find("notice-close").addEventListener("click", () => view.notice(""));

setUpKeys(find("talk"), {
  holds: () => settings.hold,
  toggle: handsFree,
  hold,
  release,
  isHolding: () => state.mode === "holding",
  escape: () => (dialogs.insideIsOver() ? dialogs.openInside(false) : interrupt()),
});

// --- Settings and new conversation -----------------------------------------------------------------------------------

dialogs.setUpInside();
dialogs.setUpSave(conversation, recordings, () => ({
  model: state.model.name,
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
  state.question = null;
  state.speaking = state.sending = false;
  find("settings").close();
  view.announce("A new conversation.");
  phase();
});

const changed = (name) => {
  connection.key = settings.key;
  if (name === "hold") return phase();
  if (name === "key") {
    if (connection.state !== "open") look();
  } else if (name === "device" || name === "noiseSuppression") {
    microphone.stop();
    if (state.mode === "hands-free") listen().catch((error) => view.notice(error.message));
  } else if (connection.state === "open") configure();
};
settingsOf.bind([...find("settings-form").elements, find("hold-mode")], find("settings-form"), settings, changed);

// --- The model -----------------------------------------------------------------------------------------------------------

const known = new Set();
function voices(names) {
  for (const name of names) if (name) known.add(name);
  dialogs.offerVoices([...known], settings.voice);
}

/** Shows the server's model; retries until the server answers. */
async function look(attempt = 0) {
  try {
    const model = await modelOf(settings.key);
    state.model = { ...model, name: model.trained ? model.id : `${model.id}, not trained` };
    voices(model.voices);
    dialogs.showModel(state.model);
    suggest(model.questions);
    if (["closed", "open"].includes(connection.state)) view.line(state.model.name, "ready");
    view.settled();
  } catch (error) {
    if (error.refused) {
      view.line(error.missesKey ? "Needs a key" : "Refused", "refused");
      const { words, action } = refusal(error.message, () => look());
      return view.notice(words, { action, passing: true });
    }
    view.line("No answer", "waiting");
    const words = "The server does not answer. Is it running? It starts with: duologue serve";
    view.notice(words, { action: { words: "Try now", run: () => look() }, passing: true });
    setTimeout(() => connection.state === "closed" && !state.model.name && look(attempt + 1), Math.min(15000, 1000 * 2 ** attempt));
  }
}

onVoices(voices);
acknowledge(player, connection);
connection.key = settings.key;
voices([]);
phase();
look();
