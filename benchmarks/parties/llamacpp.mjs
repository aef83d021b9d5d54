// llama.cpp with the weights of its file, 4 bits for the default model: the GGUF of the package that it comes in.
// A Node loop over node-llama-cpp's prebuilt binary: one context, its sequences in one batch.
// `node llamacpp.mjs GGUF THREADS FOLDER`: FOLDER has node-llama-cpp installed.
import { createInterface } from "node:readline";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [modelPath, threads, folder] = process.argv.slice(2);
const entry = join(resolve(folder), "node_modules/node-llama-cpp/dist/index.js");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));

const llama = await getLlama({
  gpu: false, build: "never", maxThreads: Number(threads), logLevel: LlamaLogLevel.error,
});
const model = await llama.loadModel({ modelPath });
let opened = null; // the context of the last job, its prompts computed but for their last tokens

async function open(job) {
  const key = JSON.stringify(job);
  if (opened?.key === key) return opened;
  await opened?.context.dispose();
  const numSequences = Math.max(1, job.batch);
  const context = await model.createContext({
    sequences: numSequences,
    contextSize: job.context + job.num_steps + 8, // of each sequence
    batchSize: Math.max(512, numSequences),
    threads: Number(threads),
    flashAttention: true,
  });
  opened = { key, context, sequences: Array.from({ length: numSequences }, () => context.getSequence()) };
  return opened;
}

async function generate(sequence, tokens, numTokens) {
  let left = numTokens;
  for await (const _ of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
    if (--left === 0) break;
  }
}

async function decode(job, prompts) {
  const { sequences } = await open(job);
  for (const [place, sequence] of sequences.entries()) {
    const before = prompts[place].slice(0, -1);
    if (sequence.nextTokenIndex === 0) await sequence.evaluateWithoutGeneratingNewTokens(before);
    else await sequence.eraseContextTokenRanges([{ start: before.length, end: sequence.nextTokenIndex }]);
  }
  const began = performance.now();
  await Promise.all(sequences.map((each, place) => generate(each, prompts[place].slice(-1), job.num_steps)));
  return (performance.now() - began) / 1e3;
}

async function prefill(job, prompts) {
  const { sequences: [sequence] } = await open(job);
  await sequence.clearHistory();
  const began = performance.now();
  await generate(sequence, prompts[0], 1);
  return (performance.now() - began) / 1e3;
}

console.log(JSON.stringify("ready"));
for await (const line of createInterface({ input: process.stdin })) {
  const { prompts, ...job } = JSON.parse(line);
  console.log(JSON.stringify(await (job.batch ? decode : prefill)(job, prompts)));
}
process.exit(0);
