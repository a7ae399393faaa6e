// Losses of a text in llama.cpp with its context shift, for benchmarks/context_shift.py.
//
// The first argument is the folder of node-llama-cpp. Reads a job {model, ids, size, kept} as JSON
// from stdin; writes the losses of ids[1:] in nats. The shift is that of llama-cli and llama-server:
// when the context is full, the first half of the tokens after the kept ones is removed, and the
// positions of the others are lowered.
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const {getLlama, LlamaLogLevel} = await import(pathToFileURL(`${process.argv[2]}/dist/index.js`));
const {model: modelPath, ids, size, kept} = JSON.parse(readFileSync(0, "utf-8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 2 * size, flashAttention: false});
const sequence = context.getSequence();

function shift() { // node-llama-cpp's own method computes everything again if the first token goes
    const length = sequence._nextTokenIndex, removed = Math.floor((length - kept) / 2);
    context._ctx.removeTokenCellsFromSequence(sequence._sequenceId, kept, kept + removed);
    context._ctx.shiftSequenceTokenCells(sequence._sequenceId, kept + removed, length, -removed);
    sequence._contextTokens.splice(kept, removed);
    sequence._nextTokenIndex -= removed;
}

const losses = [];
for (let position = 0; position < ids.length - 1;) {
    if (sequence.nextTokenIndex === size)
        shift();
    const end = Math.min(ids.length - 1, position + size - sequence.nextTokenIndex);
    const whole = {temperature: 1, topK: 0, topP: 1, minP: 0}; // the whole vocabulary
    const inputs = ids.slice(position, end).map((id) => [id, {generateNext: {probabilities: true, options: whole}}]);
    for (const [i, {next}] of (await sequence.controlledEvaluate(inputs)).entries())
        losses.push(-Math.log(next.probabilities.get(ids[position + i + 1])));
    position = end;
}
process.stdout.write(JSON.stringify(losses), () => process.exit(0));
