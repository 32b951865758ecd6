// The table of a report page: sorts and filters the jobs, and draws only the rows on the screen.
// What jobs say becomes text nodes, never HTML.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const jobs = JSON.parse(byId("jobs").textContent);
  const rows = byId("rows");
  const bar = byId("bar");
  const AROUND = 10; // rows drawn beyond the screen's edges

  const word = (status) => status.replace("_", " ");
  const plain = new Intl.NumberFormat("en-US");
  const collator = new Intl.Collator("en", { numeric: true });
  const money = (dollars) => `$${dollars.toFixed(dollars >= 1 ? 2 : 4)}`;

  function short(number) {
    const [size, unit] = [[1e9, " G"], [1e6, " M"], [1e3, " k"], [1, ""]].find(([size]) => number >= size) || [1, ""];
    return (number / size).toFixed(size > 1 ? 1 : 0).replace(/\.0$/, "") + unit;
  }

  function span(seconds) {
    if (seconds < 59.95) return `${seconds.toFixed(seconds % 1 && seconds < 20 ? 1 : 0)} s`;
    const s = Math.round(seconds);
    if (s < 3600) return `${Math.floor(s / 60)} min${s % 60 ? ` ${s % 60} s` : ""}`;
    const m = Math.round(seconds / 60);
    return `${Math.floor(m / 60)} h${m % 60 ? ` ${m % 60} min` : ""}`;
  }

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== undefined && value !== null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  function dot(status) {
    const names = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(names, "svg");
    const rect = document.createElementNS(names, "rect");
    const attributes = { class: `dot ${status}`, width: 9, height: 9, "aria-hidden": "true" };
    for (const [name, value] of Object.entries(attributes)) svg.setAttribute(name, value);
    rect.setAttribute("width", 9);
    rect.setAttribute("height", 9);
    rect.setAttribute("rx", status === "ok" ? 4.5 : 2);
    svg.append(rect);
    return svg;
  }

  // --- which jobs, in which order ---------------------------------------------------------------

  const wanted = { words: [], statuses: new Set(), kind: null, times: null };
  const sorting = { by: "n", sign: 1 };
  const texts = new Map(); // place -> the text that is searched
  const where = new Int32Array(jobs.length); // place -> position in the view, or -1
  let view = []; // places, in the order shown

  function detailOf(place) {
    const element = byId(`job-${place}`);
    return element && element.textContent ? JSON.parse(element.textContent) : null;
  }

  function textOf(place) {
    if (texts.has(place)) return texts.get(place);
    const job = jobs[place];
    const detail = detailOf(place);
    const parts = [job.key, job.kind, job.prompt, job.gist, ...job.tools];
    if (detail) {
      parts.push(detail.prompt, detail.before, detail.answer, detail.error, detail.parsed,
        detail.metadata);
      for (const tool of detail.tools || []) parts.push(tool.title, tool.input);
    }
    const text = parts.filter(Boolean).join("\n").toLowerCase();
    if (detail) texts.set(place, text); // else the page is still loading
    return text;
  }

  function isWanted(place) {
    const job = jobs[place];
    if (wanted.statuses.size && !wanted.statuses.has(job.status)) return false;
    if (wanted.kind !== null && job.kind !== wanted.kind) return false;
    if (wanted.times) {
      const [from, to] = wanted.times;
      if (!(job.from <= to && job.to >= from)) return false;
    }
    return wanted.words.every((each) => textOf(place).includes(each));
  }

  function compare(left, right) {
    const [a, b] = [jobs[left], jobs[right]];
    const value = (job) => (sorting.by === "tools" ? job.tools.length : job[sorting.by]);
    const [x, y] = [value(a), value(b)];
    const order = typeof x === "string" ? collator.compare(x, y) : x - y;
    return sorting.sign * order || a.n - b.n || left - right;
  }

  function arrange() {
    view = jobs.map((_, place) => place).filter(isWanted).sort(compare);
    where.fill(-1);
    view.forEach((place, position) => (where[place] = position));
    const sum = (name) => view.reduce((total, place) => total + jobs[place][name], 0);
    const all = view.length === jobs.length;
    const shown = all ? plain.format(jobs.length) : `${plain.format(view.length)} of ${plain.format(jobs.length)}`;
    byId("count").textContent = `${shown} jobs, ${money(sum("cost"))}, ${short(sum("tokens"))} tokens`;
    byId("none").hidden = view.length > 0;
    byId("table").setAttribute("aria-rowcount", view.length + 1);
    for (const elements of drawn.values()) elements.forEach((element) => element.remove());
    drawn.clear();
    foldsChanged();
    draw();
  }

  function sortBy(by, sign) {
    Object.assign(sorting, { by, sign });
    for (const button of document.querySelectorAll("th button")) {
      const cell = button.parentElement;
      if (button.dataset.by !== by) cell.removeAttribute("aria-sort");
      else cell.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    }
    byId("sort").value = (sign < 0 ? "-" : "") + by;
    arrange();
  }

  function pick(text, label, forget) {
    const remove = make("button", { type: "button", class: "chip pick", "aria-label": label }, make("span", null, text), "×");
    remove.addEventListener("click", forget);
    byId("picks").append(remove);
  }

  function filter() {
    for (const chip of document.querySelectorAll("[data-status]")) {
      chip.setAttribute("aria-pressed", wanted.statuses.has(chip.dataset.status));
    }
    for (const kind of document.querySelectorAll("[data-kind]")) {
      kind.setAttribute("aria-pressed", wanted.kind === kind.dataset.kind);
    }
    byId("picks").replaceChildren();
    if (wanted.kind !== null) {
      pick(wanted.kind, `Do not filter by ${wanted.kind}`, () => { wanted.kind = null; filter(); });
    }
    if (wanted.times) {
      const text = `${span(wanted.times[0])} to ${span(wanted.times[1])}`;
      pick(text, `Do not filter by time, ${text}`, () => { wanted.times = null; filter(); });
    }
    showPicked();
    arrange();
  }

  function clear() {
    wanted.words = [];
    wanted.statuses.clear();
    wanted.kind = wanted.times = null;
    byId("search").value = "";
    filter();
  }

  // --- the rows on the screen -------------------------------------------------------------------

  const open = new Map(); // place -> height of the unfolded detail
  const drawn = new Map(); // place -> its elements
  const above = make("tr", { class: "gap", "aria-hidden": "true" }, make("td", { colspan: 8 }));
  const below = above.cloneNode(true);
  let folds = []; // [position, height] of the open ones, in order
  let rowHeight = 0;
  let isDue = false;

  const sizes = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const place = Number(entry.target.dataset.place);
      if (open.has(place) && entry.target.isConnected) open.set(place, entry.target.offsetHeight);
    }
    foldsChanged();
    soon();
  });

  function foldsChanged() {
    folds = [...open].filter(([place]) => where[place] >= 0).map(([place, height]) => [where[place], height]);
    folds.sort((a, b) => a[0] - b[0]);
  }

  function topOf(position) {
    let top = position * rowHeight;
    for (const [at, height] of folds) if (at < position) top += height;
    return top;
  }

  function positionAt(y) {
    let [rest, position] = [y, 0];
    for (const [at, height] of folds) {
      const until = (at + 1 - position) * rowHeight;
      if (rest < until) break;
      rest -= until;
      position = at + 1;
      if (rest < height) return at;
      rest -= height;
    }
    return Math.min(view.length - 1, position + Math.floor(rest / rowHeight));
  }

  function draw() {
    isDue = false;
    const top = rows.getBoundingClientRect().top;
    const first = Math.max(0, positionAt(Math.max(0, -top)) - AROUND);
    const last = Math.min(view.length, positionAt(Math.max(0, innerHeight - top)) + 1 + AROUND);
    const seen = new Set(view.slice(first, last));
    for (const [place, elements] of drawn) {
      if (seen.has(place)) continue;
      elements.forEach((element) => element.remove());
      drawn.delete(place);
    }
    // Elements that stay are not moved, so that they keep the focus.
    let next = above.nextSibling;
    for (const place of seen) {
      const elements = drawn.get(place) || build(place);
      drawn.set(place, elements);
      for (const element of elements) {
        if (element === next) next = next.nextSibling;
        else rows.insertBefore(element, next);
      }
    }
    above.style.height = `${topOf(first)}px`;
    below.style.height = `${topOf(view.length) - topOf(last)}px`;
  }

  function soon() {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(draw);
  }

  function cell(name, ...content) {
    return make("td", { class: name, role: "cell" }, ...content);
  }

  function build(place) {
    const job = jobs[place];
    const isOpen = open.has(place);
    const toggle = make("button", {
      type: "button", class: "toggle", "aria-expanded": isOpen, "aria-label": `Job ${job.n}`,
      "aria-controls": isOpen ? `fold-${place}` : null, tabindex: place === current ? 0 : -1,
    }, plain.format(job.n));
    const row = make("tr", { class: isOpen ? "job open" : "job", role: "row", "aria-rowindex": where[place] + 2, "data-place": place },
      cell("n", toggle),
      cell("status", dot(job.status), word(job.status)),
      cell("prompt", job.key && job.key !== job.prompt ? make("span", { class: "tag" }, job.key) : null, job.prompt),
      cell(job.kind ? "gist failed" : "gist", job.gist || make("span", { class: "none" }, "no answer")),
      cell("num tools", job.tools.length ? plain.format(job.tools.length) : ""),
      cell("num tokens", plain.format(job.tokens)),
      cell("num cost", money(job.cost)),
      cell("num seconds", span(job.seconds)));
    if (!isOpen) return [row];
    const inside = make("div", { class: "detail", "data-place": place, role: "region", "aria-label": `Job ${job.n}` }, ...unfolded(place));
    sizes.observe(inside);
    return [row, make("tr", { class: "fold", role: "row", id: `fold-${place}` }, make("td", { colspan: 8, role: "cell" }, inside))];
  }

  function redraw(place) {
    for (const element of drawn.get(place) || []) element.remove();
    drawn.delete(place);
    foldsChanged();
    draw();
    const [, fold] = drawn.get(place) || [];
    if (!fold) return;
    open.set(place, fold.offsetHeight);
    foldsChanged();
    draw();
  }

  function toggle(place) {
    const hadFocus = rows.contains(document.activeElement);
    if (open.has(place)) open.delete(place);
    else open.set(place, 0);
    redraw(place);
    setCurrent(place, hadFocus);
  }

  // --- the keyboard: Tab reaches one row, the arrow keys reach the others -----------------------

  let current = -1;

  function setCurrent(place, takesFocus) {
    for (const button of rows.querySelectorAll(".toggle")) button.tabIndex = -1;
    current = place;
    const [row] = drawn.get(place) || [rows.querySelector(".job")];
    const button = row && row.querySelector(".toggle");
    if (!button) return;
    button.tabIndex = 0;
    if (takesFocus) button.focus({ preventScroll: true });
  }

  function goTo(position) {
    if (!view.length) return;
    const at = Math.max(0, Math.min(view.length - 1, position));
    const free = bar.offsetHeight + byId("table").tHead.offsetHeight; // covered by the sticky elements
    const top = rows.getBoundingClientRect().top + topOf(at);
    if (top < free) scrollBy(0, top - free);
    else if (top + rowHeight > innerHeight) scrollBy(0, top + rowHeight - innerHeight + 8);
    draw();
    setCurrent(view[at], true);
  }

  function reveal(place) {
    if (where[place] < 0) clear();
    if (!open.has(place)) {
      open.set(place, 0);
      redraw(place);
    }
    const free = bar.offsetHeight + byId("table").tHead.offsetHeight;
    scrollBy(0, rows.getBoundingClientRect().top + topOf(where[place]) - free);
    draw();
    setCurrent(place, true);
  }

  rows.addEventListener("keydown", (event) => {
    if (!event.target.matches(".toggle")) {
      const fold = event.key === "Escape" && event.target.closest(".detail");
      if (fold) {
        toggle(Number(fold.dataset.place));
        setCurrent(Number(fold.dataset.place), true);
      }
      return;
    }
    const position = where[Number(event.target.closest(".job").dataset.place)];
    const page = Math.max(1, Math.floor(innerHeight / rowHeight) - 4);
    const to = { ArrowDown: position + 1, ArrowUp: position - 1, PageDown: position + page, PageUp: position - page, Home: 0, End: view.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    goTo(to);
  });

  rows.addEventListener("click", (event) => {
    const row = event.target.closest(".job");
    if (row && (event.target.closest("button") || getSelection().isCollapsed)) toggle(Number(row.dataset.place));
  });

  // --- what a row unfolds to --------------------------------------------------------------------

  function pre(kind, text) {
    // A long text scrolls, and the keyboard must be able to reach it.
    return make("pre", { class: kind, tabindex: text.length > 1500 ? 0 : null }, text);
  }

  function block(title, text, kind) {
    const copy = make("button", { type: "button", class: "link", "aria-label": `Copy: ${title}` }, "Copy");
    copy.addEventListener("click", () => {
      const told = (note) => { copy.textContent = note; };
      if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => told("Copied"), () => told("Not allowed"));
      else told("Not allowed");
    });
    return make("section", { class: "block" }, make("div", { class: "block-head" }, make("h3", null, title), copy), pre(kind, text));
  }

  function folded(title, fill) {
    const details = make("details", null, make("summary", null, ...title));
    details.addEventListener("toggle", () => {
      if (details.open && details.childElementCount === 1) details.append(fill());
    });
    return details;
  }

  function listed(title, items, more, noun) {
    const list = make("div", { class: "list" }, ...items);
    if (more) list.append(make("p", { class: "more hint" }, `${plain.format(more)} ${noun} more are not on this page.`));
    return make("section", { class: "block" }, make("div", { class: "block-head" }, make("h3", null, title)), list);
  }

  function toolItem(tool) {
    const notes = [tool.exit ? `exit status ${tool.exit}` : tool.failed ? "failed" : "", tool.seconds === null ? "" : span(tool.seconds)];
    const note = notes.filter(Boolean).join(", ");
    return folded([
      make("span", { class: "tool-name" }, tool.name), tool.title || tool.input.slice(0, 120),
      note ? make("span", { class: tool.failed ? "tool-note failed" : "tool-note" }, note) : null,
    ].filter(Boolean), () => make("div", { class: "inside" },
      tool.input ? pre("code", tool.input) : null,
      tool.output ? pre("code", tool.output) : make("p", { class: "hint" }, "No output.")));
  }

  function eventItem(event) {
    const at = event.at === null ? null : make("span", { class: "tool-note" }, `at ${span(Math.max(0, event.at))}`);
    return folded([make("span", { class: "tool-name" }, event.type), at].filter(Boolean), () => make("div", { class: "inside" }, pre("code", event.json)));
  }

  function unfolded(place) {
    const job = jobs[place];
    const detail = detailOf(place);
    if (!detail) return [make("p", { class: "hint" }, "The page is still loading: open this again in a moment.")];
    const facts = [...(job.kind ? [["Error", job.kind]] : []), ...(job.key ? [["Key", job.key]] : []),
      ...(job.from === undefined ? [] : [["Began after", span(job.from)]]),
      ...(detail.denied ? [["Denied", detail.denied.join(", ")]] : []),
      ...(detail.warnings || []).map((text) => ["Warning", text]), ...detail.facts || []];
    const tools = detail.tools || [];
    const events = detail.events || [];
    return [
      make("dl", { class: "facts" }, ...facts.map(([name, value]) => make("div", null, make("dt", null, name), make("dd", null, value)))),
      detail.error ? block("Error", detail.error, "code failure") : null,
      make("div", { class: "pair" },
        detail.prompt ? block("Prompt", detail.prompt, "prose") : null,
        detail.answer ? block("Answer", detail.answer, "prose") : null),
      detail.parsed ? block("Structured output", detail.parsed, "code") : null,
      detail.metadata ? block("Metadata", detail.metadata, "code") : null,
      detail.before ? make("section", { class: "block" }, folded(["Text before the answer"], () => pre("prose", detail.before))) : null,
      detail.stderr ? make("section", { class: "block" }, folded(["Standard error"], () => pre("code", detail.stderr))) : null,
      tools.length ? listed(`Tools (${tools.length + (detail.more_tools || 0)})`, tools.map(toolItem), detail.more_tools, "tools") : null,
      events.length ? make("section", { class: "block" }, folded([`Events (${events.length + (detail.more_events || 0)})`],
        () => listed("", events.map(eventItem), detail.more_events, "events").lastChild)) : null,
      detail.left_out ? make("p", { class: "hint" }, `Tools and events are not here: ${detail.left_out}.`) : null,
    ].filter(Boolean);
  }

  // --- the timeline and the curves under the pointer --------------------------------------------

  const tip = byId("tip");
  const bars = byId("bars");
  const total = bars ? Number(bars.dataset.total) : 0;
  const laneHeight = bars ? Number(bars.dataset.lane) : 0;
  const lanes = [];
  jobs.forEach((job, place) => {
    if (job.lane !== undefined) (lanes[job.lane] ||= []).push(place);
  });
  for (const lane of lanes) if (lane) lane.sort((a, b) => jobs[a].from - jobs[b].from);

  function showTip(event, ...content) {
    tip.replaceChildren(...content);
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const left = Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8));
    const top = event.clientY + height + 24 < innerHeight ? event.clientY + 16 : event.clientY - height - 12;
    tip.style.transform = `translate(${left}px, ${top}px)`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  function timeUnder(event, element) {
    const box = element.getBoundingClientRect();
    return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * total;
  }

  function jobUnder(event) {
    const box = bars.getBoundingClientRect();
    const lane = lanes[Math.floor((event.clientY - box.top) / laneHeight)] || [];
    const time = timeUnder(event, bars);
    let [low, high] = [0, lane.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (jobs[lane[middle]].from <= time) low = middle + 1;
      else high = middle;
    }
    const away = (place) => Math.max(jobs[place].from - time, time - jobs[place].to, 0);
    const near = [lane[low - 1], lane[low]].filter((place) => place !== undefined).sort((a, b) => away(a) - away(b));
    return near.length && away(near[0]) <= (4 / box.width) * total ? near[0] : null;
  }

  function place(rect, from, to) {
    rect.setAttribute("x", (from / total) * 10000);
    rect.setAttribute("width", Math.max(12, ((to - from) / total) * 10000));
    rect.setAttribute("visibility", "visible");
  }

  function showPicked() {
    if (!bars) return;
    if (wanted.times) place(byId("picked"), ...wanted.times);
    else byId("picked").setAttribute("visibility", "hidden");
  }

  if (bars) {
    const mark = byId("mark");
    let pressed = null; // where the button went down
    let isDrag = false;
    bars.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      pressed = event;
      isDrag = false;
      bars.setPointerCapture(event.pointerId);
    });
    bars.addEventListener("pointermove", (event) => {
      if (pressed && (isDrag || Math.abs(event.clientX - pressed.clientX) > 5)) {
        isDrag = true;
        const times = [timeUnder(pressed, bars), timeUnder(event, bars)].sort((a, b) => a - b);
        place(byId("picked"), ...times);
        showTip(event, `${span(times[0])} to ${span(times[1])}`);
        return;
      }
      const found = jobUnder(event);
      mark.setAttribute("visibility", "hidden");
      if (found === null) return hideTip();
      const job = jobs[found];
      place(mark, job.from, job.to);
      mark.setAttribute("y", job.lane * laneHeight);
      showTip(event, make("b", null, `Job ${plain.format(job.n)}, ${word(job.status)}, ${span(job.seconds)}, ${money(job.cost)}`), make("br"), job.prompt.slice(0, 140));
    });
    bars.addEventListener("pointerup", (event) => {
      const start = pressed;
      pressed = null;
      if (!start) return;
      hideTip();
      if (isDrag) {
        wanted.times = [timeUnder(start, bars), timeUnder(event, bars)].sort((a, b) => a - b);
        return filter();
      }
      const found = jobUnder(event);
      if (found !== null) reveal(found);
    });
    const leave = () => {
      pressed = null;
      mark.setAttribute("visibility", "hidden");
      hideTip();
      showPicked();
    };
    bars.addEventListener("pointercancel", leave);
    bars.addEventListener("pointerleave", leave);
  }

  let sums = null; // of cost and tokens, in the order of the jobs' ends

  function sumsUntil(time) {
    if (!sums) {
      let [cost, tokens] = [0, 0];
      sums = jobs.filter((job) => job.to !== undefined).sort((a, b) => a.to - b.to)
        .map((job) => ({ to: job.to, cost: (cost += job.cost), tokens: (tokens += job.tokens) }));
    }
    const n = sums.filter((each) => each.to <= time).length;
    return { n, ...(n ? sums[n - 1] : { cost: 0, tokens: 0 }) };
  }

  for (const curve of document.querySelectorAll(".curve")) {
    const cross = curve.querySelector(".cross");
    curve.addEventListener("pointermove", (event) => {
      const time = timeUnder(event, curve);
      const { n, cost, tokens } = sumsUntil(time);
      for (const name of ["x1", "x2"]) cross.setAttribute(name, `${(100 * time) / total}%`);
      cross.setAttribute("visibility", "visible");
      showTip(event, make("b", null, `After ${span(time)}`), make("br"), `${plain.format(n)} jobs, ${money(cost)}, ${short(tokens)} tokens`);
    });
    curve.addEventListener("pointerleave", () => {
      cross.setAttribute("visibility", "hidden");
      hideTip();
    });
  }

  // --- event listeners --------------------------------------------------------------------------

  for (const button of document.querySelectorAll("th button")) {
    const { by } = button.dataset;
    const usual = ["tools", "tokens", "cost", "seconds"].includes(by) ? -1 : 1;
    button.addEventListener("click", () => sortBy(by, sorting.by === by ? -sorting.sign : usual));
  }
  byId("sort").addEventListener("change", (event) => {
    const by = event.target.value;
    sortBy(by.replace("-", ""), by.startsWith("-") ? -1 : 1);
  });
  for (const chip of document.querySelectorAll("[data-status]")) {
    chip.addEventListener("click", () => {
      const { status } = chip.dataset;
      if (!wanted.statuses.delete(status)) wanted.statuses.add(status);
      filter();
    });
  }
  for (const button of document.querySelectorAll("[data-kind]")) {
    button.addEventListener("click", () => {
      wanted.kind = wanted.kind === button.dataset.kind ? null : button.dataset.kind;
      filter();
      if (wanted.kind !== null) bar.scrollIntoView();
    });
  }
  let typing = 0;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      wanted.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      filter();
    }, 120);
  });
  byId("clear").addEventListener("click", clear);

  function measure() {
    const style = document.documentElement.style;
    style.setProperty("--bar", `${bar.offsetHeight - 1}px`);
    rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    soon();
  }

  rows.append(above, below);
  new ResizeObserver(measure).observe(bar);
  addEventListener("resize", measure);
  addEventListener("scroll", soon, { passive: true });
  measure();
  filter();
  setCurrent(view[0], false);
})();
