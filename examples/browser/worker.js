// The engine behind messages, so that the page stays alive while it computes.

import { loadModel } from "./engine.js";

let model, stopped;

/** Let messages in: a run of WebAssembly leaves no room for them. */
const breathe = () => new Promise((resolve) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); resolve(); };
  port2.postMessage(0);
});

async function load(base) {
  const start = performance.now();
  model = await loadModel(base, (bytes, all) => postMessage({ type: "progress", bytes, all }));
  postMessage({ type: "ready", seconds: (performance.now() - start) / 1000, files: model.files, context: model.context, defaults: model.defaults });
}

async function write({ prompt, limit, temperature }) {
  const ids = Array.from(model.tokenizer.encode(prompt).ids, Number), made = [];
  stopped = false;
  const start = performance.now();
  let first = start;
  for await (const id of model.generate(ids, { limit, temperature })) {
    if (!made.length) first = performance.now();
    made.push(id);
    // A character may take several tokens, so the text is decoded anew each time.
    const text = model.tokenizer.decode(made, { skip_special_tokens: false });
    const seconds = (performance.now() - first) / 1000;
    postMessage({ type: "token", text, made, promptTokens: ids.length, promptSeconds: (first - start) / 1000, rate: seconds ? (made.length - 1) / seconds : 0 });
    await breathe();
    if (stopped) break;
  }
  const reason = stopped ? "stopped" : made.length >= limit ? "as many tokens as asked for"
    : ids.length + made.length >= model.context ? "the context is full" : "the model ended the text";
  postMessage({ type: "done", made, reason });
}

onmessage = async ({ data }) => {
  try {
    if (data.type === "stop") stopped = true;
    else await (data.type === "load" ? load(data.base) : write(data));
  } catch (error) {
    postMessage({ type: "error", text: String(error?.message ?? error), fatal: data.type === "load" });
  }
};
