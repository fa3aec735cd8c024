/**
 * Plays the conformance scenarios against a server.
 *
 *     node runner.js 127.0.0.1:50051 [PART OF A NAME]
 *
 * tests/conformance/README.md explains the file and what is checked.
 */
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import { Client, OdmaError } from '../../examples/javascript/client.js';

const KEY_BYTES = 16;
const FILE = new URL('scenarios.json', import.meta.url);
const BY_NAME = new Set(['GetPool', 'ListRegions']);
const WITHOUT_POOL = new Set([...BY_NAME, 'OpenPool', 'ListPools', 'Predict', 'EstimateAccess']);

class Failure extends Error {}

function insist(fact, message) {
  if (!fact) throw new Failure(message);
}

const isObject = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);
const isName = (value) => typeof value === 'string' && value.startsWith('$');
const show = (value) => JSON.stringify(value);

// --- messages and patterns ---

/** Replace names and expressions in a message. */
function fill(value, names) {
  if (isName(value)) {
    insist(names.has(value), `${value} is not bound`);
    return names.get(value);
  }
  if (Array.isArray(value)) return value.map((item) => fill(item, names));
  if (!isObject(value)) return value;
  if ('$plus' in value) return fill(value.$plus, names).reduce((sum, term) => sum + term);
  if ('$times' in value) {
    const [times, item] = fill(value.$times, names);
    return typeof item === 'string' ? item.repeat(times) : Array(times).fill(item);
  }
  if ('$keys' in value) {
    const keys = [...fill(value.$keys, names)].map((letter) => letter.repeat(KEY_BYTES));
    return Buffer.from(keys.join('')).toString('base64');
  }
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, fill(item, names)]));
}

/** Throw unless `value` matches; bind the names that are met first. */
function match(pattern, value, names, path) {
  const wrong = (why) => new Failure(`${path}: ${why}, not ${show(value)}`);
  if (pattern === '$any') return;
  if (isName(pattern)) {
    if (!names.has(pattern)) names.set(pattern, value);
    const bound = names.get(pattern);
    if (!isDeepStrictEqual(value, bound)) throw wrong(`${pattern} is ${show(bound)}`);
  } else if (Array.isArray(pattern)) {
    if (!Array.isArray(value) || value.length !== pattern.length) throw wrong(show(pattern));
    pattern.forEach((item, i) => match(item, value[i], names, `${path}[${i}]`));
  } else if (!isObject(pattern)) {
    if (value !== pattern) throw wrong(show(pattern));
  } else if (Object.keys(pattern).some(isName)) {
    for (const [kind, wanted] of Object.entries(pattern)) {
      if (!holds(kind, wanted, value, names, path)) throw wrong(`${kind} ${show(wanted)}`);
    }
  } else {
    if (!isObject(value)) throw wrong(show(pattern));
    for (const [key, item] of Object.entries(pattern)) {
      insist(key in value, `${path} has no ${key}`);
      match(item, value[key], names, `${path}.${key}`);
    }
  }
}

function holds(kind, wanted, value, names, path) {
  switch (kind) {
    case '$in': return fill(wanted, names).some((item) => isDeepStrictEqual(item, value));
    case '$range': return fill(wanted[0], names) <= value && value <= fill(wanted[1], names);
    case '$contains': return typeof value === 'string' && value.includes(wanted);
    case '$not': return !isDeepStrictEqual(fill(wanted, names), value);
    case '$plus': return fill({ $plus: wanted }, names) === value;
    case '$as': match(wanted, value, names, path); return true;
    case '$unordered': return Array.isArray(value) && inSomeOrder(wanted, value, names, path);
    default: throw new Failure(`${kind} is no pattern`);
  }
}

function inSomeOrder(patterns, values, names, path) {
  if (patterns.length !== values.length) return false;
  const left = [...values];
  return patterns.every((pattern) => {
    const found = left.findIndex((value) => {
      const trial = new Map(names);
      try {
        match(pattern, value, trial, path);
      } catch {
        return false;
      }
      trial.forEach((bound, name) => names.set(name, bound));
      return true;
    });
    if (found >= 0) left.splice(found, 1);
    return found >= 0;
  });
}

// --- the engine ---

/** The keys that an Alloc or a Freeing brings, each in base64. */
function keysIn({ keys = '' } = {}) {
  const data = Buffer.from(keys, 'base64');
  const count = Math.ceil(data.length / KEY_BYTES);
  return Array.from({ length: count }, (_, i) => (
    data.subarray(i * KEY_BYTES, (i + 1) * KEY_BYTES).toString('base64')));
}

/** Where a token of a region lies. */
function at({ start, sharedStart, shared }, token) {
  return token < shared ? sharedStart + token : start + token - shared;
}

/** What an engine knows of one epoch, and the memory that it writes. */
class Engine {
  constructor(request, opened) {
    this.request = request;
    this.opened = opened;
    this.seq = 0;
    // handle -> {start, length, written, reused, sharedStart, shared, keys of its granules}
    this.regions = new Map();
    this.memory = Array(opened.capacity_tokens).fill('');
    this.vacatedBy = Array(opened.capacity_tokens).fill(0); // seq of the batch that left it
    this.readBy = Array(opened.capacity_tokens).fill(0); // seq of the batch that gathered from it
  }

  get ordered() {
    return Boolean(this.request.single_ordered_stream);
  }

  /** Take an answer of Apply: copies first, then places. */
  applied(batch, answer) {
    const used = new Map(batch.used.map((one) => [one.handle, one]));
    for (const [handle, region] of this.regions) {
      this.#write(handle, region, used.get(handle)?.used_tokens ?? 0);
    }
    for (const { free } of batch.ops) if (free) this.#name(free);
    const owners = this.#owners();
    this.#copy(batch, answer, used, owners);
    batch.ops.forEach((op, i) => {
      const { place, refusal } = answer.results[i];
      if (place) this.placed(place, op.allocate);
      else if (!refusal && op.free) this.regions.delete(op.free.handle);
    });
    answer.moved.forEach((place) => this.placed(place));
    this.#vacate(owners, batch);
    this.seq = answer.seq;
  }

  /** Take a place; its region may be new, then `asked` is its Alloc. */
  placed(place, asked) {
    const { handle, start_token: start, length_tokens: length, reused_tokens: reused } = place;
    const { shared_start_token: sharedStart, shared_tokens: shared } = place;
    if (length === 0) return;
    const before = this.regions.get(handle) ?? { written: reused, keys: keysIn(asked) };
    const written = Math.min(before.written, length);
    this.regions.set(handle,
      { start, length, written, reused, sharedStart, shared, keys: before.keys });
  }

  /** A region is no more, by a unary Free. */
  freed(free) {
    this.#name(free);
    this.regions.delete(free.handle);
  }

  kept(handles) {
    for (const handle of this.regions.keys()) {
      if (!handles.includes(handle)) this.regions.delete(handle);
    }
    this.vacatedBy.fill(0);
    this.readBy.fill(0);
  }

  /** The rules that hold between calls. */
  check() {
    const { block_tokens: block, capacity_tokens: capacity } = this.opened;
    this.#owners();
    for (const [handle, region] of this.regions) {
      const { start, length, shared, written } = region;
      insist(start % block === 0 && length % block === 0, `${handle} is not whole blocks`);
      insist(start + length - shared <= capacity, `${handle} ends beyond the capacity`);
      for (let i = 0; i < written; i++) {
        insist(this.memory[at(region, i)] === this.#token(handle, i),
          `token ${i} of ${handle} is lost`);
      }
    }
  }

  /** What a written token is: the same in all requests whose granule has this key. */
  #token(handle, i) {
    const granule = Math.floor(i / this.opened.granule_tokens); // Infinity or NaN without granules
    return `${this.regions.get(handle).keys[granule] ?? handle}:${i}`;
  }

  #write(handle, region, tokens) {
    for (let i = region.written; i < tokens; i++) {
      this.memory[at(region, i)] = this.#token(handle, i);
    }
    region.written = Math.max(region.written, tokens);
  }

  /** Give what a region has written the keys that its Free brings. */
  #name(free) {
    const region = this.regions.get(free.handle);
    if (!region) return;
    region.keys = [...region.keys, ...keysIn(free)];
    for (let i = 0; i < region.written; i++) {
      this.memory[at(region, i)] = this.#token(free.handle, i);
    }
  }

  #owners() {
    const owners = Array(this.opened.capacity_tokens).fill(0);
    for (const [handle, { start, length, shared }] of this.regions) {
      for (let i = start; i < start + length - shared; i++) {
        insist(!owners[i], `${handle} and ${owners[i]} both hold token ${i}`);
        owners[i] = handle;
      }
    }
    return owners;
  }

  #copy(batch, answer, used, owners) {
    const { moves, copies_may_overlap: mayOverlap } = this.request;
    const growing = new Set(batch.ops.filter((op) => op.extend).map((op) => op.extend.handle));
    const lies = new Map(); // handle -> where each of its tokens is now
    const ended = new Set(batch.ops.filter((op) => op.free).map((op) => op.free.handle));
    for (const [handle, region] of this.regions) {
      if (ended.has(handle)) continue;
      lies.set(handle, Array.from({ length: region.written }, (_, i) => at(region, i)));
    }
    const admitted = new Map(); // handle -> what a new region reuses
    answer.results.forEach(({ place }, i) => {
      if (batch.ops[i].allocate && place && !this.regions.has(place.handle)) {
        admitted.set(place.handle, place.reused_tokens);
      }
    });
    let carried = 0;
    const targets = new Set();
    for (const copy of answer.copies) {
      const { handle, from_token: from, to_token: to, tokens, overlaps } = copy;
      const what = `copy ${show(copy)}`;
      const gathers = admitted.has(handle);
      insist(gathers || moves === 'MOVES_ANY'
        || (moves === 'MOVES_OWN_GROWTH' && growing.has(handle)), `${what} is against ${moves}`);
      insist(!used.get(handle)?.pinned, `${what} is of a pinned region`);
      const most = gathers ? admitted.get(handle) : this.#mostCopied(handle, used, what);
      insist(tokens >= 1 && tokens <= most, `${what} carries more than ${most}`);
      insist(overlaps === Math.abs(from - to) < tokens, `${what}: overlaps is wrong`);
      insist(!overlaps || mayOverlap, `${what} may not overlap`);
      for (let i = to; i < to + tokens && !this.ordered; i++) {
        insist(!owners[i] && !targets.has(i)
          && Math.max(this.vacatedBy[i], this.readBy[i]) <= (batch.completed_seq ?? 0),
        `${what} writes where something may still read`);
        targets.add(i);
      }
      if (gathers) this.readBy.fill(batch.seq, from, from + tokens);
      const data = this.memory.slice(from, from + tokens);
      this.memory.splice(to, tokens, ...data);
      const moved = (lies.get(handle) ?? []).map((i) => (
        i >= from && i < from + tokens ? i - from + to : i));
      lies.set(handle, moved);
      for (const [one, places] of lies) {
        places.forEach((place, i) => insist(this.memory[place] === this.#token(one, i),
          `${what} loses token ${i} of ${one}`));
      }
      carried += tokens;
    }
    insist(carried <= (batch.max_copy_tokens ?? Infinity), `copies carry ${carried} tokens`);
  }

  /** The most that a copy of a region that is there, or of a kept run, may carry. */
  #mostCopied(handle, used, what) {
    const { capacity_tokens: capacity, granule_tokens: granule } = this.opened;
    if (!handle && granule) return capacity;
    const region = this.regions.get(handle);
    insist(region, `${what} is of no live region`);
    const { length, reused, keys } = region;
    return Math.max(used.get(handle)?.used_tokens ?? length, reused, keys.length * granule);
  }

  #vacate(before, batch) {
    const after = this.#owners();
    for (let i = 0; i < after.length; i++) {
      if (after[i] && after[i] !== before[i] && !this.ordered) {
        const { start, shared, reused } = this.regions.get(after[i]);
        const adopted = i - start + shared < reused; // read, and not written
        const last = Math.max(this.vacatedBy[i], adopted ? 0 : this.readBy[i]);
        insist(!before[i] && last <= batch.completed_seq,
          `token ${i} is given out before its completion`);
      }
      if (before[i] && after[i] !== before[i]) this.vacatedBy[i] = batch.seq;
    }
  }
}

// --- playing ---

class Player {
  constructor(client, { defaults, parts }) {
    this.client = client;
    this.defaults = defaults;
    this.parts = parts;
    const mark = randomBytes(6).toString('hex');
    this.names = new Map([['$name', `conformance-${mark}`]]);
    for (const id of ['$id', '$id2', '$id3']) this.names.set(id, `${mark}${id.slice(1)}`);
    this.engines = new Map(); // pool name -> the engine of its latest epoch
    this.streams = new Map();
  }

  async play(steps) {
    for (const [i, step] of steps.entries()) {
      try {
        await this.step(step);
      } catch (error) {
        error.message = `step ${i + 1}${step.rpc ? ` (${step.rpc})` : ''}: ${error.message}`;
        throw error;
      }
    }
  }

  async step(step) {
    if (step.repeat) {
      for (let n = 0; n < step.repeat; n++) {
        const outside = new Map(this.names);
        await this.play(step.steps);
        this.names = outside;
      }
    } else if (step.sort) {
      const { regions } = this.engine();
      const handles = fill(step.sort, this.names);
      handles.sort((a, b) => regions.get(a).start - regions.get(b).start);
      step.as.forEach((name, i) => this.names.set(name, handles[i]));
    } else if (step.play) {
      await this.play(this.parts[step.play]);
    } else if (step.error) {
      await this.fail(step);
    } else if (step.invalid) {
      const field = { $contains: step.invalid };
      await this.fail({ ...step, error: { code: 'INVALID_ARGUMENT', reason: 'INVALID', field } });
    } else {
      await this.succeed(step);
    }
  }

  async fail({ rpc, send, stream, error: wanted }) {
    const before = await this.books();
    let error;
    try {
      await this.client.call(rpc, this.message(rpc, send), this.stream(stream));
    } catch (thrown) {
      if (!(thrown instanceof OdmaError)) throw thrown;
      error = thrown;
    }
    insist(error, `no error, but ${show(wanted)} is right`);
    const { code, reason, metadata, refusal } = error;
    const field = error.fields[0]?.field ?? '';
    match(wanted, { code, reason, metadata, refusal, field }, this.names, 'error');
    insist(isDeepStrictEqual(await this.books(), before), 'the books changed');
  }

  async succeed({ rpc, send, stream, expect = {} }) {
    const message = this.message(rpc, send);
    const before = await this.books();
    const answer = await this.client.call(rpc, message, this.stream(stream));
    this.note(rpc, message, answer);
    const always = { Apply: { replayed: false, copies: [], moved: [] } }[rpc] ?? {};
    match({ ...always, ...expect }, answer, this.names, 'answer');
    if (answer.replayed) insist(isDeepStrictEqual(await this.books(), before), 'the books changed');
    await this.agree();
  }

  /** The stream of a name, opened when the name is first met; undefined without a name. */
  stream(name) {
    if (name && !this.streams.has(name)) this.streams.set(name, this.client.stream());
    return this.streams.get(name);
  }

  /** What is sent: the step's message with the fields that it leaves out. */
  message(rpc, send = {}) {
    let message = fill(send, this.names);
    if (rpc === 'OpenPool') {
      const { names } = this;
      message = { name: names.get('$name'), open_id: names.get('$id'), ...this.defaults, ...message };
      for (const [key, value] of Object.entries(message)) if (value === null) delete message[key];
    }
    if (BY_NAME.has(rpc)) message = { name: this.names.get('$name'), ...message };
    if (!WITHOUT_POOL.has(rpc)) message = { pool: this.names.get('$pool'), ...message };
    if (rpc === 'Apply') {
      const seq = this.engines.get(message.pool.name)?.seq ?? 0;
      message = { seq: seq + 1, completed_seq: seq, used: [], ops: [], ...message };
    }
    return message;
  }

  engine() {
    return this.engines.get(this.names.get('$pool')?.name);
  }

  /** Tell the engine what was answered. */
  note(rpc, message, answer) {
    const engine = this.engine();
    if (rpc === 'OpenPool') {
      const { name, epoch } = answer.pool;
      this.names.set('$pool', answer.pool);
      if (this.engines.get(name)?.opened.pool.epoch !== epoch) {
        this.engines.set(name, new Engine(message, answer));
      }
    } else if (rpc === 'ClosePool') {
      this.engines.delete(message.pool.name);
    } else if (rpc === 'ForgetPool') {
      this.names.delete('$pool');
    } else if (rpc === 'Apply' && !answer.replayed) {
      insist(answer.seq === message.seq, `the answer is of seq ${answer.seq}`);
      insist(answer.results.length === message.ops.length, 'a result for each operation');
      engine.applied(message, answer);
    } else if (rpc === 'Allocate' || rpc === 'Extend') {
      engine.placed(answer.place, message.allocate);
    } else if (rpc === 'Free') {
      engine.freed(message.free);
    } else if (rpc === 'Reconcile') {
      engine.kept(message.handles);
    }
  }

  /** The books of the scenario's pool, without clocks and counters. */
  async books() {
    const name = this.names.get('$pool')?.name;
    if (!name) return null;
    const { summary, counters, ...books } = await this.client.call('GetPool', { name });
    const { regions } = await this.client.call('ListRegions', { name });
    return { ...books, pool: summary.pool, free: summary.free_tokens, regions };
  }

  /** Whether every engine and the service believe the same. */
  async agree() {
    for (const [name, engine] of this.engines) {
      engine.check();
      const { summary, awaiting_completion_tokens: awaiting, completed_seq: completed } =
        await this.client.call('GetPool', { name });
      const { regions } = await this.client.call('ListRegions', { name });
      const live = regions.filter((region) => region.state === 'REGION_STATE_LIVE');
      const sum = (list) => list.reduce((all, { place }) => all + place.length_tokens, 0);
      const held = [...engine.regions.values()].reduce((all, one) => all + one.length - one.shared, 0);
      insist(live.length === engine.regions.size, 'the books list other regions');
      for (const { place } of live) {
        const { start, length } = engine.regions.get(place.handle) ?? {};
        insist(start === place.start_token && length === place.length_tokens,
          `the books have ${show(place)}, the engine ${start} + ${length}`);
      }
      const waiting = sum(regions.filter(({ state, awaits_seq: seq }) => (
        state === 'REGION_STATE_AWAITING_COMPLETION'
        || (state === 'REGION_STATE_KEPT' && seq > completed))));
      insist(waiting === awaiting, 'the books contradict themselves about what waits');
      insist(summary.free_tokens === engine.opened.capacity_tokens - held - waiting,
        'the books do not balance');
    }
  }

  async close() {
    for (const stream of this.streams.values()) stream.close();
    for (const { opened } of this.engines.values()) {
      const { name, epoch } = opened.pool;
      await this.client.call('ClosePool', { pool: { name, epoch }, by_operator: true });
    }
  }
}

async function main([target = '127.0.0.1:50051', part = '']) {
  const script = JSON.parse(readFileSync(FILE, 'utf8'));
  const client = new Client(target);
  let failed = 0;
  for (const { name, steps } of script.scenarios.filter((one) => one.name.includes(part))) {
    const player = new Player(client, script);
    try {
      await player.play(steps);
      console.log(`ok      ${name}`);
    } catch (error) {
      failed++;
      console.log(`FAILED  ${name}\n        ${error.message}`);
    }
    await player.close();
  }
  client.close();
  console.log(failed ? `${failed} scenarios failed` : 'all scenarios hold');
  process.exitCode = failed ? 1 : 0;
}

await main(process.argv.slice(2));
