/**
 * Keys that stand for the beginning of a request, one for each granule of its tokens: what an
 * Alloc and a Freeing carry in a pool that reuses. odma_service/keys.py says how they are made.
 */
import { createHash } from 'node:crypto';

const KEY_BYTES = 16;

const sha256 = (...parts) => {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part);
  return hash.digest();
};

/** The keys of one request, made as its tokens come. */
export class KeyChain {
  #granuleTokens;
  #link;
  #begun = [];
  #keys = [];

  /**
   * @param {number} granuleTokens of the pool
   * @param {Buffer | string} salt secret, and another one for each adapter, model and tenant
   */
  constructor(granuleTokens, salt) {
    if (!(granuleTokens >= 1)) throw new RangeError(`granuleTokens: at least 1, not ${granuleTokens}`);
    this.#granuleTokens = granuleTokens;
    this.#link = sha256(salt);
  }

  /** @returns {Buffer} of all whole granules so far, 16 bytes each */
  get keys() {
    return Buffer.concat(this.#keys);
  }

  /**
   * Take the next tokens, and return the keys.
   * @param {Iterable<number>} tokens each from 0 to 2^32 - 1; a RangeError for another
   * @returns {Buffer}
   */
  add(tokens) {
    for (const token of tokens) {
      this.#begun.push(token);
      if (this.#begun.length < this.#granuleTokens) continue;
      const granule = Buffer.alloc(4 * this.#granuleTokens);
      this.#begun.forEach((one, i) => granule.writeUInt32LE(one, 4 * i));
      this.#link = sha256(this.#link, granule);
      this.#keys.push(this.#link.subarray(0, KEY_BYTES));
      this.#begun = [];
    }
    return this.keys;
  }
}

/** The keys of the whole granules of `tokens`: see KeyChain. */
export function chainedKeys(tokens, granuleTokens, salt) {
  return new KeyChain(granuleTokens, salt).add(tokens);
}
