"use strict";
(function () {
  const list = document.getElementById("list");
  if (!list) return;
  const STEP = 40;
  const rows = Array.from(list.children);
  const find = document.getElementById("find");
  const selects = ["axis", "category", "direction"]
    .map((name) => [name, document.getElementById("by-" + name)])
    .filter((entry) => entry[1]);
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const texts = new Map();
  let matched = rows;
  let shown = 0;

  // Reading a row's text is the slow part, so each is read once, and only when somebody searches.
  function textOf(row) {
    let text = texts.get(row);
    if (text === undefined) {
      text = row.textContent.toLowerCase();
      texts.set(row, text);
    }
    return text;
  }

  function fits(row, words, wanted) {
    for (const [name, value] of wanted) {
      const own = row.dataset[name];
      if (name === "direction" ? !own.split(" ").includes(value) : own !== value) return false;
    }
    return words.every((word) => textOf(row).includes(word));
  }

  function report() {
    const total = matched.length.toLocaleString("en");
    count.textContent = shown < matched.length ? "Showing " + shown.toLocaleString("en") + " of " + total + " items" : total + (matched.length === 1 ? " item" : " items");
    more.hidden = shown >= matched.length;
  }

  function showMore() {
    for (const row of matched.slice(shown, shown + STEP)) row.classList.add("on");
    shown = Math.min(shown + STEP, matched.length);
    report();
  }

  function apply() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = selects.map(([name, select]) => [name, select.value]).filter((entry) => entry[1] !== "");
    for (const row of matched.slice(0, shown)) row.classList.remove("on");
    matched = rows.filter((row) => fits(row, words, wanted));
    shown = 0;
    showMore();
  }

  let timer = 0;
  find.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(apply, 120);
  });
  for (const entry of selects) entry[1].addEventListener("change", apply);
  const form = document.querySelector(".filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  more.addEventListener("click", () => {
    const next = matched[shown];
    showMore();
    if (next) {
      next.tabIndex = -1;
      next.focus({ preventScroll: true });
    }
  });
  apply();
})();
