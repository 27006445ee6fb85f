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

/** What the graph's own metadata says where there is no plan.json: which experts are left, but not in which width. */
function readFlags(metadata) {
  const rows = metadata["edgemoe.experts_kept"].split(" ");
  return { layers: rows.map((_, layer) => layer), cells: rows.map((row) => Array.from(row, (flag) => (flag === "1" ? "kept" : 0))) };
}

/** `files` as engine.js gives them; `seconds`: how long loading took. */
export function describe({ config, plan, metadata, bytes }, seconds) {
  const name = plan?.model_name ?? config?.model_type ?? "model";
  const tiles = [["file", megabytes(bytes), `loaded in ${seconds.toFixed(1)} s`]];
  if (!plan && !metadata["edgemoe.experts_kept"]) return { name, tiles };
  const { layers, cells, found } = plan ? readMap(plan) : readFlags(metadata);
  const experts = cells[0].length, all = layers.length * experts, left = cells.flat().filter(Boolean).length;
  tiles.push(["experts kept", `${left} of ${all}`, `${many(layers.length, "layer")} of ${experts}, ${config.num_experts_per_tok} for each token`]);
  const legend = plan ? readWidths(plan, found, config, tiles) : [{ bits: "kept", name: "kept", note: many(left, "expert") }];
  tiles.push(["KL", Number(plan?.predicted_kl ?? metadata["edgemoe.predicted_kl"]).toPrecision(2), "nats per token against the original, predicted"]);
  if (left < all) legend.push({ bits: 0, name: "dropped", note: many(all - left, "expert") });
  const gone = left === all ? "None was dropped." : `${many(all - left, "expert")} of ${all} ${all - left === 1 ? "is" : "are"} gone.`;
  const caption = `Each cell is an expert, each row a layer${plan ? "; its colour is the width in which it is stored" : ""}. ${gone}`;
  return { name, tiles, map: { layers, experts, cells, legend, caption } };
}

/** A legend of the formats in use; adds the tile of their mean width. */
function readWidths(plan, found, config, tiles) {
  const total = {};
  for (const [match, format] of found) total[format] = (total[format] ?? 0) + plan.sizes[match[0]];
  const weights = 3 * config.hidden_size * (config.moe_intermediate_size ?? config.intermediate_size);
  const bits = (8 * Object.values(total).reduce((a, b) => a + b, 0)) / (found.length * weights);
  tiles.push(["bits per weight", bits.toFixed(2), "of the experts, scales and routers included"]);
  return Object.keys(total).sort((a, b) => bitsOf(a) - bitsOf(b) || (a < b ? -1 : 1)).map((format) => ({
    bits: bitsOf(format), name: format, note: `${many(found.filter(([, f]) => f === format).length, "expert")}, ${megabytes(total[format])}`,
  }));
}
