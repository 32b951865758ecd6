// Loaded by each server that opencode_sync starts, in each directory before its first tool can run.

const MARKER = "OPENCODE_SYNC_RUN"

// A prompt with a format is sent again without it (see turn.py), and keeps its place in forks only if
// it keeps its time.
function keepTime(formatted, { id, time, format }) {
  if (format?.type === "json_schema") return formatted.set(id, time.created)
  if (formatted.has(id)) time.created = formatted.get(id)
  formatted.delete(id)
}

// The arguments of a command come sealed (see sealed() in command.py), so that OpenCode finds nothing
// in them to expand, by the shell or otherwise. They are opened after everything is expanded.
const SEALED = /ocs\.([\w-]*)\.ocs/g
const opened = (text) => text.replace(SEALED, (_, word) => Buffer.from(word, "base64url").toString())
const INSTEAD = "run it without arguments, or give its text as the prompt"
const BY_SHELL = `puts its arguments into a shell command, where they could do anything: ${INSTEAD}`
const BY_NAME = `gives its arguments to a sub-agent, with each file that they name behind an "@": ${INSTEAD}`
const named = (text) => text.match(/(?<![\w`])@/g)?.length ?? 0
const INTO_SHELL = /!`[^`]*\$(ARGUMENTS|\d)[^`]*`/

function refuse(sessionID, message) {
  const error = { name: "CommandArgumentsError", data: { message } }
  console.error("opencode-sync: " + JSON.stringify({ type: "error", sessionID, error }))
  throw new Error(message)
}

export const OpencodeSync = async ({ client }) => {
  // A tool that knew the password could grant itself permissions (see preload.js). The server has read
  // it by now and goes on asking for it; tools get the process.env of when they start.
  delete process.env.OPENCODE_SERVER_PASSWORD
  const formatted = new Map() // prompts with a format: when each was made
  const roots = new Set() // sessions known not to be a sub-agent's; saves a request per prompt
  return {
    event: async ({ event }) => {
      if (event.type !== "session.created" || event.properties.info.parentID) return
      if (roots.size > 1000) roots.clear()
      roots.add(event.properties.info.id)
    },
    // The processes of a session's tools are found by its id.
    "shell.env": async ({ sessionID }, { env }) => {
      env[MARKER] = [process.env[MARKER], sessionID].filter(Boolean).join("/")
      // Our settings, with which OpenCode's own npm gives up soon without a network; back to defaults.
      if (process.env.npm_config_fetch_retries === "0") env.npm_config_fetch_retries = "2"
      if (process.env.npm_config_fetch_timeout === "5000") env.npm_config_fetch_timeout = "300000"
    },
    "command.execute.before": async ({ command, sessionID }, { parts }) => {
      const { data: commands } = await client.command.list()
      const { template } = commands?.find(({ name }) => name === command) ?? {}
      if (INTO_SHELL.test(template)) refuse(sessionID, `command '${command}' ${BY_SHELL}`)
      for (const part of parts) {
        if (part.type === "text") part.text = opened(part.text)
        if (part.type !== "subtask") continue
        const prompt = opened(part.prompt) // expanded once more, in the sub-agent's session
        if (named(prompt) > named(part.prompt)) refuse(sessionID, `command '${command}' ${BY_NAME}`)
        part.prompt = prompt
      }
      console.error('opencode-sync: {"arguments":true}')
    },
    // A sub-agent resumes a session of its own parent only: sessions of others have other rules.
    "tool.execute.before": async ({ tool, sessionID }, { args }) => {
      if (tool !== "task" || !args?.task_id) return
      const { data: session } = await client.session.get({ path: { id: args.task_id } })
      if (session?.parentID !== sessionID) delete args.task_id
    },
    // OpenCode gives a sub-agent's session only the denials of its parent's rules, so that it would do
    // without asking what its parent must ask for. This runs before the session's rules are read.
    "chat.message": async ({ sessionID }, { message }) => {
      keepTime(formatted, message)
      if (roots.has(sessionID)) return
      const { data: session } = await client.session.get({ path: { id: sessionID } })
      if (!session?.parentID) return
      const { data: parent } = await client.session.get({ path: { id: session.parentID } })
      const permission = [...(parent?.permission ?? []), ...(session.permission ?? [])]
      const { error } = await client.session.update({ path: { id: sessionID }, body: { permission } })
      if (error) throw new Error(`no rules for sub-agent ${sessionID}`)
    },
  }
}
