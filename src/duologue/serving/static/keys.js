// Push-to-talk by finger, mouse, space bar or screen reader; and the escape key.

const isField = (target) => Boolean(target.closest?.("input, textarea, select, button, summary, a, dialog"));

/** @param {{hold: () => void, release: () => void, isHolding: () => boolean, escape: () => void}} act */
export function setUpKeys(button, { hold, release, isHolding, escape }) {
  let pressed = false;
  button.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pressed = true;
    button.setPointerCapture(event.pointerId);
    hold();
  });
  for (const name of ["pointerup", "pointercancel"]) button.addEventListener(name, release);
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  // A click without a press comes from a screen reader or the enter key: it toggles.
  button.addEventListener("click", () => {
    if (!pressed) (isHolding() ? release : hold)();
    pressed = false;
  });
  addEventListener("keydown", (event) => {
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
    if (event.code === "Space" && plain && (event.target === button || !isField(event.target))) {
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
