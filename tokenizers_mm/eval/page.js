"use strict";
const gallery = document.getElementById("gallery");
if (gallery) {
  const set = (name, value) => gallery.style.setProperty(name, value);
  const cut = document.getElementById("cut");
  const zoom = document.getElementById("zoom");
  const view = document.getElementById("view");
  cut.addEventListener("input", () => set("--cut", cut.value + "%"));
  zoom.addEventListener("input", () => set("--zoom", zoom.value));
  view.addEventListener("change", () => gallery.classList.toggle("difference", view.value === "difference"));
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  // all pairs show the same place of their image
  gallery.addEventListener("scroll", (event) => {
    const from = event.target;
    if (!from.classList || !from.classList.contains("pair") || from.dataset.led) return;
    for (const pair of gallery.querySelectorAll(".pair")) {
      if (pair === from) continue;
      pair.dataset.led = "1";
      pair.scrollLeft = from.scrollLeft;
      pair.scrollTop = from.scrollTop;
      requestAnimationFrame(() => delete pair.dataset.led);
    }
  }, true);
}
