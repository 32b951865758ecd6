// Loaded by OpenCode itself, with every run that does not ask for pure=True.
// OpenCode retries a provider's refusals without a word of the HTTP status: say it on stderr, where
// opencode_sync reads it (see _logs.py). Nothing of the request or the answer is touched.
export const OpencodeSync = async () => {
  const fetch = globalThis.fetch
  const observed = async (input, init) => {
    const response = await fetch(input, init)
    // Models are asked by POST; pages that a tool fetches are not.
    if (response.status >= 400 && (init?.method ?? input?.method) === "POST") {
      const seen = { status: response.status, retry_after: response.headers.get("retry-after") }
      process.stderr.write("opencode-sync: " + JSON.stringify(seen) + "\n")
    }
    return response
  }
  globalThis.fetch = Object.assign(observed, fetch)
  return {}
}
