// The token microscope.  Everything that a model wrote reaches the page as text nodes only.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const SOLVED = 0.5;

// ---- small helpers ---------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Characters that would be invisible, or would turn around the text after them, are shown by name.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u202a-\u202e\u2028\u2029\u2060-\u206f\ufeff]/g;
const named = (c) => "‹U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "›";

const visible = (text) => text.replace(HIDDEN, named);
const inFlow = (piece) => (piece === "" ? "⋯" : visible(piece).replace(/\t/g, "⇥\t").replace(/\n/g, "↵\n"));
const quoted = (piece) =>
  piece === "" ? "part of a character" : "“" + visible(piece).replace(/\n/g, "↵").replace(/\t/g, "⇥") + "”";

function short(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  return size !== 0 && size < 0.0005 ? "0.000" : x.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1).replace("-", "−");
}

const trimmed = (x) => short(x).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");

function percent(logprob) {
  if (logprob === null || logprob === undefined) return "–";
  const p = 100 * Math.exp(logprob);
  return (p >= 99.95 ? "100" : p >= 9.95 ? p.toFixed(1) : p >= 0.095 ? p.toFixed(2) : p >= 0.001 ? p.toFixed(3) : "<0.001") + " %";
}

// ---- what is shown ---------------------------------------------------------------------------------------------

let rollout = null;
let signal = null;
let place = 0;

function fillRollouts() {
  const which = at("which").value;
  const fits = (r) => which === "all" || (which === "solved") === (r.reward >= SOLVED);
  const groups = data.runs.map((run) => element("optgroup", { label: run.label }));
  data.rollouts.forEach((r, i) => {
    if (!fits(r)) return;
    const reward = r.reward === null ? "no reward" : "reward " + trimmed(r.reward);
    const label = `step ${r.step} · ${visible(r.id).slice(0, 40)} · ${reward}`;
    groups[r.run].append(element("option", { value: i }, label));
  });
  at("rollout").replaceChildren(...groups.filter((g) => g.childElementCount));
  const any = at("rollout").options.length > 0;
  for (const id of ["previous", "next"]) at(id).disabled = !any;
  if (any) choose(Number(at("rollout").value));
  else nothing();
}

function nothing() {
  rollout = null;
  for (const id of ["tokens", "details", "facts", "prompts", "marks"]) at(id).replaceChildren();
  at("tokens").textContent = "No such rollout was recorded.";
}

function choose(number) {
  rollout = data.rollouts[number];
  at("rollout").value = String(number);
  place = 0;
  fillSignals();
  showFacts();
  showTokens();
  showPrompts();
  showDetails(0);
}

function move(by) {
  const options = at("rollout").options;
  if (!options.length) return;
  const wanted = (at("rollout").selectedIndex + by + options.length) % options.length;
  choose(Number(options[wanted].value));
}

function fillSignals() {
  const names = Object.keys(data.signals).filter((name) => rollout.signals[name]);
  if (!names.includes(signal)) signal = names[0] ?? null;
  at("signal").replaceChildren(
    ...names.map((name) => element("option", { value: name }, visible(data.signals[name].label))));
  if (signal) at("signal").value = signal;
}

function showFacts() {
  const run = data.runs[rollout.run];
  const mean = rollout.rewards.reduce((a, b) => a + b, 0) / Math.max(rollout.rewards.length, 1);
  const facts = [
    ["run", run.label],
    ["step", String(rollout.step)],
    ["example", rollout.id],
    ["reward", trimmed(rollout.reward)],
    ["its group", `mean reward ${trimmed(mean)} of ${rollout.rewards.length}`],
    ["length", `${rollout.ids.length} token${rollout.ids.length === 1 ? "" : "s"}, ${rollout.finished ? "ended by itself" : "cut by the limit"}`],
    ["hedges", `${rollout.hedges.length} tokens`],
  ];
  if (rollout.feedback) facts.push(["feedback", rollout.feedback]);
  for (const [name, value] of Object.entries(rollout.facts)) facts.push([name, String(value)]);
  if (run.after !== null) facts.push(["scored by", `the parameters saved after step ${run.after}`]);
  at("facts").replaceChildren(
    ...facts.map(([name, value]) =>
      element("div", {}, element("dt", {}, visible(name)), element("dd", { dir: "auto" }, visible(value)))));
}

// ---- tokens ----------------------------------------------------------------------------------------------------

function showTokens() {
  const spans = rollout.ids.map((_, i) => {
    const made = element("span", { class: "t", role: "option", tabindex: i === place ? "0" : "-1", "data-i": i },
      inFlow(rollout.pieces[i]));
    return made;
  });
  for (const i of rollout.skipped) spans[i].classList.add("skipped");
  for (const i of rollout.hedges) spans[i].classList.add("hedge");
  for (const mask of Object.values(rollout.spans)) mask.forEach((on, i) => on && spans[i].classList.add("marked"));
  rollout.pieces.forEach((piece, i) => {
    if (piece === "") spans[i].classList.add("part");
    if (piece.endsWith("\n")) spans[i].classList.add("ends-line");
  });
  at("tokens").replaceChildren(...spans);
  if (!spans.length) at("tokens").textContent = "The completion is empty.";
  paint();
  showMarks();
}

function paint() {
  const values = signal ? rollout.signals[signal] : [];
  const { signed, most, label, about } = signal ? data.signals[signal] : { label: "", about: "" };
  for (const token of at("tokens").children) {
    const i = Number(token.dataset.i);
    const value = values[i] ?? null;
    const strength = value === null ? 0 : Math.min(1, Math.sqrt(Math.abs(value) / most));
    token.style.setProperty("--a", strength.toFixed(3));
    token.classList.toggle("pos", value > 0);
    token.classList.toggle("neg", value < 0);
    token.dataset.v = short(value);
    token.setAttribute("aria-label", `${quoted(rollout.pieces[i])}, ${visible(label)} ${short(value)}`);
  }
  at("about").textContent = signal ? `${visible(label)}: ${visible(about)}.` : "This run recorded no numbers per token.";
  showScale(signal ? [signed, most] : null);
}

function showScale(of) {
  if (!of) return at("scale").replaceChildren();
  const [signed, most] = of;
  const values = rollout.signals[signal];
  const ends = signed ? [-1, 1] : values.some((x) => x < 0) ? [-1, 0] : [0, 1];
  const steps = Array.from({ length: 13 }, (_, i) => ends[0] + ((ends[1] - ends[0]) * i) / 12);
  const cells = steps.map((s) => {
    const cell = element("i", { class: s > 0 ? "pos" : s < 0 ? "neg" : "" });
    cell.style.setProperty("--a", Math.sqrt(Math.abs(s)).toFixed(3));
    return cell;
  });
  const bound = (s) => (s === 0 ? "0" : (s < 0 ? "≤ " : "≥ ") + short(s * most));
  at("scale").replaceChildren(element("span", {}, bound(ends[0])), element("span", { class: "cells" }, ...cells),
    element("span", {}, bound(ends[1])));
}

function showMarks() {
  const marks = [];
  if (rollout.hedges.length) marks.push(element("span", { class: "t hedge" }, "hedge"), " an epistemic word   ");
  const spans = Object.keys(rollout.spans);
  if (spans.length) marks.push(element("span", { class: "t marked" }, "span"), ` marked: ${visible(spans.join(", "))}   `);
  if (rollout.skipped.length) marks.push(element("span", { class: "t skipped" }, "hatched"), " kept out of the loss   ");
  if (rollout.pieces.includes("")) marks.push(element("span", { class: "t" }, "⋯"), " part of the character after it");
  at("marks").replaceChildren(...marks);
}

function showDetails(i) {
  place = i;
  for (const token of at("tokens").querySelectorAll("[aria-selected]")) token.removeAttribute("aria-selected");
  const token = at("tokens").children[i];
  if (!token) return at("details").replaceChildren();
  for (const other of at("tokens").querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  token.tabIndex = 0;
  token.setAttribute("aria-selected", "true");
  const value = (name) => (rollout.signals[name] ? rollout.signals[name][i] : undefined);
  const parts = [
    element("p", { class: "piece", dir: "auto" }, quoted(rollout.pieces[i])),
    element("p", { class: "sub" }, `token ${i + 1} of ${rollout.ids.length}, id ${rollout.ids[i]}` + marksOf(i)),
    probabilities([["student", value("student")], ["teacher", value("teacher")], ["when sampled", value("recorded")]]),
    alternatives(i),
    otherSignals(i),
  ];
  at("details").replaceChildren(...parts.filter(Boolean));
}

function marksOf(i) {
  const marks = [];
  if (rollout.hedges.includes(i)) marks.push("hedge");
  for (const [name, mask] of Object.entries(rollout.spans)) if (mask[i]) marks.push(visible(name));
  if (rollout.skipped.includes(i)) marks.push("kept out of the loss");
  return marks.length ? " · " + marks.join(", ") : "";
}

function probabilities(named) {
  const rows = named.filter(([, x]) => x !== undefined && x !== null);
  return element("div", { class: "chances" }, ...rows.map(([name, x]) => {
    const bar = element("span", { class: "bar" });
    bar.style.setProperty("--p", Math.exp(x).toFixed(4));
    return element("div", {}, element("span", {}, name), bar, element("b", {}, percent(x)));
  }));
}

function alternatives(i) {
  const some = rollout.alternatives && rollout.alternatives[i];
  if (!some) return null;
  const told = some.some((a) => a[2] !== null);
  const head = ["likeliest next", "student", ...(told ? ["teacher"] : [])];
  const rows = some.map(([word, student, teacher, taken]) => {
    const text = quoted(data.vocabulary[word]);
    const cells = [percent(student), ...(told ? [percent(teacher)] : [])];
    return element("tr", taken ? { class: "taken" } : {},
      element("th", { scope: "row", dir: "auto" }, (taken ? "● " : "") + text), ...cells.map((c) => element("td", {}, c)));
  });
  return element("table", { class: "alternatives" },
    element("thead", {}, element("tr", {}, ...head.map((h) => element("th", { scope: "col" }, h)))),
    element("tbody", {}, ...rows));
}

function otherSignals(i) {
  const spared = ["student", "teacher", "recorded"];
  const names = Object.keys(data.signals).filter((name) => rollout.signals[name] && !spared.includes(name));
  return element("dl", { class: "signals" }, ...names.flatMap((name) => [
    element("dt", name === signal ? { class: "current" } : {}, visible(data.signals[name].label)),
    element("dd", {}, short(rollout.signals[name][i])),
  ]));
}

// ---- prompts ---------------------------------------------------------------------------------------------------

function showPrompts() {
  const order = ["student", "teacher"];
  const rank = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  const names = Object.keys(rollout.chats).sort((a, b) => rank(a) - rank(b));
  at("prompts").replaceChildren(...names.map((name) => {
    const number = rollout.chats[name];
    const turns = number === null ? [element("p", { class: "none" }, "nothing: this view has nothing to say about this rollout")]
      : data.chats[number].map(turn);
    return element("section", {}, element("h3", {}, `What the ${visible(name)} reads`), ...turns);
  }));
}

function turn(message) {
  const body = element("div", { class: "said", dir: "auto" });
  const secret = message.privileged ? message.content.lastIndexOf(message.privileged) : -1;
  if (secret < 0) body.append(visible(message.content));
  else {
    const end = secret + message.privileged.length;
    body.append(visible(message.content.slice(0, secret)),
      element("mark", { title: "privileged: only this view reads it" }, visible(message.content.slice(secret, end))),
      visible(message.content.slice(end)));
  }
  return element("div", { class: "turn" }, element("p", { class: "role" }, visible(message.role)), body);
}

// ---- hands and keys --------------------------------------------------------------------------------------------

const tokenOf = (event) => event.target instanceof Element && event.target.closest("#tokens .t");

// The token nearest above or below, by what is on the screen: lines differ with the window.
function vertical(from, direction) {
  const box = from.getBoundingClientRect();
  let best = null;
  for (const other of at("tokens").children) {
    const b = other.getBoundingClientRect();
    const rise = (b.top - box.top) * direction;
    if (rise < box.height / 2) continue;
    const cost = rise * 1000 + Math.abs(b.left - box.left);
    if (!best || cost < best.cost) best = { cost, other };
  }
  return best && best.other;
}

// Browsers report a move, too, when the page scrolls under a pointer at rest: the token chosen by key would be lost.
let pointer = "";

function onPoint(event) {
  const now = `${event.clientX},${event.clientY}`;
  const token = tokenOf(event);
  if (token && now !== pointer && Number(token.dataset.i) !== place) showDetails(Number(token.dataset.i));
  pointer = now;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const token = tokenOf(event);
  if (!token) return;
  const i = Number(token.dataset.i);
  const rightToLeft = getComputedStyle(at("tokens")).direction === "rtl";
  const forward = rightToLeft ? -1 : 1;
  const tokens = at("tokens").children;
  const wanted = {
    ArrowRight: () => tokens[i + forward], ArrowLeft: () => tokens[i - forward],
    ArrowDown: () => vertical(token, 1), ArrowUp: () => vertical(token, -1),
    Home: () => tokens[0], End: () => tokens[tokens.length - 1],
  }[event.key];
  if (wanted) {
    event.preventDefault();
    const other = wanted();
    if (other) other.focus();
  } else if (event.key === "n" || event.key === "p") {
    move(event.key === "n" ? 1 : -1);
    if (at("tokens").firstElementChild) at("tokens").firstElementChild.focus();
  }
}

at("tokens").addEventListener("pointermove", onPoint);
at("tokens").addEventListener("focusin", (e) => { const t = tokenOf(e); if (t) showDetails(Number(t.dataset.i)); });
at("tokens").addEventListener("click", (e) => { const t = tokenOf(e); if (t) t.focus(); });
at("tokens").addEventListener("keydown", onKey);
at("rollout").addEventListener("change", () => choose(Number(at("rollout").value)));
at("which").addEventListener("change", fillRollouts);
at("signal").addEventListener("change", () => { signal = at("signal").value; paint(); showDetails(place); });
at("values").addEventListener("change", () => at("tokens").classList.toggle("values", at("values").checked));
at("previous").addEventListener("click", () => move(-1));
at("next").addEventListener("click", () => move(1));

at("microscope").hidden = false;
fillRollouts();
