// Loaded by each OpenCode that opencode_sync starts, before all else: Bun, of which OpenCode is made,
// takes the file that BUN_INSPECT_PRELOAD names (1.3.14, in OpenCode 1.18.33). Unlike a plugin it
// makes OpenCode wait for nothing.

import { writeSync } from "node:fs"

// What is for OpenCode alone: a tool that is made of Bun would take it too.
delete process.env.BUN_INSPECT_PRELOAD
if (process.env.BUN_TMPDIR?.endsWith("opencode-sync-unpacked")) delete process.env.BUN_TMPDIR
if (process.env.BUN_JSC_thresholdForFTLOptimizeAfterWarmUp === "1000000") {
  delete process.env.BUN_JSC_thresholdForFTLOptimizeAfterWarmUp
}

// What the caller denies is denied, whatever an agent of the workspace's configuration allows: of the
// rules that match OpenCode takes the last, and finds it in one way for all sessions and sub-agents.
const denials = JSON.parse(process.env.OPENCODE_SYNC_DENIALS ?? "[]")
delete process.env.OPENCODE_SYNC_DENIALS
if (denials.length) {
  const findLast = Array.prototype.findLast
  let isTold = false
  const findLastDenied = function (test, self) {
    if (typeof this[0]?.permission === "string" && typeof this[0].pattern === "string") {
      if (!isTold) writeSync(2, 'opencode-sync: {"denials":true}\n')
      isTold = true
      for (const { agent, rules } of denials) {
        if (agent && !this.some(({ permission }) => permission === agent)) continue
        const rule = findLast.call(rules, test, self)
        if (rule?.action === "deny") return rule
      }
    }
    return findLast.call(this, test, self)
  }
  const property = { value: findLastDenied, writable: true, configurable: true }
  Object.defineProperty(Array.prototype, "findLast", property)
}

// What a process was started with stays readable in /proc/PID/environ and to ps: a tool could take the
// server's password from there, and grant itself what it must ask for. So it is written over in place;
// process.env keeps it until plugin.js takes it out, since OpenCode reads it only later.
const overwrite = (name) => {
  const value = process.env[name]
  const { dlopen, FFIType, toArrayBuffer } = require("bun:ffi")
  const machine = process.arch === "arm64" ? "aarch64" : "x86_64"
  const libraries = { darwin: ["libSystem.B.dylib"], linux: ["libc.so.6", `libc.musl-${machine}.so.1`] }
  for (const library of libraries[process.platform] ?? []) {
    try {
      const { symbols, close } = dlopen(library, {
        getenv: { args: [FFIType.cstring], returns: FFIType.ptr },
        strlen: { args: [FFIType.ptr], returns: FFIType.u64 },
      })
      const block = symbols.getenv(Buffer.from(name + "\0"))
      if (block) new Uint8Array(toArrayBuffer(block, 0, Number(symbols.strlen(block)))).fill(42)
      close()
      break
    } catch {} // not this C library; opencode_sync looks whether it was one of them
  }
  process.env[name] = value
}
if (process.argv.includes("serve") && process.env.OPENCODE_SERVER_PASSWORD) overwrite("OPENCODE_SERVER_PASSWORD")

// OpenCode retries a provider's refusals without a word of the HTTP status: say it on stderr, where
// opencode_sync reads it. Nothing of the request or the answer is touched.
const fetch = globalThis.fetch
const observed = async (input, init) => {
  const response = await fetch(input, init)
  const session = response.status >= 400 && new Headers(init?.headers).get("x-session-id")
  if (session) {
    const [retry_after, retry_after_ms] = ["", "-ms"].map((unit) => response.headers.get("retry-after" + unit))
    const seen = { status: response.status, retry_after, retry_after_ms, session }
    process.stderr.write("opencode-sync: " + JSON.stringify(seen) + "\n")
  }
  return response
}
globalThis.fetch = Object.assign(observed, fetch)

// `opencode run` prints nothing of sub-agents: print on stderr what it would print if their sessions
// were the run's own. OpenCode's server is in this process, and its messages to `run` are read on
// their way; a provider's answer takes the same way, and goes by unread.
const EVENTS = { tool: "tool_use", text: "text", reasoning: "reasoning", "step-start": "step_start", "step-finish": "step_finish" }
const isThinking = process.argv.includes("--thinking")
const runs = new Map() // a sub-agent's session -> the session of the run
const told = new Set() // ids of parts
let model // the one that answers the run

const tell = (type, sessionID, more) =>
  process.stderr.write("opencode-sync: " + JSON.stringify({ type, timestamp: Date.now(), sessionID, ...more }) + "\n")

const follow = (childID, parentID, agent, title) => {
  if (!childID || runs.has(childID)) return
  runs.set(childID, runs.get(parentID) ?? parentID)
  tell("sub_agent", runs.get(childID), { childID, parentID, agent, title })
}

const isWhole = ({ type, state, time }) => {
  if (type === "tool") return state.status === "completed" || state.status === "error"
  if (type === "text" || type === "reasoning") return Boolean(time?.end) && (type === "text" || isThinking)
  return type in EVENTS
}

const read = ({ type, properties: { info, part } = {} }) => {
  if (type === "session.created" && info.parentID) follow(info.id, info.parentID, info.agent, info.title)
  if (type === "message.updated" && info.summary === true && !told.has(info.id)) {
    told.add(info.id) // in what `run` prints, a summary for OpenCode itself is a text like any other
    tell("compaction", info.sessionID, { messageID: info.id })
  }
  if (type === "message.updated" && info.role === "assistant" && !info.summary && !runs.has(info.sessionID)) {
    const answering = `${info.providerID}/${info.modelID}`
    if (answering !== model) process.stderr.write("opencode-sync: " + JSON.stringify({ model: answering }) + "\n")
    model = answering
  }
  if (type !== "message.part.updated") return
  if (part.tool === "task") {
    const { input, metadata } = part.state // a session that is taken up again is not created
    follow(metadata?.sessionId, part.sessionID, input?.subagent_type, input?.description)
  }
  if (!runs.has(part.sessionID) || told.has(part.id) || !isWhole(part)) return
  told.add(part.id)
  tell(EVENTS[part.type], part.sessionID, { part })
}

const reader = () => {
  let isServers, rest = ""
  return (text) => {
    isServers ??= text.startsWith("data: ") && text.includes('"server.connected"') // its first message
    if (!isServers) return
    const lines = (rest + text).split("\n")
    rest = lines.pop()
    for (const line of lines) {
      try {
        if (line.startsWith("data: ")) read(JSON.parse(line.slice("data: ".length)))
      } catch {} // not of a shape that is known here; opencode_sync sees what is missing
    }
  }
}

if (process.argv.includes("run")) {
  globalThis.TextDecoderStream = class TextDecoderStream extends globalThis.TextDecoderStream {
    #copied
    get readable() {
      const copy = reader()
      return (this.#copied ??= super.readable.pipeThrough(
        new TransformStream({
          transform(text, passed) {
            passed.enqueue(text)
            copy(text)
          },
        }),
      ))
    }
  }
}
