// Text in, text out with transformers.js under Node, from a folder that edgemoe wrote in the layout "transformers.js":
//
//   npm install --omit=dev --ignore-scripts --no-package-lock --prefix examples/transformers_js     (474 MB: onnxruntime-node, -web, sharp)
//   node examples/transformers_js/generate.mjs OUT "The little dog was" [TOKENS]

import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, prompt, tokens = "24"] = process.argv.slice(2);
if (!prompt) throw new Error("give a folder and the beginning of a text");
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + "/";
const name = path.basename(path.resolve(folder));
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);
const inputs = tokenizer(prompt);
const made = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
const ids = Array.from(made.data, Number);
console.log(JSON.stringify(ids.slice(inputs.input_ids.dims[1])));
console.log(tokenizer.decode(ids, { skip_special_tokens: true }));
