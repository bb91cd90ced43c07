// The main calls of the ollama npm client. `node calls.mjs BASE MODEL COPY` prints one JSON object of what came back;
// any error of the client ends it with a status other than 0.
import { Ollama } from "ollama";

const [base, model, copy] = process.argv.slice(2);
const ollama = new Ollama({ host: base });
const messages = [{ role: "user", content: "What is the capital of France? Answer in one word." }];
const options = { temperature: 0, num_predict: 8, seed: 7 };

async function collect(stream, text) {
  let parts = 0;
  let said = "";
  let last = null;
  for await (const part of stream) {
    parts += 1;
    said += text(part);
    last = part;
  }
  return { parts, said, last };
}

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return { name: error.name, message: error.message, status: error.status_code ?? null };
  }
  return null;
}

async function aborted() {
  const own = new Ollama({ host: base });
  const stream = await own.chat({ model, messages, stream: true, options: { ...options, num_predict: 400 } });
  setTimeout(() => own.abort(), 0);
  return refusal(async () => {
    for await (const _ of stream);
  });
}

const found = {
  version: await ollama.version(),
  chat: await ollama.chat({ model, messages, options }),
  chatStream: await collect(await ollama.chat({ model, messages, options, stream: true }), (p) => p.message.content),
  generate: await ollama.generate({ model, prompt: "Say yes.", options }),
  generateStream: await collect(
    await ollama.generate({ model, prompt: "Say yes.", options, stream: true }),
    (p) => p.response,
  ),
  accents: await collect(
    await ollama.generate({ model, prompt: "é ü 模型 🦙 é ü 模型 🦙 é ü", raw: true, options, stream: true }),
    (p) => p.response,
  ),
  embed: await ollama.embed({ model, input: ["a cat", "a kitten"] }),
  embeddings: await ollama.embeddings({ model, prompt: "a cat" }),
  list: await ollama.list(),
  ps: await ollama.ps(),
  show: await ollama.show({ model }),
  created: await collect(await ollama.create({ model: copy, from: model, stream: true }), (p) => p.status + "\n"),
  copied: await ollama.copy({ source: copy, destination: copy + "-2" }),
  deleted: [await ollama.delete({ model: copy }), await ollama.delete({ model: copy + "-2" })],
  unknown: await refusal(() => ollama.chat({ model: "nobody", messages })),
  pushed: await refusal(() => ollama.push({ model })),
  aborted: await aborted(),
};
console.log(JSON.stringify(found));
