// A folder that edgemoe wrote -> text, token by token: onnxruntime-web for the graph, Hugging Face's tokenizer for the words.
// Runs in a worker, in a page, or in Node; knows nothing of any document.

import * as ort from "./npm/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "./npm/@huggingface/tokenizers/dist/tokenizers.min.mjs";

ort.env.wasm.numThreads = 1; // more would need cross-origin isolation (COOP and COEP headers)
ort.env.wasm.wasmPaths = new URL("./npm/onnxruntime-web/dist/", import.meta.url).href;
ort.env.logLevel = "error";

async function fetchJson(url) {
  const answer = await fetch(url);
  return answer.ok ? answer.json() : null;
}

/** The bytes of a file; `onBytes` is called with how many more have come. */
async function fetchBytes(url, onBytes) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  const size = Number(answer.headers.get("content-length"));
  if (!size) return new Uint8Array(await answer.arrayBuffer());
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    bytes.set(value, at);
    at += value.length;
    onBytes?.(value.length, size);
  }
  if (at !== size) throw new Error(`${url}: ${at} of ${size} bytes came`);
  return bytes;
}

/** Read one protobuf message: calls `field(number, bytes or number)`. */
function readMessage(bytes, field) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1, byte;
    do { byte = bytes[at++]; value += (byte & 127) * scale; scale *= 128; } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const key = varint(), kind = key & 7, number = key >>> 3;
    if (kind === 0) field(number, varint());
    else if (kind === 1 || kind === 5) at += kind === 1 ? 8 : 4;
    else if (kind === 2) { const size = varint(); field(number, bytes.subarray(at, at + size)); at += size; }
    else throw new Error("model.onnx is no ONNX file");
  }
}

/** metadata_props of an ONNX file (onnx.proto: ModelProto field 14, of key 1 and value 2). */
export function readMetadata(graph) {
  const found = {}, text = new TextDecoder();
  readMessage(graph, (number, entry) => {
    if (number !== 14) return;
    const pair = [];
    readMessage(entry, (part, bytes) => { pair[part] = text.decode(bytes); });
    found[pair[1]] = pair[2] ?? "";
  });
  return found;
}

/**
 * Load a folder.  `base` is its URL with a slash at the end; `onProgress(bytes, all)` hears of the download.
 * Returns { generate, tokenizer, context, defaults, files: {config, plan, metadata, bytes} }.
 */
export async function loadModel(base, onProgress = () => {}) {
  const [genai, config, plan, words, wordsConfig] = await Promise.all(
    ["genai_config.json", "config.json", "plan.json", "tokenizer.json", "tokenizer_config.json"].map((name) => fetchJson(base + name)));
  if (!genai) throw new Error(`${base}genai_config.json is not there: is this a folder that edgemoe wrote for ONNX?`);
  if (!words) throw new Error(`${base}tokenizer.json is not there: a browser needs it`);
  const { decoder } = genai.model;
  const graph = await fetchBytes(base + decoder.filename);
  // The two layouts of edgemoe: model.onnx.data beside model.onnx, or transformers.js's onnx/model.onnx_data.
  const dataFile = decoder.filename + (decoder.filename.includes("/") ? "_data" : ".data");
  let have = 0;
  const data = await fetchBytes(base + dataFile, (more, all) => onProgress((have += more), all));
  const session = await openSession(graph, { path: dataFile.split("/").at(-1), data });
  const tokenizer = new Tokenizer(words, wordsConfig ?? {});
  const ends = new Set([genai.model.eos_token_id ?? []].flat());
  const context = genai.model.context_length;
  return {
    tokenizer,
    context,
    defaults: genai.search,
    files: { config, plan, metadata: readMetadata(graph), bytes: graph.length + data.length },
    generate: (ids, settings) => generate(session, decoder, ids, { ends, context, topK: genai.search.top_k, ...settings }),
  };
}

async function openSession(graph, weights) {
  try {
    return await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData: [weights] });
  } catch (error) {
    if (!String(error).includes("expert_weight_bits")) throw error;
    throw new Error("This file stores experts in 3 bits, which WebAssembly has no kernel for. Build it with --target browser.");
  }
}

/** The empty cache of a text that has not begun. */
function emptyCache(decoder) {
  const cache = {}, dims = [1, decoder.num_key_value_heads, 0, decoder.head_size];
  for (let layer = 0; layer < decoder.num_hidden_layers; layer++) {
    for (const name of [decoder.inputs.past_key_names, decoder.inputs.past_value_names]) {
      cache[name.replace("%d", layer)] = new ort.Tensor("float32", new Float32Array(0), dims);
    }
  }
  return cache;
}

/** Give every new token id after `ids`, until an end of text, `limit` tokens, or a full context. */
async function* generate(session, decoder, ids, { ends, context, limit = 64, temperature = 0, topK = 0 }) {
  if (!ids.length) throw new Error("Write at least one word to begin with.");
  if (ids.length >= context) throw new Error(`The beginning has ${ids.length} tokens, the context ${context}.`);
  let cache = emptyCache(decoder), next = ids, total = ids.length;
  for (let made = 0; made < limit && total < context; made++) {
    const results = await session.run({
      input_ids: new ort.Tensor("int64", BigInt64Array.from(next, BigInt), [1, next.length]),
      attention_mask: new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      ...cache,
    });
    const vocabulary = results.logits.dims[2];
    const token = pick(results.logits.data.subarray((next.length - 1) * vocabulary), temperature, topK);
    if (ends.has(token)) return;
    yield token;
    cache = {};
    for (let layer = 0; layer < decoder.num_hidden_layers; layer++) {
      for (const part of ["key", "value"]) {
        cache[decoder.inputs[`past_${part}_names`].replace("%d", layer)] = results[decoder.outputs[`present_${part}_names`].replace("%d", layer)];
      }
    }
    next = [token];
    total++;
  }
}

/** The most likely token at temperature 0, else one by chance among the `topK` most likely (0: among all). */
function pick(logits, temperature, topK) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 0)) return best;
  const order = topK > 0 ? Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]).slice(0, topK) : Array.from(logits.keys());
  const weights = order.map((i) => Math.exp((logits[i] - logits[best]) / temperature));
  let left = Math.random() * weights.reduce((sum, w) => sum + w, 0);
  for (let i = 0; i < order.length; i++) if ((left -= weights[i]) <= 0) return order[i];
  return best;
}
