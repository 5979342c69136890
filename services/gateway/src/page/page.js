
"use strict";
// Everything shown is a stranger's: it goes into the page as text, never as markup.

const STATES = ["", "queued", "running", "succeeded", "failed", "limit_exceeded", "cancelled", "rejected", "infra_error"];
const KEPT = 200000;
const $ = (id) => document.getElementById(id);
let open = null;      // the job that is shown: {id, view, stdout, stderr, usage, stop}
let pages = 1;
let token = sessionStorage.getItem("token") || "";

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") element.className = value;
    else if (name === "on") for (const [event, f] of Object.entries(value)) element.addEventListener(event, f);
    else element.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (token) headers.authorization = "Bearer " + token;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await askForToken();
    return ask(path, options);
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Error(problem.detail || answer.statusText);
  }
  return answer;
}

let asking = null;
function askForToken() {
  asking ??= new Promise((done) => {
    $("ask").addEventListener("close", () => {
      token = $("token").value.trim();
      sessionStorage.setItem("token", token);
      asking = null;
      done();
    }, { once: true });
    $("ask").showModal();
  });
  return asking;
}

const time = (ms) => ms < 1000 ? ms + " ms" : ms < 60000 ? (ms / 1000).toFixed(2) + " s"
  : Math.floor(ms / 60000) + " m " + Math.floor(ms % 60000 / 1000) + " s";
function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit++; }
  return (unit ? bytes.toFixed(1) : bytes) + " " + units[unit];
}
const since = (moment) => {
  const seconds = Math.max(0, (Date.now() - Date.parse(moment)) / 1000);
  return seconds < 60 ? Math.floor(seconds) + " s ago" : seconds < 3600 ? Math.floor(seconds / 60) + " min ago"
    : seconds < 86400 ? Math.floor(seconds / 3600) + " h ago" : new Date(moment).toLocaleDateString();
};
const word = (view) => view.result ? view.result.status : view.state;
const pill = (name) => el("span", { class: "pill " + name }, name.replaceAll("_", " "));

// ---- the list

function row(view) {
  const labels = Object.entries(view.labels).map(([name, value]) => name + ":" + value).join("  ");
  const reason = view.result && view.result.reason ? view.result.reason.replaceAll("_", " ") : "";
  return el("li", {}, el("a", { href: "#" + view.id, class: open && open.id === view.id ? "open" : "" },
    el("span", { class: "id" }, view.id.slice(0, 8) + "…" + view.id.slice(-6)), pill(word(view)),
    el("small", {}, [since(view.submitted_at), labels].filter(Boolean).join("  ·  ")), el("small", {}, reason)));
}

async function refresh() {
  const query = new URLSearchParams({ limit: "50" });
  if ($("status").value) query.set("status", $("status").value);
  if ($("label").value.includes(":")) query.set("label", $("label").value);
  const rows = [];
  let next = null;
  for (let page = 0; page < pages; page++) {
    if (next) query.set("after", next);
    const list = await (await ask("/v1/jobs?" + query)).json();
    rows.push(...list.jobs.map(row));
    next = list.next;
    if (!next) break;
  }
  if (!rows.length) rows.push(el("li", { class: "soft" }, "No jobs here yet."));
  $("jobs").replaceChildren(...rows);
  $("more").hidden = !next;
  const { queues } = await (await ask("/v1/queues")).json();
  $("queues").replaceChildren(...queues.map((queue) => el("li", {}, queue.queue + " ",
    el("b", {}, String(queue.queued)), " waiting, ", el("b", {}, String(queue.running)), " running")));
}

async function live() {
  for (;;) {
    if (!document.hidden) {
      try {
        await refresh();
        $("live").textContent = "live";
        $("live").className = "";
      } catch (error) {
        $("live").textContent = error.message;
        $("live").className = "off";
      }
    }
    await new Promise((done) => setTimeout(done, 2000));
  }
}

// ---- one job

function facts(pairs) {
  return el("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

function used(usage) {
  return facts([
    ["time", time(usage.wall_time_ms)], ["processor", time(usage.cpu_user_ms + usage.cpu_system_ms)],
    ["held back", usage.cpu_throttled_ms ? time(usage.cpu_throttled_ms) : null],
    ["memory, at most", size(usage.memory_peak_bytes)], ["killed for memory", usage.oom_kills || null],
    ["processes, at most", usage.pids_peak], ["forks refused", usage.pids_denied || null],
    ["read", size(usage.io_read_bytes)], ["written", size(usage.io_write_bytes)],
    ["files", usage.disk_inodes + ", " + size(usage.disk_bytes)],
  ]);
}

function decoded(output) {
  if (output.text !== undefined) return output.text;
  const bytes = Uint8Array.from(atob(output.base64 || ""), (c) => c.charCodeAt(0));
  return new TextDecoder().decode(bytes);
}

function written(title, text, note) {
  if (!text) return [];
  return [el("h3", {}, title, note ? " (" + note + ")" : ""), el("pre", { tabindex: "0" }, text.slice(-KEPT))];
}

const cutNote = (output) => output.truncated ? size(output.bytes) + " in all, the first of it shown" : "";

function fileRow(id, file) {
  const name = file.path + (file.target ? " → " + file.target : "");
  const fetchFile = async () => {
    const path = file.path.split("/").map(encodeURIComponent).join("/");
    const data = await (await ask("/v1/jobs/" + id + "/outputs" + path)).blob();
    const link = el("a", { href: URL.createObjectURL(data), download: file.path.split("/").pop() });
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const get = file.kind === "file" ? el("button", { type: "button", on: { click: () => fetchFile().catch((e) => alert(e.message)) } }, "get") : "";
  return el("tr", {}, el("td", {}, el("code", {}, name)), el("td", {}, file.kind), el("td", {}, file.mode || ""),
    el("td", {}, size(file.bytes)), el("td", {}, get));
}

function finished(result) {
  const at = result.timeline;
  const parts = [
    el("h3", {}, "Verdict"),
    facts([["status", result.status.replaceAll("_", " ")], ["reason", (result.reason || "").replaceAll("_", " ")],
      ["exit code", result.exit_code], ["signal", result.signal],
      ["limit", result.limit && result.limit.name + ": " + result.limit.measured + " of " + result.limit.allowed],
      ["worker", result.worker], ["attempt", result.attempt || null],
      ["in the queue", time(at.queue_ms)], ["to prepare", (at.setup_us / 1000).toFixed(1) + " ms"]]),
    el("h3", {}, "Used"), used(result.usage),
    ...written("stdout", decoded(result.stdout), cutNote(result.stdout)),
    ...written("stderr", decoded(result.stderr), cutNote(result.stderr)),
  ];
  if (result.steps.length > 1) {
    parts.push(el("h3", {}, "Steps"), el("table", {}, result.steps.map((step) => el("tr", {},
      el("td", {}, step.name), el("td", {}, pill(step.status)), el("td", {}, step.message || step.reason || ""),
      el("td", {}, time(step.usage.wall_time_ms))))));
  }
  if (result.outputs.files.length) {
    parts.push(el("h3", {}, "Files"), el("table", {}, result.outputs.files.map((file) => fileRow(result.id, file))));
  }
  return parts;
}

function show() {
  const { id, view } = open;
  const labels = Object.entries(view.labels).map(([name, value]) => name + ":" + value).join("  ");
  const cancel = view.result ? null : el("button", { type: "button", on: { click: () => {
    ask("/v1/jobs/" + id, { method: "DELETE" }).catch((error) => alert(error.message));
  } } }, "Cancel");
  const message = view.result && view.result.message;
  const body = view.result ? finished(view.result) : [
    ...(open.usage ? [el("h3", {}, "Used so far"), used(open.usage)] : []),
    ...written("stdout", open.stdout), ...written("stderr", open.stderr)];
  const tails = [...document.querySelectorAll("#job pre")].map((pre) => pre.scrollTop + pre.clientHeight + 4 >= pre.scrollHeight);
  $("job").replaceChildren(
    el("div", { class: "head" }, el("div", {}, el("h2", { class: "id" }, id), pill(word(view)),
      el("span", { class: "soft" }, "  " + new Date(view.submitted_at).toLocaleString() + "  " + labels)), cancel),
    message ? el("p", { class: "message" }, message) : "", ...body);
  if (!view.result) document.querySelectorAll("#job pre").forEach((pre, n) => { if (tails[n] !== false) pre.scrollTop = pre.scrollHeight; });
}

let due = false;
function showSoon() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; if (open && open.view) show(); });
}

async function follow(job) {
  const answer = await ask("/v1/jobs/" + job.id + "/events", { signal: job.stop.signal });
  if (!answer.body) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) heard(job, JSON.parse(data));
    }
  }
}

function heard(job, event) {
  if (event.kind === "started") { job.stdout = job.stderr = ""; job.view.state = "running"; }
  if (event.kind === "stdout" || event.kind === "stderr") job[event.kind] = (job[event.kind] + decoded(event)).slice(-KEPT);
  if (event.kind === "usage") job.usage = event.usage;
  if (job === open) showSoon();
}

async function choose() {
  if (open) open.stop.abort();
  const id = decodeURIComponent(location.hash.slice(1));
  if (!id) {
    open = null;
    $("job").replaceChildren(el("p", { class: "empty" }, "Choose a job, or hand one in: ",
      el("code", {}, "hutch submit job.json --follow")));
    return;
  }
  const job = open = { id, view: null, stdout: "", stderr: "", usage: null, stop: new AbortController() };
  const look = async () => { job.view = await (await ask("/v1/jobs/" + encodeURIComponent(id))).json(); if (job === open) show(); };
  try {
    await look();
    if (!job.view.result) { await follow(job); await look(); }
  } catch (error) {
    if (job === open && error.name !== "AbortError") $("job").replaceChildren(el("p", { class: "empty" }, error.message));
  }
}

$("status").replaceChildren(...STATES.map((state) => el("option", { value: state }, state.replaceAll("_", " ") || "all")));
$("filter").addEventListener("submit", (event) => event.preventDefault());
$("filter").addEventListener("input", () => { pages = 1; refresh().catch(() => {}); });
$("more").addEventListener("click", () => { pages++; refresh().catch(() => {}); });
addEventListener("hashchange", choose);
choose();
live();
