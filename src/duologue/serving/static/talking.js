// The user's speech: hands-free mode, push-to-talk, and the sound that waits while there is no connection.

import { interrupt } from "./answers.js";
import { ask } from "./asking.js";
import * as dialogs from "./dialogs.js";
import { connection, find, microphone, now, player, recordings, sent, settings, state, timeline, view } from "./parts.js";
import { RATE } from "./playback.js";
import * as settingsOf from "./settings.js";
import { base64Of } from "./sound.js";
import { phase } from "./status.js";

const KEEP_OPEN_MS = 30000; // keeps the microphone open after push-to-talk, so that the next press loses no audio
const KEPT_S = 20; // of hands-free speech without a connection
const PAUSE_MS = 50; // while the line is busy with kept audio
const SPEECH = 0.02; // level of what counts as lost speech

let early = []; // audio that waits for the connection: {pcm, level}
let draining = null; // the promise of `sendKept`
let lostSamples = 0; // speech that no longer fits in `early`
let closing = 0;
let press = 0; // counts presses, so that a late permission does not reopen a released one
let held = 0; // samples of this press
let awake = null; // keeps the screen on

function append(pcm) {
  if (connection.send({ type: "input_audio_buffer.append", audio: base64Of(pcm) })) sent.add(pcm, now());
}

function keep(pcm, level) {
  early.push({ pcm, level });
  if (state.mode !== "hands-free") return;
  let kept = early.reduce((sum, one) => sum + one.pcm.length, 0);
  while (kept > KEPT_S * RATE) {
    const oldest = early.shift();
    kept -= oldest.pcm.length;
    if (oldest.level > SPEECH) lostSamples += oldest.pcm.length;
  }
}

async function drain() {
  while (early.length && connection.state === "open") {
    if (connection.isBusy) await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    else append(early.shift().pcm);
  }
}

/** Sends the audio that waited, as fast as the line takes it, and says what was lost. Resolves when all is sent. */
export function sendKept() {
  draining ??= drain().finally(() => (draining = null));
  if (lostSamples > 0.3 * RATE) view.seam(`Not heard: ${(lostSamples / RATE).toFixed(1)} s of speech while the line was down`);
  lostSamples = 0;
  return draining;
}

/** Empties the meter of the user. */
export function stopMeter() {
  find("talk").style.setProperty("--level", 0);
  timeline.quiet("you");
}

/** Tells the server who ends the turns. */
function turns(handsFree) {
  const turn_detection = handsFree ? settingsOf.detection(settings) : null;
  connection.send({ type: "session.update", session: { type: "realtime", audio: { input: { turn_detection } } } });
}

microphone.addEventListener("chunk", ({ detail: { pcm, at, stream, peak, level } }) => {
  if (state.mode === "off") return;
  recordings.you.add(pcm, { endS: now() / 1000, at, stream });
  held += pcm.length;
  if (!connection.lost) {
    timeline.add("you", peak, level);
    find("talk").style.setProperty("--level", Math.min(1, Math.sqrt(level) * 1.6).toFixed(2));
  }
  if (connection.state === "open" && !draining) append(pcm);
  else keep(pcm, level);
});

microphone.addEventListener("lost", () => {
  view.notice("The microphone was unplugged or taken away. Choose another in the settings, or type below.");
  quiet();
});

async function stayAwake() {
  awake ??= await navigator.wakeLock?.request("screen").catch(() => null);
  if (state.mode !== "hands-free") letSleep();
}

function letSleep() {
  awake?.release().catch(() => {});
  awake = null;
}

document.addEventListener("visibilitychange", () => {
  awake = null; // the browser releases it with the page
  if (document.visibilityState === "visible" && state.mode === "hands-free") stayAwake();
});

/** Opens the microphone and the loudspeaker. */
export async function listen() {
  clearTimeout(closing);
  await Promise.all([
    player.start(),
    microphone.start({ deviceId: settings.device, noiseSuppression: settings.noiseSuppression }),
  ]);
  dialogs.offerDevices();
}

/** Starts or ends hands-free mode. */
export async function handsFree() {
  if (state.mode !== "off") return quiet();
  state.mode = "hands-free";
  view.notice("");
  view.announce("Listening.");
  phase();
  connection.open().catch(() => {});
  if (connection.state === "open") turns(true);
  stayAwake();
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
export function quiet() {
  if (state.mode === "hands-free" && connection.state === "open") {
    connection.send({ type: "input_audio_buffer.clear" });
    turns(false);
  }
  if (state.mode === "hands-free") view.announce("Stopped listening.");
  state.mode = "off";
  early = [];
  lostSamples = 0;
  microphone.stop();
  letSleep();
  stopMeter();
  phase();
}

/** Starts push-to-talk. */
export async function hold() {
  if (state.mode !== "off") return;
  const mine = (press += 1);
  held = 0;
  state.mode = "holding";
  view.notice("");
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

/** Ends push-to-talk and asks. */
export async function release() {
  if (state.mode !== "holding") return;
  state.mode = "releasing"; // the last chunk still belongs to the turn
  press += 1;
  const endedMs = now();
  await microphone.flush();
  state.mode = "off";
  stopMeter();
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
  await draining;
  state.question = { endedMs, pauseMs: 0 };
  connection.send({ type: "input_audio_buffer.commit" });
  ask();
}
