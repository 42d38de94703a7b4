// A streamed chat completion as an async iterator of its chunks.

/** Chunks of an answer. If there is none, throws an Error with the server's message and status. */
export async function* streamChat(body, key, signal) {
  const response = await fetch(new URL("../v1/chat/completions", import.meta.url), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

export async function getJson(path, key) {
  const response = await fetch(new URL(`../${path}`, import.meta.url), { headers: authorization(key) });
  if (!response.ok) throw await failure(response);
  return response.json();
}

const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function failure(response) {
  const told = await response.json().then((body) => body.error?.message, () => null);
  return Object.assign(new Error(told ?? `The server answered ${response.status}.`), { status: response.status });
}
