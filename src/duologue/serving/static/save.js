// Saves a conversation: transcript and timings as JSON, audio of both sides as one stereo WAV.

import { RATE } from "./playback.js";
import { wavOf } from "./sound.js";

export function wordsOf(conversation, { model, sessionId, began, settings, player, you, they }) {
  const { key: _, device: __, ...chosen } = settings;
  return {
    kind: "DuologuePageConversation",
    version: 1,
    began: began.toISOString(),
    model,
    session_id: sessionId,
    settings: chosen,
    playback: { gaps: player.gaps, gap_ms: Math.round(player.gapMs) },
    sound: { sample_rate: RATE, channels: ["you", "duologue"], begins_s: begins(you, they), oldest_dropped: you.dropped || they.dropped },
    turns: conversation.turns.map((turn) => ({
      id: turn.id,
      role: turn.role,
      text: turn.text,
      spoken: turn.spoken,
      status: turn.status,
      started_ms: Math.round(turn.startedMs),
      ended_ms: turn.endedMs === undefined ? null : Math.round(turn.endedMs),
      audio_ms: turn.audioMs ? Math.round(turn.audioMs) : null,
      cut_ms: turn.cutMs ?? null,
      pause_ms: turn.pauseMs === undefined ? null : Math.round(turn.pauseMs),
      heard_after_ms: turn.heardAfterMs === undefined ? null : Math.round(turn.heardAfterMs),
      gaps: turn.gaps,
      tokens: turn.runs.map(({ kind, count, ids }) => (ids.length ? { kind, count, ids } : { kind, count })),
      timings: turn.timings ?? null,
      usage: turn.usage ?? null,
    })),
  };
}

function begins(you, they) {
  const first = Math.min(you.start, they.start);
  return Number.isFinite(first) ? first / RATE : null;
}

/** Returns a stereo WAV blob, user left and Duologue right, or null without audio. */
export function soundOf(you, they) {
  const from = Math.min(you.start, they.start);
  return Number.isFinite(from) ? wavOf(you.flat(from), they.flat(from), RATE) : null;
}

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
