// Runs a GGUF file in llama.cpp, by node-llama-cpp, whose folder is the first argument.
//
// Reads a job {model, texts, prompts, numTokens} as JSON from stdin and writes to stdout:
//   metadata    what llama.cpp knows of the model
//   tokens      the tokens of each text, after the BOS token if llama.cpp is to add it to each text
//   generated   numTokens greedy tokens after each prompt (a list of ids)
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const {getLlama, LlamaLogLevel} = await import(pathToFileURL(`${process.argv[2]}/dist/index.js`));
const job = JSON.parse(readFileSync(0, "utf-8"));

const llama = await getLlama({gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: job.model});
const prefix = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
const tokens = job.texts.map((text) => [...prefix, ...model.tokenize(text, true)]);

const generated = [];
const context = await model.createContext({contextSize: model.trainContextSize, flashAttention: false});
const sequence = context.getSequence();
for (const prompt of job.prompts) {
    const ids = [];
    await sequence.clearHistory();
    for (let read = prompt; ids.length < job.numTokens; read = ids.slice(-1)) {
        const last = [read.at(-1), {generateNext: {token: true, options: {temperature: 0}}}];
        const results = await sequence.controlledEvaluate([...read.slice(0, -1), last]);
        ids.push(results.at(-1).next.token);
    }
    generated.push(ids);
}

const metadata = {bos: model.tokens.bos, eos: model.tokens.eos, architecture: model.fileInfo.metadata.general.architecture, contextLength: model.trainContextSize};
process.stdout.write(JSON.stringify({metadata, tokens, generated}), () => process.exit(0));
