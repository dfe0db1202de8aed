// Answers: their sound, their interruption, and what the player reports.

import { connection, conversation, inside, now, player, recordings, state, timeline, view } from "./parts.js";
import { pcmOf } from "./sound.js";
import { phase } from "./status.js";

const silenced = new Set(); // items whose remaining audio is dropped
const ended = new Map(); // item -> end of its question, ms on the page's clock

/** Shows a turn in the panel and marks it in the transcript. */
export function choose(turn) {
  inside.show(turn);
  view.choose(turn);
}

/** Handles the first event of an answer. */
export function answered(id) {
  state.sending = false;
  const turn = conversation.turn(id);
  if (state.question) {
    turn.pauseMs = state.question.pauseMs;
    ended.set(id, state.question.endedMs);
  }
  state.question = null;
  choose(turn);
}

/** Plays a piece of an answer. */
export function sound({ item_id: id, delta }) {
  if (silenced.has(id)) return;
  const turn = conversation.turn(id);
  const ms = player.push(id, delta);
  if (!turn) return;
  turn.audioMs += ms;
  turn.spoken = true;
}

/** Stops playback at once and reports the played milliseconds to the server. */
export async function hush() {
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
export function interrupt() {
  const answering = conversation.answering;
  if (answering?.responseId) connection.send({ type: "response.cancel", response_id: answering.responseId });
  if (answering || state.speaking) hush();
}

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
player.addEventListener("audible", () => view.notice("The loudspeaker is there now: the next answer is spoken.", { mild: true }));
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
