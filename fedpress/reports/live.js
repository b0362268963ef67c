"use strict";
// Draws the page again while the run goes on. Without this script the browser loads it again every few seconds.
(() => {
  const EVERY = 2000;
  const gone = document.getElementById("gone");
  const ended = () => document.querySelector("main[data-ended]") !== null;
  const key = (part) => part?.getAttribute("aria-label") || part?.querySelector("summary")?.textContent;
  const foldable = "details, .scroll";
  // What each part of the page was drawn from: one that is equal stays, with the pointer on it.
  let drawn = new Map();

  const replace = (old, fresh) => {
    const open = new Set([...old.querySelectorAll("details[open]")].map(key));
    const scrolled = new Map([...old.querySelectorAll(".scroll")].map((part) => [key(part), [part.scrollLeft, part.scrollTop]]));
    const focused = old.contains(document.activeElement) ? key(document.activeElement.closest(foldable)) : null;
    old.replaceWith(fresh);
    for (const part of fresh.querySelectorAll("details")) part.open = open.has(key(part));
    for (const part of fresh.querySelectorAll(".scroll")) [part.scrollLeft, part.scrollTop] = scrolled.get(key(part)) ?? [0, 0];
    if (!focused) return;
    const again = [...fresh.querySelectorAll(foldable)].find((part) => key(part) === focused);
    (again?.querySelector("summary") ?? again)?.focus({ preventScroll: true });
  };

  const redraw = (text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
    if (fresh === null) return;
    const parts = [...fresh.children];
    const now = new Map(parts.map((part) => [part.id, part.outerHTML]));
    const main = document.querySelector("main");
    const same = [...main.children].map((part) => part.id).join() === parts.map((part) => part.id).join();
    const changed = parts.filter((part) => now.get(part.id) !== drawn.get(part.id));
    const pictures = changed.some((part) => part.querySelector("svg"));
    if (same && !("ended" in fresh.dataset)) changed.forEach((part) => replace(document.getElementById(part.id), part));
    else replace(main, fresh);
    drawn = now;
    if (pictures) document.dispatchEvent(new Event("redrawn"));
  };

  const look = async () => {
    try {
      const answer = await fetch("main", { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      redraw(await answer.text());
      gone.hidden = true;
    } catch {
      gone.hidden = false;
    }
    if (!ended()) setTimeout(look, EVERY);
  };
  if (!ended()) setTimeout(look, EVERY);
})();
