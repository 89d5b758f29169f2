"use strict";
// The page's only script: collects a decision, by mouse or keyboard, and sends it. All texts are set as text.

const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const task = byId("task");

async function send(path, body) {
  const answer = await fetch(path, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), credentials: "omit",
  });
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), {status: answer.status});
}

function problem(error) {
  const line = byId("problem");
  line.textContent = error.status ? error.message + "." : "Not saved: the server does not answer. Try again.";
  line.hidden = false;
  line.scrollIntoView({block: "center"});
}

const nonce = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16)).join("-");

function spelled(ranks) {  // "B > A = C"
  const levels = [...new Set(ranks.filter((r) => r !== null))].sort();
  return levels.map((level) => ranks.map((r, i) => (r === level ? "ABCD"[i] : "")).filter(Boolean).join(" = ")).join(" > ");
}

async function undo(button) {
  const {item, version} = button.dataset;
  button.disabled = true;
  try {
    await send("undo", {item, version: Number(version), key: nonce()});
    location.href = (task?.dataset.kind === "resolve" ? "settle" : "./") + "?item=" + item;
  } catch (error) { problem(error); }
}

all("[data-undo], #undo").forEach((button) => button.addEventListener("click", () => undo(button)));
all("[data-open]").forEach((b) => b.addEventListener("click", () => byId(b.dataset.open).showModal()));
all("[data-close]").forEach((b) => b.addEventListener("click", () => b.closest("dialog").close()));
if (task) {
  if ("unread" in task.dataset) byId("guide").showModal();
  const decide = task.dataset.item ? decision() : null;
  document.addEventListener("keydown", (event) => keydown(event, decide));
}

function keydown(event, decide) {
  const writing = event.target.matches("textarea, input[type=text]");
  const foreign = event.key.length === 1 && event.key > "~" && /^Key[A-Z]$/.test(event.code);  // another alphabet
  const key = (foreign ? event.code[3] : event.key).toLowerCase();
  if ((event.ctrlKey || event.metaKey) && key === "s") {
    event.preventDefault();
    decide?.save();
  } else if (writing && event.key === "Escape") {
    event.target.closest("article").querySelector(".text").focus();
  } else if (!(writing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]"))) {
    const button = event.target.matches("button, a, summary");
    if (key === "g" && byId("guide")) byId("guide").showModal();
    else if (key === "?") byId("keys").showModal();
    else if (key === "u" && byId("undo")) byId("undo").click();
    else if (!decide || (button && ["enter", " "].includes(key)) || !decide.key(key, event)) return;
    event.preventDefault();
  }
}

function decision() {
  const count = Number(task.dataset.count), cards = all(".answer"), submit = byId("submit");
  const state = {choice: "", ranks: Array(count).fill(null), ratings: {}, edits: {}, flags: {}};
  const originals = {}, key = nonce();
  let current = 0, timer = 0, changed = false, chosen = false, spent = 0, since = performance.now();

  const top = () => Math.max(0, ...state.ranks);
  const rated = () => Object.values(state.ratings).some((values) => values.some((v) => v !== null));
  const complete = () => ["bad", "skip"].includes(state.choice) || state.ranks.filter((r) => r !== null).length > 1
    || rated() || Object.keys(state.edits).length > 0 || Object.keys(state.flags).length > 0;

  function body() {
    const ms = Math.round(spent + (document.hidden ? 0 : performance.now() - since));
    return {...state, choice: state.choice || "ranks", ms, key, item: task.dataset.item,
      version: Number(task.dataset.version), guidelines: Number(task.dataset.guidelines)};
  }

  function draw() {
    const ranked = state.choice === "ranks", ranks = state.ranks, equal = new Set(ranks).size === 1;
    cards.forEach((card, i) => {
      card.classList.toggle("best", ranked && ranks[i] === 1 && !(count === 2 && equal));
      card.classList.toggle("bad", state.choice === "bad");
      all(".rank input", card).forEach((r) => { r.checked = ranked && Number(r.value) === ranks[i]; });
    });
    const pressed = {
      pick: (b) => ranked && !equal && ranks[b.dataset.place] === 1, tie: () => ranked && equal && ranks[0] !== null,
      bad: () => state.choice === "bad", skip: () => state.choice === "skip",
    };
    all(".bar [aria-pressed]").forEach((b) => b.setAttribute("aria-pressed", pressed[b.dataset.do](b)));
    if (byId("order")) byId("order").textContent = ranked ? spelled(ranks) : "";
    submit.disabled = !complete();
  }

  function change() {
    changed = true;
    draw();
    clearTimeout(timer);
    timer = setTimeout(save, 700);
  }

  // A second time the same choice submits, for two answers as for ties, all bad and skip; a restored one is none yet.
  function choose(choice, ranks) {
    const same = chosen && state.choice === choice && String(state.ranks) === String(ranks);
    if (same) return finish();
    chosen = true;
    Object.assign(state, {choice, ranks});
    change();
  }

  function pick(place, tied) {
    current = place;
    if (count === 2) return choose("ranks", place === 0 ? [1, 2] : [2, 1]);
    const ranks = state.choice === "ranks" ? [...state.ranks] : Array(count).fill(null);
    const best = Math.max(0, ...ranks);
    ranks[place] = ranks[place] !== null ? null : tied && best ? best : best + 1;
    const levels = [...new Set(ranks.filter((r) => r !== null))].sort();
    Object.assign(state, {choice: levels.length ? "ranks" : "", ranks: ranks.map((r) => (r === null ? null : levels.indexOf(r) + 1))});
    change();
  }

  const does = {
    pick: (button) => pick(Number(button.dataset.place)),
    tie: () => choose("ranks", Array(count).fill(1)),
    rest: () => {
      if (!top()) return;
      const next = top() + 1;
      state.ranks = state.ranks.map((r) => r ?? next);
      change();
    },
    bad: () => choose("bad", Array(count).fill(null)),
    skip: () => choose("skip", Array(count).fill(null)),
    edit: (button) => toggle(button, "edit"),
    flag: (button) => toggle(button, "flag"),
  };

  async function toggle(button, kind) {
    const card = button.closest("article"), place = (current = Number(card.dataset.place)), part = card.querySelector("." + kind);
    const field = part.querySelector("textarea, input"), store = kind === "edit" ? state.edits : state.flags;
    if (!part.hidden && !store[place]) {
      part.hidden = true;
    } else {
      part.hidden = false;
      if (kind === "edit") await original(place, field);
      field.focus();
    }
    button.setAttribute("aria-expanded", String(!part.hidden));
  }

  async function original(place, field) {
    if (place in originals) return;
    const answer = await fetch("answer?item=" + task.dataset.item + "&place=" + place);
    const text = await answer.text();
    if (text.length > 1e5) field.wrap = "off";  // lines are not broken: that takes seconds
    field.value = text;
    originals[place] = field.value;  // as the field writes line ends
    if (place in state.edits) field.value = state.edits[place];
    compare(cards[place], originals[place], field.value);
  }

  cards.forEach((card, place) => {
    card.addEventListener("focusin", () => { current = place; });
    card.querySelector("textarea").addEventListener("input", (event) => {
      const text = event.target.value;
      if (text === originals[place]) delete state.edits[place];
      else state.edits[place] = text;
      compare(card, originals[place], text);
      change();
    });
    card.querySelector(".flag input").addEventListener("input", (event) => {
      if (event.target.value.trim()) state.flags[place] = event.target.value;
      else delete state.flags[place];
      change();
    });
    all(".rank input", card).forEach((r) => r.addEventListener("change", () => {
      if (state.choice !== "ranks") state.ranks = Array(count).fill(null);
      state.choice = "ranks";
      state.ranks[place] = Number(r.value);
      change();
    }));
    all(".rating input", card).forEach((r) => r.addEventListener("change", () => rate(r, place)));
  });

  function rate(radio, place) {
    const aspect = radio.closest("fieldset").dataset.aspect;
    state.ratings[aspect] ??= Array(count).fill(null);
    state.ratings[aspect][place] = Number(radio.value);
    change();
  }

  all("[data-do]").forEach((b) => b.addEventListener("click", () => does[b.dataset.do](b)));
  submit.addEventListener("click", finish);

  async function save() {
    if (!changed) return;
    changed = false;
    try {
      await send("draft", body());
      byId("saved").textContent = "Draft saved";
    } catch (error) { if (error.status) problem(error); }
  }

  async function finish() {
    if (!complete() || submit.dataset.busy) return;
    submit.dataset.busy = "true";
    clearTimeout(timer);
    changed = false;
    try {
      await send("vote", body());
      location.href = task.dataset.kind === "resolve" ? "settle" : "./";
    } catch (error) {
      delete submit.dataset.busy;
      problem(error);
    }
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) spent += performance.now() - since;
    else since = performance.now();
  });
  addEventListener("pagehide", () => {
    if (changed) fetch("draft", {method: "POST", keepalive: true, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body())});
  });

  function keyed(key, event) {
    const ratings = all(".rating"), set = event.target.closest?.(".pills");
    const radio = set?.querySelector(`input[value="${CSS.escape(key)}"]`);
    if (radio) {  // a digit ranks or rates, and then the next aspect has the focus
      radio.click();
      if (set.matches(".rating")) ratings[ratings.indexOf(set) + 1]?.querySelector("input:checked, input").focus();
      return true;
    }
    const place = "abcd".indexOf(key) >= 0 ? "abcd".indexOf(key) : "1234".indexOf(key);
    const act = {t: "tie", r: "rest", x: "bad", s: "skip"}[key];
    if (place >= 0 && place < count) pick(place, event.shiftKey);
    else if (act && document.querySelector(`.bar [data-do="${act}"]`)) does[act]();
    else if (key === "e" || key === "f") cards[current].querySelector(key === "e" ? "[data-do=edit]" : "[data-do=flag]").click();
    else if (key === "v" && ratings.length) ratings[0].querySelector("input:checked, input").focus();
    else if (key === "enter") finish();
    else return false;
    return true;
  }

  function restore(draft) {
    if (!draft) return draw();
    const judged = draft.choice !== "ranks" || draft.ranks.some((r) => r !== null);
    Object.assign(state, {choice: judged ? draft.choice : "", ranks: draft.ranks, ratings: draft.ratings, edits: draft.edits, flags: draft.flags});
    ratedAs(draft.ratings);
    for (const [place, text] of Object.entries(draft.flags)) {
      cards[place].querySelector(".flag").hidden = false;
      cards[place].querySelector(".flag input").value = text;
    }
    for (const place of Object.keys(draft.edits)) {
      cards[place].querySelector(".edit").hidden = false;
      original(Number(place), cards[place].querySelector("textarea"));
    }
    byId("saved").textContent = "Draft restored";
    draw();
  }

  function ratedAs(ratings) {
    all(".rating").forEach((set) => {
      const value = ratings[set.dataset.aspect]?.[set.closest("article").dataset.place];
      if (value) set.querySelector(`input[value="${value}"]`).checked = true;
    });
  }

  restore(JSON.parse(byId("draft").textContent));
  return {key: keyed, save};
}

// --- the visible difference of two texts, word by word ---

function compare(card, before, after) {
  const out = card.querySelector(".diff"), tags = {"-": "del", "+": "ins"};
  out.replaceChildren(...difference(before, after).map(([kind, whole]) => {
    const most = kind === " " ? 400 : 4000, half = most / 2;
    const text = whole.length > most ? whole.slice(0, half) + " … " + whole.slice(-half) : whole;
    const node = document.createElement(tags[kind] ?? "span");
    node.textContent = text.replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (c) => "‹U+" + c.codePointAt(0).toString(16).toUpperCase() + "›");
    return node;
  }));
}

function difference(before, after) {
  const a = before.match(/\s+|[^\s]+/g) ?? [], b = after.match(/\s+|[^\s]+/g) ?? [];
  let start = 0, end = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  while (end < Math.min(a.length, b.length) - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const left = a.slice(start, a.length - end), right = b.slice(start, b.length - end);
  const out = [[" ", a.slice(0, start).join("")], ...middle(left, right), [" ", a.slice(a.length - end).join("")]];
  return out.filter(([, text]) => text);
}

// The longest common subsequence; of very long changes only the outline is shown.
function middle(a, b) {
  if (a.length * b.length > 4e6) return [["-", a.join("")], ["+", b.join("")]];
  const width = b.length + 1, best = new Uint32Array((a.length + 1) * width), out = [];
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      best[i * width + j] = a[i] === b[j] ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { out.push([" ", a[i++]]); j++; }
    else if (j === b.length || (i < a.length && best[(i + 1) * width + j] >= best[i * width + j + 1])) out.push(["-", a[i++]]);
    else out.push(["+", b[j++]]);
  }
  return out;
}
