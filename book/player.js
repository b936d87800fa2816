// Moves the figure of the first page: its slider runs from the first step to the last, one story after the other, then
// rests. Stops at a click of its button, at any use of the controls, out of sight, in print, and never starts by itself
// for readers who ask for less motion.
(() => {
  "use strict";
  const STEPS_A_SECOND = 1.4, REST = 1.6;
  const root = document.getElementById("blx-learning");
  if (!root || !root.explorer) return;
  const slider = root.querySelector("input[name=step]"), menu = root.querySelector("select[name=story]");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const button = document.createElement("button");
  button.type = "button";
  button.style.marginLeft = "auto";
  root.querySelector(".blx-head button").before(button);
  let playing = false, visible = true, last = 0, clock = 0;

  const set = (control, value, kind) => {
    control.value = value;
    control.dispatchEvent(new Event(kind, { bubbles: true }));
  };
  const length = () => Number(slider.max) * 0.05; // steps of the story
  const show = (step) => set(slider, Math.round(Math.min(Math.max(step, 0), length()) / 0.05), "input");
  const label = () => {
    button.textContent = playing ? "Pause" : "Play";
  };
  function play(on) {
    if (on && !playing) {
      if (Number(slider.value) >= Number(slider.max)) restart(0);
      else clock = Number(slider.value) * 0.05;
      last = 0;
      requestAnimationFrame(tick);
    }
    playing = on;
    label();
  }
  function restart(story) {
    set(menu, story, "change");
    clock = -0.7;
    show(0);
  }
  function tick(time) {
    if (!playing) return;
    const passed = last ? Math.min(0.1, (time - last) / 1000) : 0;
    last = time;
    if (visible) clock += passed * STEPS_A_SECOND;
    if (clock > length() + REST) {
      if (menu.selectedIndex + 1 >= menu.options.length) return play(false);
      restart(menu.selectedIndex + 1);
    } else if (visible) show(clock);
    requestAnimationFrame(tick);
  }
  const still = () => {
    play(false);
    show(length());
  };

  button.addEventListener("click", () => play(!playing));
  for (const kind of ["input", "change", "click"]) {
    root.addEventListener(kind, (event) => {
      if (event.isTrusted && event.target !== button && event.target.matches("input, select, button")) play(false);
    });
  }
  window.addEventListener("beforeprint", still);
  calm.addEventListener("change", () => calm.matches && still());
  if (window.IntersectionObserver) {
    new IntersectionObserver(([entry]) => {
      visible = entry.isIntersecting;
    }).observe(root);
  }
  label();
  if (!calm.matches) {
    restart(0);
    play(true);
  }
})();
