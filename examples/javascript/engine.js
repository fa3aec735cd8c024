/**
 * A serving engine's decode step against ODMA, with a pretend device.
 *
 *     node engine.js 127.0.0.1:50051
 *
 * The device memory is an array of token ids. The engine executes every copy it
 * is told, and before each step it looks whether each token of each request
 * lies where the books say. It exits with 1 if one does not.
 *
 * The requests are turns of conversations: each begins with all that was said
 * before, and computes only what is not kept any more.
 */
import { randomBytes, randomUUID } from 'node:crypto';
import { Client } from './client.js';
import { chainedKeys } from './keys.js';

const CAPACITY = 4096;
const MODEL_LENGTH = 1024;
const TALKS = 25;
const TURNS = 4;
const BATCH_CAP = 32;
const GRANULE = 64;
const SALT = randomBytes(32);

let state = 7;
const random = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;

/** @typedef {{talk: number, turn: number, prompt: number, output: number, generated: number,
 *   place: import('./client.js').Place | null, preempt: boolean, keys: Buffer}} Request */

/** @returns {Request} the next turn of a conversation, behind so many tokens */
const nextTurn = (talk, turn, before) => ({
  talk,
  turn,
  prompt: before + 16 + Math.floor(random() * 84),
  output: Math.min(1 + Math.floor(80 / (random() + 0.08) - 70), 150),
  generated: 0,
  place: null,
  preempt: false,
  keys: Buffer.alloc(0), // as the Alloc had them
});

/** @type {Request[]} */
const queue = Array.from({ length: TALKS }, (_, talk) => nextTurn(talk, 0, 0));
/** @type {Request[]} */
let running = [];

const memory = new Uint32Array(CAPACITY);
const tokenId = (request, position) => (request.talk + 1) * 65536 + position;
const total = (request) => request.prompt + request.generated;
const finished = (request) => request.generated === request.output;
const count = {
  steps: 0, finished: 0, refusals: 0, preempted: 0, copies: 0, copied: 0, prefilled: 0, reused: 0,
  checked: 0,
};

function keysNow(request) {
  const tokens = Array.from({ length: total(request) }, (_, i) => tokenId(request, i));
  return chainedKeys(tokens, GRANULE, SALT);
}

function write(request, from) {
  for (let i = from; i < total(request); i++) {
    memory[request.place.start_token + i] = tokenId(request, i);
  }
}

function verify(request) {
  for (let i = 0; i < total(request); i++, count.checked++) {
    if (memory[request.place.start_token + i] !== tokenId(request, i)) {
      throw new Error(`token ${i} of conversation ${request.talk} is not where the books say`);
    }
  }
}

/** What this step asks, and whom each operation is about. */
function plan() {
  const asked = [];
  for (const request of running) {
    const handle = request.place.handle;
    if (finished(request) || request.preempt) {
      const end = finished(request) ? 'END_FINISHED' : 'END_PREEMPTED';
      const keys = keysNow(request).subarray(request.keys.length);
      const free = { handle, end, output_tokens: request.generated, keep_tokens: total(request), keys };
      asked.push([{ free }, request]);
    } else if (total(request) === request.place.length_tokens) {
      asked.push([{ extend: { handle, least_tokens: total(request) + 1 } }, request]);
    }
  }
  for (const request of queue.slice(0, BATCH_CAP - running.length)) {
    request.keys = keysNow(request);
    asked.push([{
      allocate: {
        request_id: `talk-${request.talk}`,
        prompt_tokens: request.prompt,
        generated_tokens: request.generated,
        max_total_tokens: MODEL_LENGTH,
        keys: request.keys,
      },
    }, request]);
  }
  return asked;
}

async function step(pool) {
  const asked = plan();
  const byHandle = new Map(running.map((request) => [request.place.handle, request]));
  const answer = await pool.apply({
    used: running.map((request) => ({
      handle: request.place.handle,
      used_tokens: total(request),
      shareable_tokens: total(request),
    })),
    ops: asked.map(([op]) => op),
    completedSeq: pool.seq, // this device has done all it was told before we ask again
  });

  for (const { from_token, to_token, tokens } of answer.copies) {
    memory.copyWithin(to_token, from_token, from_token + tokens);
    count.copies++;
    count.copied += tokens;
  }
  for (const place of answer.moved) byHandle.get(place.handle).place = place;
  answer.results.forEach((result, i) => settle(asked[i][1], result, byHandle));
  running = running.filter((request) => request.place);

  running.forEach(verify);
  for (const request of running) {
    if (finished(request) || total(request) === request.place.length_tokens) continue;
    request.generated++; // the decode step; without room it sits this one out
    write(request, total(request) - 1);
  }
  count.steps++;
}

/** Take the outcome of one operation into the engine's own state. */
function settle(request, { place, refusal }, byHandle) {
  if (place && request.place) {
    request.place = place;
  } else if (place) { // admitted: the prefill computes at once all that is not there yet
    queue.splice(queue.indexOf(request), 1);
    running.push(request);
    request.place = place;
    count.prefilled += total(request);
    count.reused += place.reused_tokens;
    write(request, place.reused_tokens);
  } else if (refusal) {
    if (refusal.reason !== 'REFUSAL_REASON_SKIPPED') count.refusals++;
    const full = ['REFUSAL_REASON_NO_SPACE', 'REFUSAL_REASON_FRAGMENTED'].includes(refusal.reason);
    const victim = byHandle.get(refusal.preempt_handle);
    if (full && victim?.place) victim.preempt = true;
  } else { // given back
    request.place = null;
    request.preempt = false;
    if (finished(request)) {
      count.finished++;
      const { talk, turn } = request;
      if (turn + 1 < TURNS) { // first, while what it continues is kept
        queue.unshift(nextTurn(talk, turn + 1, total(request)));
      }
    } else {
      count.preempted += queue.unshift(request) > 0;
    }
  }
}

const client = new Client(process.argv[2] ?? '127.0.0.1:50051');
try {
  const pool = await client.openPool({
    open_id: randomUUID(),
    name: 'example-javascript',
    geometry: { planes: [{ count: 56, bytes_per_token: 1024 }] },
    capacity_tokens: CAPACITY,
    model_length_tokens: MODEL_LENGTH,
    moves: 'MOVES_ANY',
    single_ordered_stream: true,
    copies_may_overlap: true,
    granule_tokens: GRANULE,
    take_over: true, // the memory of an earlier run is gone, and so is its owner
  });
  while (queue.length || running.length) await step(pool);
  const { summary } = await pool.books();
  if (summary.free_tokens !== CAPACITY) throw new Error('the books do not balance');
  await pool.close();
  console.log(Object.entries(count).map(([name, n]) => `${name} ${n}`).join(', '));
} catch (error) {
  console.error(`violation or failure: ${error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
