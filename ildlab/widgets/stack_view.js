// The picture and the state are Python's. Here: pointing, selecting, keys, and a new picture put in the old one's place.

const KEYS = {
  m: ["measure", "measure"],
  r: ["remove", "remove the selected layers"],
  d: ["distill", "distill"],
  e: ["evaluate", "evaluate"],
  u: ["undo", "undo"],
  n: ["proceed", "the next phase of the loop"],
  x: ["toggle", "switch the selected layers off and on in the what-if"],
};
const HELP = [
  ["← →, Home, End", "move and select; with Shift: several"],
  ["Enter", "the layer under the cursor in or out of the selection"],
  ...Object.entries(KEYS).map(([key, [, said]]) => [key, said]),
  ["?", "this list"],
];

// Change `old` into `next` node by node, so that what moves can be seen moving.
function morph(old, next) {
  if (old.nodeName !== next.nodeName) return old.replaceWith(next);
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  for (const { name, value } of [...next.attributes])
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) if (!next.hasAttribute(name)) old.removeAttribute(name);
  const was = [...old.childNodes];
  const now = [...next.childNodes];
  now.forEach((node, i) => (was[i] ? morph(was[i], node) : old.append(node)));
  was.slice(now.length).forEach((node) => node.remove());
}

function make(parent, tag, name, more = {}) {
  const made = document.createElement(tag);
  made.className = name;
  for (const [key, value] of Object.entries(more)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

function inWords(seconds) {
  const s = Math.max(1, Math.round(seconds));
  return s < 90 ? `about ${s} s left` : `about ${Math.round(s / 60)} min left`;
}

export default {
  render({ model, el }) {
    const uid = `ild${Math.random().toString(36).slice(2, 8)}`;
    el.classList.add("ild-live");
    const line = make(el, "div", "line");
    const said = make(line, "span", "ildlab-status", { role: "status", "aria-live": "polite" });
    const clock = make(line, "span", "clock", { "aria-hidden": "true" });
    const bar = make(el, "progress", "bar-of-work", { max: 1, "aria-label": "work in hand" });
    const stage = make(el, "div", "stage");
    const heard = make(el, "div", "heard", { "aria-live": "polite" });
    const tip = make(el, "div", "tip", { hidden: "", "aria-hidden": "true" });
    const help = make(el, "dialog", "help", { "aria-label": "keys" });
    for (const [keys, words] of HELP) {
      make(help, "kbd", "").textContent = keys;
      make(help, "span", "").textContent = words;
    }
    const close = make(help, "button", "", { type: "button" });
    close.textContent = "Close";
    close.onclick = () => help.close();
    let cursor = null; // layer id that keys act on,
    let anchor = null; // and the one that a selection of several began at

    const columns = () => [...stage.querySelectorAll(".col")];
    const ids = () => columns().map((c) => Number(c.dataset.id));
    const at = (id) => stage.querySelector(`.col[data-id="${id}"]`);
    const send = (what) => model.send(what);

    // What a page that can be acted on has more than the picture: roles, names, what is selected.
    function dress(root) {
      const chosen = new Set(model.get("selected"));
      for (const title of root.querySelectorAll(".col > title, .row > title")) {
        title.parentNode.setAttribute("aria-label", title.textContent);
        title.remove();
      }
      for (const column of root.querySelectorAll(".col")) {
        const id = Number(column.dataset.id);
        column.setAttribute("role", "option");
        column.setAttribute("id", `${uid}-${id}`);
        column.setAttribute("aria-selected", chosen.has(id));
        column.classList.toggle("cursor", id === cursor);
      }
      for (const row of root.querySelectorAll(".row")) {
        row.setAttribute("role", "button");
        row.setAttribute("tabindex", "0");
      }
      root.querySelector("svg.rows")?.setAttribute("role", "group");
      const list = root.querySelector("svg.columns");
      if (!list) return;
      list.setAttribute("role", "listbox");
      list.setAttribute("aria-multiselectable", "true");
      list.setAttribute("tabindex", "0");
      if (cursor !== null) list.setAttribute("aria-activedescendant", `${uid}-${cursor}`);
    }

    function draw() {
      const next = document.createElement("div");
      next.className = "stage";
      next.innerHTML = model.get("picture");
      dress(next);
      morph(stage, next);
    }

    function select(chosen, to) {
      cursor = to;
      model.set("selected", chosen);
      model.save_changes();
      dress(stage);
      heard.textContent = at(to)?.getAttribute("aria-label") ?? "";
    }

    function range(from, to) {
      const all = ids();
      const [a, b] = [all.indexOf(from), all.indexOf(to)].sort((x, y) => x - y);
      return all.slice(Math.max(a, 0), b + 1);
    }

    function point(target, x, y) {
      const thing = target?.closest?.(".col, .row");
      tip.hidden = !thing;
      if (!thing) return;
      tip.textContent = thing.getAttribute("aria-label").replaceAll("; ", "\n");
      const box = el.getBoundingClientRect();
      tip.style.left = `${Math.min(Math.max(0, x - box.left + 14), box.width - tip.offsetWidth - 4)}px`;
      tip.style.top = `${y - box.top + 18}px`;
    }

    let dragging = false;
    stage.addEventListener("pointerdown", (event) => {
      const column = event.target.closest(".col");
      const row = event.target.closest(".row");
      if (row) send({ step: Number(row.dataset.step) });
      if (!column || event.button) return;
      const id = Number(column.dataset.id);
      if (!event.shiftKey || anchor === null) anchor = id;
      dragging = true;
      if (event.ctrlKey || event.metaKey) flip(id);
      else select(event.shiftKey ? range(anchor, id) : [id], id);
      stage.querySelector("svg.columns").focus({ preventScroll: true });
    });
    stage.addEventListener("pointermove", (event) => {
      point(event.target, event.clientX, event.clientY);
      const column = dragging && event.buttons ? event.target.closest(".col") : null;
      if (column && Number(column.dataset.id) !== cursor) {
        const id = Number(column.dataset.id);
        select(range(anchor, id), id);
      }
    });
    stage.addEventListener("pointerup", () => (dragging = false));
    stage.addEventListener("pointerleave", () => (tip.hidden = true));
    stage.addEventListener("focusout", () => (tip.hidden = true));

    function flip(id) {
      const chosen = model.get("selected");
      select(chosen.includes(id) ? chosen.filter((i) => i !== id) : [...chosen, id], id);
    }

    function move(event) {
      const all = ids();
      const place = all.indexOf(cursor ?? model.get("selected")[0]);
      const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: all.length - 1 }[event.key];
      if (to === undefined) return false;
      const id = all[Math.min(Math.max(to, 0), all.length - 1)];
      if (!event.shiftKey) anchor = id;
      select(event.shiftKey ? range(anchor ?? id, id) : [id], id);
      const box = at(id).getBoundingClientRect();
      point(at(id), box.left, box.bottom);
      return true;
    }

    stage.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const row = event.target.closest(".row");
      if (row && (event.key === "Enter" || event.key === " ")) send({ step: Number(row.dataset.step) });
      else if (event.key === "Enter" && cursor !== null) flip(cursor);
      else if (event.key === "?") help.showModal();
      else if (KEYS[event.key]) send({ action: KEYS[event.key][0] });
      else if (!move(event)) return;
      event.preventDefault();
      event.stopPropagation(); // JupyterLab has commands on these keys too
    });

    // Headers of ipywidgets' panes are no buttons, and boxes that have a tooltip alone no label: here they get both.
    function reach() {
      const page = el.closest(".ildlab-stepper");
      for (const box of page?.querySelectorAll("input, select, textarea") ?? []) {
        const label = [...(box.labels ?? [])].map((each) => each.textContent.trim()).join(" ");
        const title = box.title || box.closest("[title]")?.title || box.labels?.[0]?.title;
        if (!label && title) box.setAttribute("aria-label", title);
      }
      for (const head of page?.querySelectorAll(".jupyter-widget-Collapse-header") ?? []) {
        head.setAttribute("aria-expanded", head.parentElement.classList.contains("jupyter-widget-Collapse-open"));
        if (head.tabIndex >= 0) continue;
        head.tabIndex = 0;
        head.setAttribute("role", "button");
        head.addEventListener("click", () => setTimeout(reach));
        head.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          event.stopPropagation();
          head.click();
        });
      }
    }

    let ends = 0;
    function tick() {
      reach();
      const left = model.get("left");
      clock.textContent = left < 0 ? "" : inWords((ends - performance.now()) / 1000);
      bar.hidden = model.get("done") < 0;
      bar.value = Math.max(0, model.get("done"));
    }
    const timer = setInterval(tick, 1000);
    const time = () => {
      ends = performance.now() + 1000 * model.get("left");
      tick();
    };
    const say = () => (said.textContent = model.get("status"));
    model.on("change:picture", draw);
    model.on("change:selected", () => {
      cursor = model.get("selected").at(-1) ?? cursor;
      dress(stage);
    });
    model.on("change:status", say);
    model.on("change:left", time);
    model.on("change:done", tick);
    draw();
    say();
    time();
    return () => clearInterval(timer);
  },
};
