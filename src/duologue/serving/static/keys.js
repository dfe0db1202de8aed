// The talk button by finger, mouse, keyboard or screen reader; the space bar; and the escape key.

const isField = (target) => Boolean(target.closest?.("input, textarea, select, button, summary, a, dialog"));

/**
 * @param {HTMLElement} button switches by clicks, or holds while it is pressed
 * @param {{holds: () => boolean, toggle: () => void, hold: () => void, release: () => void, isHolding: () => boolean,
 *   escape: () => void}} act `holds` tells the mode of the button
 */
export function setUpKeys(button, { holds, toggle, hold, release, isHolding, escape }) {
  let pressed = false;
  button.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !holds()) return;
    pressed = true;
    button.setPointerCapture(event.pointerId);
    hold();
  });
  for (const name of ["pointerup", "pointercancel"]) button.addEventListener(name, () => holds() && release());
  button.addEventListener("contextmenu", (event) => holds() && event.preventDefault());
  // In hold mode, a click without a press comes from a screen reader or the enter key: it switches.
  button.addEventListener("click", () => {
    if (!holds()) toggle();
    else if (!pressed) (isHolding() ? release : hold)();
    pressed = false;
  });
  addEventListener("keydown", (event) => {
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
    const free = event.target === button ? holds() : !isField(event.target);
    if (event.code === "Space" && plain && free) {
      event.preventDefault();
      if (!event.repeat) hold();
    }
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) escape();
  });
  addEventListener("keyup", (event) => {
    if (event.code !== "Space" || !isHolding()) return;
    event.preventDefault();
    release();
  });
  addEventListener("blur", release);
}
