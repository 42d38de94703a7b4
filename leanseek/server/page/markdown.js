// Turns Markdown into DOM nodes. Text becomes text nodes, never HTML; links may be http(s) and mailto only.

const MAX_DEPTH = 8; // of nested quotes and lists
const SAFE = new Set(["http:", "https:", "mailto:"]);

/** Make `container` show `text`. Unchanged blocks keep their nodes, so updating a growing text is cheap. */
export function renderMarkdown(container, text) {
  const blocks = parseBlocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
  blocks.forEach((block, place) => {
    const old = container.children[place];
    if (old && old.markdownSource === block.source) return;
    const node = block.build();
    node.markdownSource = block.source;
    if (old) old.replaceWith(node);
    else container.append(node);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function copyButton(label, text) {
  const button = element("button", { type: "button", className: "icon", ariaLabel: label, title: label }, icon("copy"));
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    button.title = "Copied";
    setTimeout(() => { button.title = label; }, 1500);
  });
  return button;
}

// ---- blocks ----

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** The blocks in the lines, each with its source and a function that builds its node. */
function parseBlocks(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) { at += 1; continue; }
    const [length, build] = nextBlock(lines, at, depth);
    blocks.push({ source: lines.slice(at, at + length).join("\n"), build });
    at += length;
  }
  return blocks;
}

function nextBlock(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return fence(lines, at, match[1], match[2]);
  if ((match = HEADING.exec(line))) {
    const [, marks, title] = match;
    return [1, () => element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(title))];
  }
  if (RULE.test(line)) return [1, () => element("hr")];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) return table(lines, at);
  return paragraph(lines, at, depth);
}

function startsBlock(lines, at, depth) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || (depth < MAX_DEPTH && (QUOTE.test(line) || ITEM.test(line)));
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end, depth)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [end - at, () => element("p", {}, ...inline(text))];
}

function fence(lines, at, mark, language) {
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).join("\n");
  const build = () => element("div", { className: "code" },
    element("div", { className: "bar" }, element("span", {}, language || "text"), copyButton("Copy code", () => text)),
    element("pre", { tabIndex: 0 }, element("code", {}, text)));
  return [Math.min(end + 1, lines.length) - at, build];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [end - at, () => element("blockquote", {}, ...parseBlocks(inner, depth + 1).map((block) => block.build()))];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const marker = ITEM.exec(lines[end]);
    if (!marker || marker[1].length > first[1].length + 1 || /\d/.test(marker[2]) !== ordered || RULE.test(lines[end])) break;
    const width = marker[0].length;
    const item = [lines[end].slice(width)];
    end += 1;
    while (end < lines.length && belongs(lines, end, marker[1].length, depth)) {
      item.push(lines[end].slice(Math.min(width, lines[end].search(/\S|$/))));
      end += 1;
    }
    items.push(item);
  }
  const build = () => {
    const node = element(ordered ? "ol" : "ul", {}, ...items.map((item) => listItem(item, depth)));
    if (ordered) node.start = parseInt(first[2], 10);
    return node;
  };
  return [end - at, build];
}

/** Whether a line continues the item whose marker is indented by `indent`. */
function belongs(lines, at, indent, depth) {
  const line = lines[at];
  if (!line.trim()) { // a blank line does if the line after it does, or is the next item
    const next = lines.slice(at).find((each) => each.trim());
    return next !== undefined && (next.search(/\S/) > indent + 1 || (ITEM.test(next) && next.search(/\S/) >= indent));
  }
  if (line.search(/\S/) > indent + 1) return true;
  return Boolean(lines[at - 1].trim()) && !startsBlock(lines, at, depth); // lazy continuation of a paragraph
}

function listItem(lines, depth) {
  const blocks = parseBlocks(lines, depth + 1).map((block) => block.build());
  if (blocks[0]?.tagName === "P") blocks.splice(0, 1, ...blocks[0].childNodes);
  return element("li", {}, ...blocks);
}

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const aligns = cells(lines[at + 1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
  const row = (line, tag) => element("tr", {}, ...cells(line).slice(0, aligns.length).map((cell, place) => {
    const node = element(tag, {}, ...inline(cell));
    if (aligns[place]) node.dataset.align = aligns[place];
    return node;
  }));
  const build = () => element("div", { className: "table", tabIndex: 0 }, element("table", {},
    element("thead", {}, row(lines[at], "th")),
    element("tbody", {}, ...lines.slice(at + 2, end).map((line) => row(line, "td")))));
  return [end - at, build];
}

// ---- inside a block ----

// Inline patterns, tried in this order. Spans have a maximum length, so no text takes long to parse.
const SPANS = [
  [/\\([!-/:-@[-`{-~])/y, (m) => m[1]],
  [/(`+)(?!`)([^]{1,2000}?[^`])\1(?!`)/y, (m) => element("code", {}, m[2].replace(/\n/g, " "))],
  [/!?\[([^\]]{0,1000})\]\(\s*<?([^\s<>()]{1,2000}(?:\([^\s()]{0,500}\)[^\s()]{0,500})?)>?(?:\s+"[^"]{0,500}")?\s*\)/y, (m, d) => link(m[2], inline(m[1], d + 1), m[0])],
  [/<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y, (m) => link(m[1], [m[1]], m[0])],
  [/https?:\/\/[^\s<>"'`]{1,2000}[^\s<>"'`.,;:!?)\]}*_]/y, (m) => link(m[0], [m[0]], m[0])],
  [/(\*\*|__)(?=\S)([^]{0,1000}?\S)\1/y, (m, d) => element("strong", {}, ...inline(m[2], d + 1))],
  [/~~(?=\S)([^]{0,1000}?\S)~~/y, (m, d) => element("s", {}, ...inline(m[1], d + 1))],
  [/\*(?=[^\s*])([^*]{0,1000}?[^\s*])\*(?!\*)/y, (m, d) => element("em", {}, ...inline(m[1], d + 1))],
  [/_(?=[^\s_])([^_]{0,1000}?[^\s_])_(?![\w_])/y, (m, d) => element("em", {}, ...inline(m[1], d + 1))],
];
const MAY_START = /[\\`!\[<h*_~]/g;

/** A text as nodes and strings. */
function inline(text, depth = 0) {
  if (depth > MAX_DEPTH) return [text];
  const nodes = [];
  let plain = 0; // start of the text not yet in nodes
  let at = 0;
  while (at < text.length) {
    MAY_START.lastIndex = at;
    const start = MAY_START.exec(text);
    if (!start) break;
    at = start.index;
    const inWord = /\w/.test(text[at - 1] ?? "") && /[_h]/.test(text[at]);
    const found = inWord ? null : span(text, at, depth);
    if (!found) { at += 1; continue; }
    if (at > plain) nodes.push(text.slice(plain, at));
    nodes.push(found.node);
    at = plain = found.end;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

function span(text, at, depth) {
  for (const [pattern, build] of SPANS) {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    if (match) return { end: at + match[0].length, node: build(match, depth) };
  }
  return null;
}

/** A link, or its source text if its target is neither the web nor a mailbox. */
function link(target, children, source) {
  let url;
  try { url = new URL(target); } catch { return source; }
  if (!SAFE.has(url.protocol)) return source;
  return element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
