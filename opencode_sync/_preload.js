// Loaded by each OpenCode that opencode_sync starts, before all else: Bun, of which OpenCode is made,
// takes the file that BUN_INSPECT_PRELOAD names (1.3.14, in OpenCode 1.18.33). Unlike a plugin it
// makes OpenCode wait for nothing.

// What is for OpenCode alone: a tool that is made of Bun would take it too.
delete process.env.BUN_INSPECT_PRELOAD
if (process.env.BUN_JSC_thresholdForFTLOptimizeAfterWarmUp === "1000000") {
  delete process.env.BUN_JSC_thresholdForFTLOptimizeAfterWarmUp
}

// OpenCode retries a provider's refusals without a word of the HTTP status: say it on stderr, where
// opencode_sync reads it. Nothing of the request or the answer is touched.
const fetch = globalThis.fetch
const observed = async (input, init) => {
  const response = await fetch(input, init)
  const session = response.status >= 400 && new Headers(init?.headers).get("x-session-id")
  if (session) {
    const seen = { status: response.status, retry_after: response.headers.get("retry-after"), session }
    process.stderr.write("opencode-sync: " + JSON.stringify(seen) + "\n")
  }
  return response
}
globalThis.fetch = Object.assign(observed, fetch)
