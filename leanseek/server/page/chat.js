// The chat page: the conversation is kept in this browser and sent whole with each message.

import { copyButton, element, icon, renderMarkdown } from "./markdown.js";
import { getJson, streamChat } from "./stream.js";

const by = (id) => document.getElementById(id);
const form = by("settings").querySelector("form");
const settings = load("leanseek.settings", {});
let messages = load("leanseek.messages", []); // {role, content, reasoning?, seconds?, problem?}
let model = null;
let answering = null; // AbortController of the answer being written

function load(key, otherwise) {
  try { return JSON.parse(localStorage.getItem(key)) ?? otherwise; } catch { return otherwise; }
}

function save() {
  try {
    localStorage.setItem("leanseek.messages", JSON.stringify(messages));
    localStorage.setItem("leanseek.settings", JSON.stringify(settings));
  } catch { /* storage is full or forbidden: the page works without it */ }
}

// ---- the conversation on the page ----

function show() {
  by("empty").hidden = messages.length > 0;
  by("log").hidden = messages.length === 0;
  by("log").replaceChildren(...messages.map((message) => turn(message).node));
  by("log").lastElementChild?.classList.add("last");
  const last = messages.at(-1);
  if (last?.role === "assistant" && !answering) addActions(by("log").lastElementChild, last);
  toEnd(true);
}

/** A message's node, and a function that updates it from the message. */
function turn(message) {
  if (message.role === "user") {
    return { node: element("article", { className: "turn user", ariaLabel: "You" }, element("div", { className: "said" }, message.content)) };
  }
  const thought = element("div", { className: "thought markdown" });
  const summary = element("span");
  const reasoning = element("details", { className: "reasoning" }, element("summary", {}, icon("fold"), summary), thought);
  const said = element("div", { className: "said markdown" });
  const waiting = element("span", { className: "waiting", ariaLabel: "Waiting for the first token", role: "img" });
  const problem = element("p", { className: "problem" });
  problem.setAttribute("role", "alert");
  const node = element("article", { className: "turn assistant", ariaLabel: "Answer" }, reasoning, said, waiting, problem);
  const update = () => {
    reasoning.hidden = !message.reasoning;
    if (message.reasoning) {
      renderMarkdown(thought, message.reasoning);
      const seconds = message.seconds === undefined ? "" : ` for ${message.seconds.toFixed(1)} s`;
      summary.textContent = message.content || message.done ? `Thought${seconds}` : "Thinking";
    }
    renderMarkdown(said, message.content);
    waiting.hidden = Boolean(message.done || message.content);
    problem.hidden = !message.problem;
    problem.textContent = message.problem ?? "";
  };
  update();
  return { node, update };
}

function addActions(node, message) {
  const again = element("button", { type: "button", className: "icon", id: "again", ariaLabel: "Regenerate", title: "Regenerate" }, icon("again"));
  again.addEventListener("click", () => { messages.pop(); answer(); });
  const note = message.stopped ? [element("span", {}, "Stopped")] : message.cut ? [element("span", {}, "Reached the token limit")] : [];
  node.append(element("div", { className: "actions" }, copyButton("Copy answer", () => message.content), again, ...note));
}

/** Scroll to the end if the reader is already there. */
function toEnd(always = false) {
  const scroll = by("scroll");
  if (always || scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120) scroll.scrollTop = scroll.scrollHeight;
}

// ---- requests ----

function ask(text) {
  messages.push({ role: "user", content: text });
  answer();
}

async function answer() {
  const message = { role: "assistant", content: "", reasoning: "" };
  const body = request();
  messages.push(message);
  answering = new AbortController();
  setAnswering(true);
  show();
  const { node, update } = turn(message);
  by("log").lastElementChild.replaceWith(node);
  let frame = 0;
  const draw = () => { frame = 0; update(); toEnd(); };
  const clock = new Clock();
  const polling = setInterval(pollCache, 1000);
  try {
    for await (const chunk of streamChat(body, settings.key, answering.signal)) {
      take(chunk, message, clock);
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else fail(message, error);
  } finally {
    clearInterval(polling);
    cancelAnimationFrame(frame);
    answering = null;
    message.done = true;
    setAnswering(false);
    save();
    show();
    pollCache();
    by("announce").textContent = message.problem ?? message.content.slice(0, 2000);
  }
}

function request() {
  const said = messages.filter((message) => !message.problem && (message.content || message.role === "user"));
  const body = { model: model?.id, messages: said.map(({ role, content }) => ({ role, content })) };
  if (settings.system?.trim()) body.messages.unshift({ role: "system", content: settings.system });
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (settings[name] !== undefined && settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (model?.thinking_switch) body.chat_template_kwargs = { thinking: Boolean(settings.thinking) };
  return body;
}

function take(chunk, message, clock) {
  const choice = chunk.choices[0];
  const reasoning = choice?.delta.reasoning_content ?? "";
  const content = choice?.delta.content ?? "";
  if (reasoning || content) clock.token();
  if (content && message.reasoning && !message.content) message.seconds = clock.sinceFirst();
  message.reasoning += reasoning;
  message.content += content;
  message.cut ||= choice?.finish_reason === "length";
  if (chunk.usage) clock.usage(chunk.usage);
}

function fail(message, error) {
  message.problem = error instanceof TypeError ? "The server cannot be reached." : error.message;
  if (error.status === 401) by("settings").showModal();
}

// ---- figures ----

class Clock {
  constructor() {
    this.sent = performance.now();
    this.first = null;
    for (const id of ["speed", "first", "mtp"]) by(id).textContent = "–";
  }

  sinceFirst() { return (performance.now() - this.first) / 1000; }

  token() {
    if (this.first !== null) return;
    this.first = performance.now();
    by("first").textContent = `${((this.first - this.sent) / 1000).toFixed(2)} s`;
  }

  usage(usage) {
    if (this.first === null) return;
    if (usage.completion_tokens > 1) by("speed").textContent = `${((usage.completion_tokens - 1) / this.sinceFirst()).toFixed(1)} tok/s`;
    const { accepted_prediction_tokens: right, rejected_prediction_tokens: wrong } = usage.completion_tokens_details;
    if (right + wrong > 0) by("mtp").textContent = `${Math.round((100 * right) / (right + wrong))} %`;
  }
}

async function pollCache() {
  try {
    const health = await getJson("health");
    by("cache").textContent = `${(100 * health.cache_usage).toFixed(health.cache_usage < 0.1 ? 1 : 0)} %`;
  } catch { by("cache").textContent = "–"; }
}

// ---- controls ----

function setAnswering(on) {
  by("send").setAttribute("aria-label", on ? "Stop" : "Send");
  by("send").replaceChildren(icon(on ? "stop" : "send"));
  refreshComposer();
}

function refreshComposer() {
  const input = by("input");
  by("send").disabled = !answering && !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

by("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("input").value.trim();
  if (answering) answering.abort();
  else if (text) {
    by("input").value = "";
    ask(text);
  }
  refreshComposer();
});

by("input").addEventListener("input", refreshComposer);
by("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!answering) by("composer").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !by("settings").open) answering?.abort();
});

by("new").addEventListener("click", () => {
  answering?.abort();
  messages = [];
  save();
  show();
  by("input").focus();
});

by("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true));

function setTheme(theme, keep) {
  document.documentElement.dataset.theme = theme;
  if (keep) { settings.theme = theme; save(); }
}

by("open-settings").addEventListener("click", () => by("settings").showModal());
by("settings").addEventListener("click", (event) => { if (event.target === by("settings")) by("settings").close(); });
by("settings").addEventListener("close", connect);
form.addEventListener("input", () => {
  for (const field of form.elements) {
    if (field.name) settings[field.name] = field.type === "checkbox" ? field.checked : field.value;
  }
  save();
});

function fillSettings() {
  for (const field of form.elements) {
    if (!field.name || settings[field.name] === undefined) continue;
    if (field.type === "checkbox") field.checked = settings[field.name];
    else field.value = settings[field.name];
  }
}

// ---- start ----

async function connect() {
  try {
    model = (await getJson("v1/models", settings.key)).data[0];
    by("model").textContent = model.id;
    document.title = `${model.id} · leanseek`;
    by("about").textContent = `${model.id}, ${model.max_model_len.toLocaleString("en")} tokens of context`;
    by("thinking-field").hidden = !model.thinking_switch;
  } catch (error) {
    by("about").textContent = error.status === 401 ? "This server needs an API key: see the settings." : error.message;
  }
}

const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(settings.theme ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => { if (!settings.theme) setTheme(dark.matches ? "dark" : "light"); });
for (const message of messages) message.done = true; // leaving the page may have cut an answer off
fillSettings();
show();
setAnswering(false);
connect();
pollCache();
