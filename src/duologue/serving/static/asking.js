// Written questions: the text field, and the suggestions of the empty page.

import { interrupt } from "./answers.js";
import { connection, conversation, find, now, player, state } from "./parts.js";
import { phase } from "./status.js";

/** Requests an answer to the question that was sent. */
export function ask() {
  state.sending = true;
  connection.send({ type: "response.create" });
  phase();
}

/** Sends a written question, after the connection is open. Until then its turn is marked. */
export async function write(words) {
  interrupt();
  const id = `msg_${crypto.getRandomValues(new Uint32Array(3)).join("")}`;
  const turn = conversation.typed(id, words);
  const endedMs = now();
  if (connection.state !== "open") conversation.mark(turn, "waiting", "Waits for the connection; not sent yet.");
  try {
    await Promise.all([connection.open(), player.start()]);
  } catch {
    return conversation.mark(turn, "unsent", "Not sent: there is no connection.");
  }
  conversation.mark(turn, "done", "");
  state.question = { endedMs, pauseMs: 0 };
  const content = [{ type: "input_text", text: words }];
  connection.send({ type: "conversation.item.create", item: { id, type: "message", role: "user", content } });
  return ask();
}

/** Shows the model's questions as buttons that ask them. */
export function suggest(questions) {
  const items = questions.map((words) => {
    const item = document.createElement("li");
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "plain chip";
    chip.textContent = words;
    chip.addEventListener("click", () => {
      write(words);
      find("talk").focus({ preventScroll: true }); // the chips are hidden now
    });
    item.append(chip);
    return item;
  });
  find("chips").replaceChildren(...items);
  find("suggestions").hidden = items.length === 0;
}

const text = find("text");

text.addEventListener("input", () => find("write").classList.toggle("filled", text.value.trim() !== ""));
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("write").requestSubmit();
});
find("write").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = text.value.trim();
  if (!words) return;
  text.value = "";
  find("write").classList.remove("filled");
  write(words);
});
