// The status line and the talk button, derived from the state of all parts.

import { connection, conversation, find, microphone, settings, state, view } from "./parts.js";

function status(down, listening, answering) {
  const on = state.mode === "hands-free";
  if (down && on) return ["Not connected · what you say is kept for a moment", "ready"];
  if (down) return ["Not connected", "ready"];
  if (state.mode === "holding") return ["Listening while you hold", "hearing"];
  if (on && listening) return ["Hearing you", "hearing"];
  if (state.speaking) return [on && settings.interrupt ? "Speaking · talk to interrupt" : "Speaking", "speaking"];
  if (answering) return ["Thinking", "thinking"];
  if (connection.state === "connecting") return ["Connecting", "ready"];
  if (on) return microphone.open ? ["Listening", "listening"] : ["Opening the microphone", "ready"];
  return ["Ready", "ready"];
}

/** Words on the talk button, and its name for screen readers, which begins with them. */
function buttonWords(reconnecting) {
  if (state.mode === "hands-free") return reconnecting ? ["Reconnecting", "Reconnecting. Stop listening"] : ["Stop", "Stop listening"];
  if (settings.hold) return state.mode === "holding" ? ["Release to send", "Release to send"] : ["Hold to talk", "Hold to talk"];
  return ["Talk", "Talk hands-free"];
}

/** Shows the current phase of the conversation. */
export function phase() {
  const down = ["waiting", "refused"].includes(connection.state);
  const listening = conversation.turns.findLast((turn) => turn.status === "listening");
  const answering = Boolean(conversation.answering) || state.sending;
  view.status(...status(down, listening, answering));
  const talk = find("talk");
  const [words, name] = buttonWords(connection.lost);
  talk.classList.toggle("on", state.mode === "hands-free" || state.mode === "holding");
  talk.classList.toggle("lost", state.mode === "hands-free" && connection.lost);
  find("talk-words").textContent = words;
  talk.setAttribute("aria-label", name);
  if (settings.hold) talk.setAttribute("aria-pressed", String(state.mode === "holding"));
  else talk.removeAttribute("aria-pressed");
  find("hold-mode").disabled = state.mode !== "off";
  find("stop").hidden = !(state.speaking || answering);
}
