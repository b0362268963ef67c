"use strict";
// Tells the numbers beside the pointer. Without this script the browser shows the title of a point after a while.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const middle = (mark) => {
    const box = mark.getBoundingClientRect();
    return { x: box.x + box.width / 2, y: box.y + box.height / 2, top: box.y, bottom: box.bottom, left: box.x, right: box.right };
  };
  // A bar is as near as its nearest edge: the pointer may stand anywhere on it.
  const gap = (at, low, high) => Math.max(0, low - at, at - high);

  const attached = new WeakSet();
  const attach = (picture) => {
    if (attached.has(picture)) return;
    attached.add(picture);
    const marks = [...picture.querySelectorAll(".mark")]
      .filter((mark) => mark.firstElementChild?.tagName === "title")
      .map((mark) => [mark, mark.firstElementChild.textContent]);
    const together = picture.hasAttribute("data-together");
    let lit = [];
    const leave = () => {
      lit.forEach((mark) => mark.classList.remove("lit"));
      lit = [];
      tip.hidden = true;
    };
    picture.addEventListener("pointerenter", () => marks.forEach(([mark]) => mark.firstElementChild?.remove()));
    picture.addEventListener("pointerleave", leave);
    picture.addEventListener("pointermove", (event) => {
      leave();
      const places = marks.map(([mark, text]) => ({ mark, text, ...middle(mark) }));
      const far = (p) => {
        const across = together ? Math.abs(event.clientX - p.x) : gap(event.clientX, p.left, p.right);
        return together ? across : Math.hypot(across, gap(event.clientY, p.top, p.bottom));
      };
      const nearest = places.reduce((best, p) => (best === null || far(p) < far(best) ? p : best), null);
      if (nearest === null || far(nearest) > 60) return;
      const told = together ? places.filter((p) => Math.abs(p.x - nearest.x) < 0.5) : [nearest];
      lit = told.map((p) => p.mark);
      lit.forEach((mark) => mark.classList.add("lit"));
      tip.textContent = told.map((p) => p.text).join("\n");
      tip.hidden = false;
      const width = tip.offsetWidth, height = tip.offsetHeight, edge = document.documentElement.clientWidth;
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, edge - width - 4))}px`;
      tip.style.top = `${event.clientY > height + 24 ? event.clientY - height - 12 : event.clientY + 18}px`;
    });
  };
  const attachAll = () => {
    tip.hidden = true;
    document.querySelectorAll("svg.drawn").forEach(attach);
  };
  attachAll();
  // A page that is drawn again while a run goes on has new pictures.
  document.addEventListener("redrawn", attachAll);
})();
