/**
 * A small client of ODMA for Node.
 *
 * It keeps the promises that an engine must keep: one unanswered call a pool, seq
 * counted up by one, and after a lost answer the *same* message again until the
 * answer is here. It says which process it is and numbers what it sends, so that
 * a message that comes late changes nothing. Messages are plain objects with the
 * field names of the proto files.
 */
import { randomBytes } from 'node:crypto';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTO = join(dirname(fileURLToPath(import.meta.url)), '..', '..', 'proto');
const SERVICES = ['memory', 'pool', 'predictor', 'emulator'];

// Every uint64 of this contract stays below 2^53, so numbers lose nothing.
const FORM = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

const definition = protoLoader.loadSync(
  SERVICES.map((name) => `odma/v1/${name}_service.proto`),
  { ...FORM, includeDirs: [PROTO] },
);
const { odma } = grpc.loadPackageDefinition(definition);

// The part of google.rpc that errors carry in `grpc-status-details-bin`.
const text = (id) => ({ type: 'string', id });
const googleRpc = protoLoader.fromJSON({
  nested: {
    Any: { fields: { type_url: text(1), value: { type: 'bytes', id: 2 } } },
    Status: { fields: { details: { rule: 'repeated', type: 'Any', id: 3 } } },
    ErrorInfo: {
      fields: { reason: text(1), domain: text(2), metadata: { keyType: 'string', ...text(3) } },
    },
    RetryInfo: { fields: { retry_delay: { type: 'Duration', id: 1 } } },
    Duration: { fields: { seconds: { type: 'int64', id: 1 }, nanos: { type: 'int32', id: 2 } } },
    BadRequest: {
      fields: { field_violations: { rule: 'repeated', type: 'FieldViolation', id: 1 } },
      nested: { FieldViolation: { fields: { field: text(1), description: text(2) } } },
    },
  },
}, { ...FORM, arrays: true, objects: true });

const RETRIED = new Set([
  grpc.status.UNAVAILABLE,
  grpc.status.DEADLINE_EXCEEDED,
  grpc.status.CANCELLED, // by a service that shuts down
]);
const PERHAPS_DONE = new Set([...RETRIED, grpc.status.INTERNAL, grpc.status.UNKNOWN]);
const NOT_BEGUN = new Set(['BUSY', 'CALLER_LIMIT', 'STREAM_LIMIT']); // there was no room for it
const MOST_NUMBERS = 16; // of one message
const BACKOFF_SECONDS = { first: 0.05, most: 2 };

/**
 * @typedef {{handle: number, start_token: number, length_tokens: number,
 *   reused_tokens: number, shared_start_token: number, shared_tokens: number}} Place
 * @typedef {{handle: number, from_token: number, to_token: number, tokens: number,
 *   overlaps: boolean}} Copy
 * @typedef {{reason: string, free_tokens: number, largest_run_tokens: number,
 *   awaiting_completion_tokens: number, copy_tokens_needed: number,
 *   preempt_handle: number, retry_after_ms: number, field: string}} Refusal
 * @typedef {{place?: Place, refusal?: Refusal, freed?: {}, already_free?: {}}} Result
 * @typedef {{handle: number, used_tokens: number, pinned?: boolean,
 *   shareable_tokens?: number}} Used
 * @typedef {{free: object} | {trim: object} | {extend: object} | {allocate: object}} Op
 * @typedef {{seq: number, replayed: boolean, results: Result[], copies: Copy[],
 *   moved: Place[], policy_version: number}} Answer
 */

/** A status of the service, with what its details tell. */
export class OdmaError extends Error {
  /** @param {grpc.ServiceError} cause */
  constructor(cause) {
    super(`${grpc.status[cause.code]}: ${cause.details}`, { cause });
    /** @type {string} the status, as FAILED_PRECONDITION */
    this.code = grpc.status[cause.code];
    /** @type {string} the reason of its ErrorInfo */
    this.reason = '';
    /** @type {Record<string, string>} the metadata of its ErrorInfo */
    this.metadata = {};
    /** @type {{field: string, description: string}[]} fields that break a rule */
    this.fields = [];
    /** @type {Refusal | null} why a unary call was refused */
    this.refusal = null;
    /** @type {number} how long to wait before the next try, in milliseconds */
    this.retryAfterMs = 0;
    for (const bytes of cause.metadata?.get('grpc-status-details-bin') ?? []) this.#read(bytes);
  }

  #read(bytes) {
    for (const { type_url, value } of googleRpc.Status.deserialize(bytes).details) {
      const type = type_url.split('/').pop();
      if (type === 'google.rpc.ErrorInfo') {
        ({ reason: this.reason, metadata: this.metadata } =
          googleRpc.ErrorInfo.deserialize(value));
      } else if (type === 'google.rpc.BadRequest') {
        this.fields = googleRpc.BadRequest.deserialize(value).field_violations;
      } else if (type === 'google.rpc.RetryInfo') {
        const delay = googleRpc.RetryInfo.deserialize(value).retry_delay;
        this.retryAfterMs = delay.seconds * 1000 + delay.nanos / 1e6;
      } else if (type === 'odma.v1.Refusal') {
        this.refusal = definition[type].deserialize(value);
      }
    }
  }
}

/** Another process owns the pool: stop using its memory, and do not open it again by yourself. */
export class FencedError extends OdmaError {}

function failure(cause) {
  if (!('code' in cause && 'details' in cause)) return cause;
  const error = new OdmaError(cause);
  return error.reason === 'FENCED' ? new FencedError(cause) : error;
}

/** A connection to the service, for one call at a time. */
export class Client {
  #instance = randomBytes(16);
  #attempts = 0; // of OpenPool
  #target;
  #timeoutMs;
  #retryMs;
  #credentials;
  #metadata = new grpc.Metadata();
  #stubs = [];

  /**
   * @param {string} target as "127.0.0.1:50051" or "unix:/run/odma.sock"
   * @param {{timeoutSeconds?: number, retrySeconds?: number,
   *   tls?: {ca?: Buffer, cert?: Buffer, key?: Buffer}, token?: string}} [options] how long
   *   one attempt may take, and how long to try again when the service is away; contents of
   *   PEM files, without them the connection is plain; the token that says who calls
   */
  constructor(target, { timeoutSeconds = 5, retrySeconds = 30, tls, token } = {}) {
    this.#target = target;
    this.#timeoutMs = timeoutSeconds * 1000;
    this.#retryMs = retrySeconds * 1000;
    this.#credentials = tls
      ? grpc.credentials.createSsl(tls.ca, tls.key, tls.cert)
      : grpc.credentials.createInsecure();
    if (token) this.#metadata.set('authorization', `Bearer ${token}`);
    this.#connect();
  }

  /**
   * Call an rpc by its name, the same message again while the service is away or has no room.
   * @param {string} rpc as "Apply"
   * @param {object} message
   * @param {ApplyStream} [stream] to send an Apply over
   * @returns {Promise<any>}
   */
  async call(rpc, message, stream) {
    return this.#untilAnswered(() => (
      stream ? stream.attempt(message) : this.#attempt(rpc, message)));
  }

  async #untilAnswered(attempt) {
    const giveUp = Date.now() + this.#retryMs;
    for (let wait = BACKOFF_SECONDS.first; ; wait = Math.min(2 * wait, BACKOFF_SECONDS.most)) {
      let pause = wait * 1000;
      try {
        return await attempt();
      } catch (cause) {
        const error = failure(cause);
        pause = Math.max(pause, error.retryAfterMs ?? 0);
        const again = RETRIED.has(cause.code) || NOT_BEGUN.has(error.reason);
        if (!again || Date.now() + pause > giveUp) throw error;
      }
      await sleep(pause);
      this.#connect();
    }
  }

  /**
   * Start an epoch of a pool, or go on with that of the same open_id as its owner.
   * @param {object} message an OpenPoolRequest; instance, attempt and seen are put in here
   * @returns {Promise<Pool>}
   */
  async openPool(message) {
    for (let seen = ''; ;) {
      const asked = () => (
        { ...message, instance: this.#instance, attempt: ++this.#attempts, seen });
      try {
        return new Pool(this, await this.#untilAnswered(() => this.#attempt('OpenPool', asked())));
      } catch (error) { // the pool was not as seen, or an answer was lost
        if (error.reason !== 'OPEN_STALE') throw error;
        seen = error.metadata.seen ?? '';
      }
    }
  }

  /**
   * Close a pool as an operator, whoever owns it. Nothing may be enqueued that uses its memory.
   * @param {{name: string, epoch: number}} pool as GetPool and ListPools tell it
   */
  async closePool({ name, epoch }) {
    await this.call('ClosePool', { pool: { name, epoch }, by_operator: true });
  }

  /**
   * Remove a closed pool and what it has learnt; one that is gone stays gone.
   * @param {{name: string, epoch: number}} pool as for closePool
   */
  async forgetPool({ name, epoch }) {
    await this.call('ForgetPool', { pool: { name, epoch } });
  }

  /**
   * Change the policy of an open pool as an operator. If it throws VERSION, read the pool: after
   * a lost answer that may be its own change.
   * @param {{name: string, epoch: number}} pool as for closePool
   * @param {object} policy a PolicyChange
   * @param {number} expected_version that of the policy which was read
   * @returns {Promise<object>} the Policy in force
   */
  async setPolicy({ name, epoch }, policy, expected_version) {
    const message = { pool: { name, epoch }, policy, expected_version };
    return (await this.call('SetPolicy', message)).policy;
  }

  /**
   * Find bucket limits anew, as an operator. VERSION means what it does for setPolicy.
   * @param {{name: string, epoch: number}} pool as for closePool
   * @param {{expected_version: number, dry_run?: boolean, limits?: number}} how
   * @returns {Promise<object>} the RecalibrateResponse
   */
  async recalibrate({ name, epoch }, how) {
    return this.call('Recalibrate', { pool: { name, epoch }, ...how });
  }

  /** @returns {ApplyStream} which is opened when it is first used */
  stream() {
    return new ApplyStream(() => this.#stub('Stream').Stream(this.#metadata), this.#timeoutMs);
  }

  close() {
    for (const stub of this.#stubs) stub.close();
    this.#stubs = [];
  }

  // A new connection each time: a broken one may take minutes to be noticed.
  #connect() {
    this.close();
    this.#stubs = SERVICES.map((name) => {
      const Stub = odma.v1[`${name[0].toUpperCase()}${name.slice(1)}Service`];
      return new Stub(this.#target, this.#credentials, {
        'grpc.use_local_subchannel_pool': 1,
        'grpc.enable_http_proxy': 0,
      });
    });
  }

  #stub(rpc) {
    const stub = this.#stubs.find((one) => typeof one[rpc] === 'function');
    if (!stub) throw new TypeError(`no service has an rpc ${rpc}, or the client is closed`);
    return stub;
  }

  #attempt(rpc, message) {
    const stub = this.#stub(rpc);
    const deadline = Date.now() + this.#timeoutMs;
    return new Promise((resolve, reject) => {
      stub[rpc](message, this.#metadata, { deadline }, (error, answer) =>
        (error ? reject(error) : resolve(answer)));
    });
  }
}

/** Apply over a stream: one message, one answer. Opened anew after it broke. */
export class ApplyStream {
  #open;
  #timeoutMs;
  #call = null;
  #waiting = null; // {resolve, reject} of the message without an answer
  #failure = null; // how the stream ended while nobody waited

  constructor(open, timeoutMs) {
    this.#open = open;
    this.#timeoutMs = timeoutMs;
  }

  /** Send a message once; its answer, or how the stream ended. */
  async attempt(apply) {
    this.#call ??= this.#opened();
    const call = this.#call;
    const late = setTimeout(() => call.cancel(), this.#timeoutMs);
    try {
      return await new Promise((resolve, reject) => {
        this.#waiting = { resolve, reject };
        if (this.#failure) reject(this.#failure);
        else call.write({ apply });
      });
    } catch (failure) {
      this.close();
      throw failure;
    } finally {
      clearTimeout(late);
      this.#waiting = null;
    }
  }

  close() {
    this.#call?.cancel();
    this.#call = this.#failure = null;
  }

  #opened() {
    const call = this.#open();
    call.on('data', ({ apply }) => this.#waiting?.resolve(apply));
    call.on('error', (failure) => {
      if (call !== this.#call) return; // it was left
      if (this.#waiting) this.#waiting.reject(failure);
      else this.#failure = failure;
    });
    return call;
  }
}

/**
 * One epoch of a pool. What is sent is numbered here, and sent one after the other. After a
 * FencedError every call throws it: the pool has another owner.
 */
export class Pool {
  #client;
  #stream;
  #number = 0;
  #fenced = null;
  #before = Promise.resolve(); // ends with the call before

  /**
   * @param {Client} client
   * @param {object} opened the OpenPoolResponse
   */
  constructor(client, opened) {
    this.#client = client;
    /** The OpenPoolResponse: capacity_tokens, block_tokens, max_ops and so on. */
    this.opened = opened;
    /** The last answered seq. */
    this.seq = 0;
    /** What was promised to be completed. */
    this.completedSeq = 0;
    /** A batch without an answer, which was done or not; else null. */
    this.pending = null;
  }

  /**
   * Do the operations of one decode step. If it throws UNAVAILABLE nobody knows whether the
   * batch was done, if BUSY, CALLER_LIMIT or STREAM_LIMIT there was no room for it: resume().
   * @param {{used?: Used[], ops?: Op[], completedSeq?: number, maxCopyTokens?: number,
   *   passRefused?: boolean}} batch completedSeq unset: as in the batch before;
   *   maxCopyTokens unset: the policy's
   * @returns {Promise<Answer>}
   */
  async apply({ used = [], ops = [], completedSeq, maxCopyTokens, passRefused = false }) {
    return this.#inTurn(() => {
      this.#insistOnAnswers();
      this.pending = {
        seq: this.seq + 1,
        completed_seq: completedSeq ?? this.completedSeq,
        pass_refused: passRefused,
        used,
        ops,
      };
      if (maxCopyTokens !== undefined) this.pending.max_copy_tokens = maxCopyTokens;
      return this.#finish();
    });
  }

  /**
   * Have the batch answered that has no answer.
   * @returns {Promise<Answer>}
   */
  async resume() {
    return this.#inTurn(() => {
      if (!this.pending) throw new Error('every batch was answered');
      return this.#finish();
    });
  }

  async #finish() {
    const message = this.pending;
    try {
      const answer = await this.#send('Apply', message, this.#stream);
      this.seq = answer.seq;
      this.completedSeq = message.completed_seq;
      this.pending = null;
      return answer;
    } catch (error) {
      const kept = PERHAPS_DONE.has(grpc.status[error.code]) || NOT_BEGUN.has(error.reason);
      if (error instanceof OdmaError && !kept) this.pending = null; // it was answered
      throw error;
    }
  }

  /** Send batches over one stream from now on, which takes less time than calls. */
  startStream() {
    this.#stream ??= this.#client.stream();
  }

  /** Send batches as calls again. */
  endStream() {
    this.#stream?.close();
    this.#stream = undefined;
  }

  /**
   * Tell that the owner lives, when it has nothing else to say for ttl_seconds.
   * @returns {Promise<{ttl_seconds: number, retention_seconds: number}>}
   */
  async keepAlive() {
    return this.#inTurn(() => this.#client.call('KeepAlive', { pool: this.opened.pool }));
  }

  /**
   * After the engine lost its own state: keep these regions, free all others.
   * @param {number[]} handles none at all drops a batch without an answer, too
   * @param {number} [completedSeq] the copies of the answers so far are done; below the last
   *   answered seq nothing can be kept. Unset: the last answer that came here.
   * @returns {Promise<{kept: Place[], unknown: number[], freed: number[], last_seq: number}>}
   */
  async reconcile(handles, completedSeq) {
    return this.#inTurn(async () => {
      if (handles.length) this.#insistOnAnswers();
      const completed_seq = completedSeq ?? this.seq;
      const answer = await this.#send('Reconcile', { handles, completed_seq });
      this.pending = null;
      this.seq = answer.last_seq;
      this.completedSeq = answer.last_seq;
      return answer;
    });
  }

  /**
   * @param {object} alloc an Alloc
   * @returns {Promise<Place>}
   */
  async allocate(alloc) {
    return (await this.#unary('Allocate', { allocate: alloc })).place;
  }

  /**
   * @param {object} extend an Extend
   * @returns {Promise<Place>}
   */
  async extend(extend) {
    return (await this.#unary('Extend', { extend })).place;
  }

  /**
   * @param {object} freeing a Freeing
   * @returns {Promise<boolean>} whether it had been given back before
   */
  async free(freeing) {
    return (await this.#unary('Free', { free: freeing })).already_free;
  }

  /** @returns {Promise<object>} the GetPoolResponse */
  async books() {
    return this.#client.call('GetPool', { name: this.opened.pool.name });
  }

  /** End the epoch. No work that uses the pool's memory may be enqueued. */
  async close() {
    this.endStream();
    await this.#inTurn(() => this.#send('ClosePool', {}));
  }

  #unary(rpc, message) {
    return this.#inTurn(() => {
      this.#insistOnAnswers();
      return this.#send(rpc, message);
    });
  }

  /** Do it when the call before has ended. */
  #inTurn(act) {
    const turn = this.#before.then(async () => {
      if (this.#fenced) throw this.#fenced;
      try {
        return await act();
      } catch (error) {
        if (error instanceof FencedError) this.#fenced = error;
        throw error;
      }
    });
    this.#before = turn.catch(() => {});
    return turn;
  }

  #insistOnAnswers() {
    if (this.pending) throw new Error(`batch ${this.pending.seq} has no answer: resume()`);
  }

  /** Send a message under the next number, and again under another if that was used up. */
  async #send(rpc, message, stream) {
    for (let tries = MOST_NUMBERS; ; tries--) {
      const pool = { ...this.opened.pool };
      if (pool.owner) pool.number = ++this.#number;
      try {
        return await this.#client.call(rpc, { pool, ...message }, stream);
      } catch (error) {
        if (error.reason !== 'LATE' || tries === 1) throw error;
        this.#number = Math.max(this.#number, Number(error.metadata.last ?? 0));
      }
    }
  }
}
