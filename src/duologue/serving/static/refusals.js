// Refusals of the server in words, each with the way out.

import * as dialogs from "./dialogs.js";
import { place } from "./protocol.js";

const enterKey = { words: "Enter a key", run: () => dialogs.openSettings("key") };

/**
 * Returns what to show for a refusal: {words, action}. `retry` is called by the action where no key is missing.
 */
export function refusal(words, retry) {
  if (/\bkey\b/i.test(words)) {
    const problem = words.replace(/: send it as .*/, "."); // how programs send it
    return { words: `${problem} Its keys are those of its option --keys.`, action: enterKey };
  }
  return { words, action: { words: "Try again", run: retry } };
}

/**
 * Returns the server's reason to refuse this page, or "". Browsers hide the reason from a WebSocket; a request with the
 * same origin gets it.
 */
export async function whyRefused() {
  try {
    const answer = await fetch(place("v1/models"), { method: "POST" });
    return answer.status === 403 ? ((await answer.json()).error?.message ?? "") : "";
  } catch {
    return "";
  }
}
