/* base.c - what every file of this room uses: sums of bytes, the changed grains
 * of the books, the arena's lock, and sentences of refusal.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *odma_status_name(odma_status status) {
    switch (status) {
        case ODMA_OK: return "ok";
        case ODMA_INVALID: return "invalid argument";
        case ODMA_EPOCH: return "the epoch is over";
        case ODMA_SEQ_CHANGED: return "the last seq with another body";
        case ODMA_SEQ_OLD: return "an old seq";
        case ODMA_SEQ_GAP: return "a seq beyond the next";
        case ODMA_VERSION: return "another policy version";
        case ODMA_NOT_FOUND: return "not found";
        case ODMA_EXISTS: return "exists already";
        case ODMA_LOCKED: return "open elsewhere";
        case ODMA_FOREIGN: return "not our file";
        case ODMA_MISMATCH: return "another layout or geometry";
        case ODMA_CORRUPT: return "corrupt";
        case ODMA_NO_SPACE: return "no space";
        case ODMA_IO: return "input/output error";
        case ODMA_BROKEN: return "the file changed under the arena";
        case ODMA_FORKED: return "attached by the parent process";
        case ODMA_FENCED: return "another owner has the epoch";
        case ODMA_UNFENCED: return "no owner number in an epoch that has one";
        case ODMA_LATE: return "a late message";
    }
    return "unknown status";
}

static odma_status __attribute__((format(printf, 3, 4)))
refuse(char reason[ODMA_REASON_BYTES], odma_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (reason != NULL) vsnprintf(reason, ODMA_REASON_BYTES, format, arguments);
    va_end(arguments);
    return status;
}

static bool within(double value, double least, double most) {
    return value >= least && value <= most; /* false for NaN */
}

/* --- bytes as words --- */

static inline uint64_t word_at(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

static inline bool has_zero_byte(uint64_t word) {
    return ((word - 0x0101010101010101ULL) & ~word & 0x8080808080808080ULL) != 0;
}

/* Whether only zero bytes follow the first one of an id or a name, which is whole words. */
static inline bool is_padded(const char *name, size_t bytes) {
    const uint8_t *at = (const uint8_t *)name, *end = at + bytes;
    while (at < end && !has_zero_byte(word_at(at))) at += 8;
    while (at < end && *at != 0) at++;
    uint64_t rest = 0;
    for (; end - at >= 8; at += 8) rest |= word_at(at);
    for (; at < end; at++) rest |= *at;
    return rest == 0;
}

/* Most operations bring no class and no tenant. */
static inline bool is_padded_name(const char name[ODMA_NAME_BYTES]) {
    const uint8_t *at = (const uint8_t *)name;
    uint64_t any = word_at(at) | word_at(at + 8) | word_at(at + 16) | word_at(at + 24);
    return any == 0 || is_padded(name, ODMA_NAME_BYTES);
}
_Static_assert(ODMA_NAME_BYTES == 32, "four words");

/* --- hashes --- */

/* The finalizer of MurmurHash3: a bijection that spreads every bit. */
static inline uint64_t mix(uint64_t value) {
    value ^= value >> 33;
    value *= 0xff51afd7ed558ccdULL;
    value ^= value >> 33;
    value *= 0xc4ceb9fe1a85ec53ULL;
    return value ^ (value >> 33);
}

/* One step of a quick hash, whose end is to be mixed. */
static inline uint64_t stir(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
    return hash << 29 | hash >> 35;
}

static uint64_t hash_bytes(const void *bytes, size_t count) {
    const uint8_t *from = bytes;
    uint64_t hash = count;
    for (; count >= 8; count -= 8, from += 8) {
        uint64_t word;
        memcpy(&word, from, 8);
        hash = stir(hash, word);
    }
    uint64_t rest = 0;
    memcpy(&rest, from, count);
    return mix(stir(hash, rest));
}

static inline uint64_t rolled(uint64_t word, int bits) {
    return word << bits | word >> (64 - bits);
}

static void sip_round(uint64_t v[4]) {
    v[0] += v[1], v[2] += v[3];
    v[1] = rolled(v[1], 13) ^ v[0], v[3] = rolled(v[3], 16) ^ v[2];
    v[2] += v[1], v[0] += v[3];
    v[1] = rolled(v[1], 17) ^ v[2], v[3] = rolled(v[3], 21) ^ v[0];
    v[0] = rolled(v[0], 32), v[2] = rolled(v[2], 32);
}

/* SipHash-2-4 of whole words: who does not know the key finds no two names of one hash. */
static uint64_t keyed_hash(const uint64_t key[2], const void *bytes, size_t count) {
    const uint8_t *from = bytes;
    uint64_t v[4] = {key[0] ^ 0x736f6d6570736575ULL, key[1] ^ 0x646f72616e646f6dULL,
                     key[0] ^ 0x6c7967656e657261ULL, key[1] ^ 0x7465646279746573ULL};
    for (size_t i = 0; i <= count; i += 8) {
        uint64_t word = i < count ? word_at(from + i) : (uint64_t)count << 56;
        v[3] ^= word;
        for (int round = 0; round < 2; round++) sip_round(v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for (int round = 0; round < 4; round++) sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* --- changes of the books --- */

/* A grain is about to be committed. */
static inline void mark_grain(odma_arena *arena, uint32_t grain) {
    uint64_t bit = (uint64_t)1 << (grain % 64);
    if (arena->dirty_bits[grain / 64] & bit) return;
    arena->dirty_bits[grain / 64] |= bit;
    arena->dirty[arena->dirty_count++] = grain;
}

static void books_mark(odma_arena *arena, const void *object, size_t bytes) {
    size_t offset = (size_t)((const uint8_t *)object - (const uint8_t *)arena->books);
    uint32_t last = (uint32_t)((offset + bytes - 1) / GRAIN_BYTES);
    for (uint32_t i = (uint32_t)(offset / GRAIN_BYTES); i <= last; i++) mark_grain(arena, i);
}

static inline uint32_t grain_of_slot(uint32_t slot) {
    return (uint32_t)((sizeof(struct books) + slot * sizeof(struct cell)) / GRAIN_BYTES);
}
static inline void mark_slot(odma_arena *arena, uint32_t slot) {
    mark_grain(arena, grain_of_slot(slot));
}

/* Whether two grains differ. */
static inline bool differ(const uint8_t *a, const uint8_t *b) {
    return ((word_at(a) ^ word_at(b)) | (word_at(a + 8) ^ word_at(b + 8)) |
            (word_at(a + 16) ^ word_at(b + 16)) | (word_at(a + 24) ^ word_at(b + 24))) != 0;
}

/* Overwrite whole grains of the books, and mark those that change. */
static inline void books_put(odma_arena *arena, void *object, const void *from, size_t bytes) {
    uint8_t *into = object;
    const uint8_t *source = from;
    uint32_t grain = (uint32_t)((into - (uint8_t *)arena->books) / GRAIN_BYTES);
    for (size_t i = 0; i < bytes; i += GRAIN_BYTES, grain++) {
        if (!differ(into + i, source + i)) continue;
        memcpy(into + i, source + i, GRAIN_BYTES);
        mark_grain(arena, grain);
    }
}

/* --- the lock --- */

static odma_status leave(odma_arena *arena, odma_status status) {
    pthread_mutex_unlock(&arena->lock);
    return status;
}

static odma_status enter(odma_arena *arena) {
    if (arena == NULL) return ODMA_INVALID;
    if (*arena->fork_mark == 0) return ODMA_FORKED;
    pthread_mutex_lock(&arena->lock);
    if (arena->broken) return leave(arena, ODMA_BROKEN);
    return ODMA_OK;
}

/* Whether the step may begin another search. Each run that one looks at is counted. */
static inline bool may_search(const odma_arena *arena) {
    return arena->steps - arena->step.first_steps < PLAN_STEPS;
}

static uint32_t blocks_of(const odma_arena *arena, uint32_t tokens) {
    uint32_t unit = arena->geometry.block_tokens;
    return tokens / unit + (tokens % unit != 0);
}
