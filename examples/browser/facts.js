// plan.json and the graph's metadata -> what the page says about the model.

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 2 : 0)} MB`;
const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** Bits of a format by its name: INT4_32 has 4, F32 32. */
export const bitsOf = (format) => Number(/\d+/.exec(format)[0]);

/** Every expert's bits by layer; 0 for one that was dropped. */
function readMap(plan) {
  const found = Object.entries(plan.formats)
    .map(([name, format]) => [/^blk\.(\d+)\.ffn_exps\.(\d+)$/.exec(name), format])
    .filter(([match]) => match);
  const layers = [...new Set(found.map(([match]) => Number(match[1])))].sort((a, b) => a - b);
  const cells = layers.map(() => new Array(plan.n_experts).fill(0));
  for (const [match, format] of found) cells[layers.indexOf(Number(match[1]))][Number(match[2])] = bitsOf(format);
  return { layers, cells, found };
}

/** `files` as engine.js gives them; `seconds`: how long loading took. */
export function describe({ config, plan, metadata, bytes }, seconds) {
  const name = plan?.model_name ?? metadata["edgemoe.name"] ?? config?.model_type ?? "model";
  const tiles = [["file", megabytes(bytes), `loaded in ${seconds.toFixed(1)} s`]];
  const lead = "Runs in this page, in WebAssembly. Nothing you type leaves your device.";
  if (!plan) return { name, lead, tiles };
  const { layers, cells, found } = readMap(plan);
  const left = found.length, all = layers.length * plan.n_experts, total = {};
  for (const [match, format] of found) total[format] = (total[format] ?? 0) + plan.sizes[match[0]];
  const weights = 3 * config.hidden_size * (config.moe_intermediate_size ?? config.intermediate_size);
  const bits = (8 * Object.values(total).reduce((a, b) => a + b, 0)) / (left * weights);
  tiles.push(["experts kept", `${left} of ${all}`, `${plan.n_experts} in each of ${many(layers.length, "layer")}, ${plan.top_k} for each token`]);
  tiles.push(["bits per weight", bits.toFixed(2), "of the experts, scales included"]);
  tiles.push(["KL", plan.predicted_kl.toPrecision(2), "nats per token against the original, predicted"]);
  const legend = Object.keys(total).sort((a, b) => bitsOf(a) - bitsOf(b) || (a < b ? -1 : 1)).map((format) => ({
    bits: bitsOf(format), name: format, note: `${many(found.filter(([, f]) => f === format).length, "expert")}, ${megabytes(total[format])}`,
  }));
  if (left < all) legend.push({ bits: 0, name: "dropped", note: many(all - left, "expert") });
  const caption = `Each cell is an expert, each row a layer; its colour is the width in which it is stored. ${left === all ? "None was dropped." : `${many(all - left, "expert")} of ${all} ${all - left === 1 ? "is" : "are"} gone.`}`;
  return { name, lead, tiles, map: { layers, experts: plan.n_experts, cells, legend, caption } };
}
