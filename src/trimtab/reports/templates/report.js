"use strict";
(function () {
  const list = document.getElementById("list");
  if (!list) return;
  const STEP = 40;
  const rows = Array.from(list.children); // noscript elements: what is in them is text, not yet elements
  const find = document.getElementById("find");
  const selects = ["axis", "category", "direction"]
    .map((name) => [name, document.getElementById("by-" + name)])
    .filter((entry) => entry[1]);
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const texts = new Map();
  const signs = { "&lt;": "<", "&gt;": ">", "&amp;": "&", "&#34;": '"', "&#39;": "'" };
  let matched = rows;
  let shown = 0;
  list.replaceChildren();

  // The words of a row without its tags. Read once, and only when somebody searches.
  function textOf(row) {
    let text = texts.get(row);
    if (text === undefined) {
      text = row.textContent.replace(/<[^>]*>/g, " ").replace(/&(?:lt|gt|amp|#34|#39);/g, (sign) => signs[sign]).toLowerCase();
      texts.set(row, text);
    }
    return text;
  }

  // The page's own markup, escaped where it was written; a template is inert until its content is put into the page.
  function elementOf(row) {
    const made = document.createElement("template");
    made.innerHTML = row.textContent;
    return made.content.firstElementChild;
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
    const added = matched.slice(shown, shown + STEP).map(elementOf);
    list.append(...added);
    shown += added.length;
    report();
    return added[0];
  }

  function apply() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = selects.map(([name, select]) => [name, select.value]).filter((entry) => entry[1] !== "");
    matched = rows.filter((row) => fits(row, words, wanted));
    shown = 0;
    list.replaceChildren();
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
    const next = showMore();
    if (next) {
      next.tabIndex = -1;
      next.focus({ preventScroll: true });
    }
  });
  apply();
})();
