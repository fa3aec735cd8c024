/* features.c - a prompt as hashed words and statistics.
 *
 * A word is a run of letters, digits and bytes from 0x80 up; ASCII letters are
 * made small. Ids are hashes (FNV-1a, then the finaliser of MurmurHash3) of
 *
 *   group 0   each word; the first, the last and the first two once more, each
 *             with a seed of its own
 *   group 1   each word and the one before it
 *   group 2   each 3, 4 and 5 bytes that follow each other in "<word>", digits as 0
 *
 * A word of n bytes gives at most one id to group 0, one to group 1 and 3 n to
 * group 2, so a text of HEAD + TAIL bytes cannot give more than IDS: its words
 * take 2 bytes each (one to part them) or are fewer.
 */
#include <math.h>
#include <stdbool.h>
#include <string.h>

enum { CUT = ODMA_FEATURES_HEAD + ODMA_FEATURES_TAIL, WORDS = CUT / 2 + 1 };

_Static_assert(3 * CUT + 2 * WORDS + 3 <= ODMA_FEATURES_IDS, "a text gives no more ids");

enum { WORD_SEED = 1, FIRST_SEED, LAST_SEED, OPENING_SEED, PAIR_SEED, PIECE_SEED };

typedef struct word {
    uint32_t hash; /* before it is finished */
    uint16_t start, end;
} word;

static uint32_t hashed(uint32_t hash, uint8_t byte) {
    return (hash ^ byte) * 16777619u;
}

static uint32_t seeded(uint32_t seed) {
    return hashed(2166136261u, (uint8_t)seed);
}

static uint16_t finished(uint32_t hash) {
    hash ^= hash >> 16;
    hash *= 0x85ebca6bu;
    hash ^= hash >> 13;
    hash *= 0xc2b2ae35u;
    hash ^= hash >> 16;
    return (uint16_t)(hash % ODMA_FEATURES_BUCKETS);
}

/* The hash of a hash, so that a word in a pair need not be read again. */
static uint32_t hashed_word(uint32_t hash, uint32_t other) {
    for (int i = 0; i < 4; i++) hash = hashed(hash, (uint8_t)(other >> 8 * i));
    return hash;
}

static bool is_digit(uint8_t byte) {
    return byte >= '0' && byte <= '9';
}

static bool is_upper(uint8_t byte) {
    return byte >= 'A' && byte <= 'Z';
}

static bool is_letter(uint8_t byte) {
    return (byte >= 'a' && byte <= 'z') || is_upper(byte) || byte >= 0x80;
}

static uint8_t lowered(uint8_t byte) {
    return is_upper(byte) ? (uint8_t)(byte + ('a' - 'A')) : byte;
}

/* Head and tail with a line's end between them, or the text as it is. */
static uint32_t cut_text(const uint8_t *text, size_t bytes, uint8_t *seen) {
    if (bytes <= CUT) {
        if (bytes > 0) memcpy(seen, text, bytes);
        return (uint32_t)bytes;
    }
    memcpy(seen, text, ODMA_FEATURES_HEAD);
    seen[ODMA_FEATURES_HEAD] = '\n';
    memcpy(seen + ODMA_FEATURES_HEAD + 1, text + bytes - (ODMA_FEATURES_TAIL - 1),
           ODMA_FEATURES_TAIL - 1);
    return CUT;
}

static uint32_t words_of(const uint8_t *seen, uint32_t length, word *words) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < length;) {
        if (!is_letter(seen[i]) && !is_digit(seen[i])) {
            i++;
            continue;
        }
        word *found = &words[count++];
        found->start = (uint16_t)i;
        found->hash = seeded(WORD_SEED);
        for (; i < length && (is_letter(seen[i]) || is_digit(seen[i])); i++) {
            found->hash = hashed(found->hash, lowered(seen[i]));
        }
        found->end = (uint16_t)i;
    }
    return count;
}

static void add_words(const word *words, uint32_t count, odma_features *to, uint32_t *at) {
    for (uint32_t i = 0; i < count; i++) to->ids[(*at)++] = finished(words[i].hash);
    if (count == 0) return;
    to->ids[(*at)++] = finished(hashed_word(seeded(FIRST_SEED), words[0].hash));
    to->ids[(*at)++] = finished(hashed_word(seeded(LAST_SEED), words[count - 1].hash));
    if (count == 1) return;
    uint32_t opening = hashed_word(seeded(OPENING_SEED), words[0].hash);
    to->ids[(*at)++] = finished(hashed_word(opening, words[1].hash));
}

static void add_pairs(const word *words, uint32_t count, odma_features *to, uint32_t *at) {
    for (uint32_t i = 1; i < count; i++) {
        uint32_t first = hashed_word(seeded(PAIR_SEED), words[i - 1].hash);
        to->ids[(*at)++] = finished(hashed_word(first, words[i].hash));
    }
}

/* The byte at a place of "<word>". */
static uint8_t piece_byte(const uint8_t *seen, const word *in, uint32_t place) {
    uint32_t length = (uint32_t)(in->end - in->start);
    if (place == 0) return '<';
    if (place > length) return '>';
    uint8_t byte = seen[in->start + place - 1];
    return is_digit(byte) ? '0' : lowered(byte);
}

static void add_pieces(const uint8_t *seen, const word *in, odma_features *to, uint32_t *at) {
    uint32_t length = (uint32_t)(in->end - in->start) + 2;
    for (uint32_t start = 0; start + 3 <= length; start++) {
        uint32_t hash = seeded(PIECE_SEED);
        for (uint32_t n = 0; n < 5 && start + n < length; n++) {
            hash = hashed(hash, piece_byte(seen, in, start + n));
            if (n >= 2) to->ids[(*at)++] = finished(hash);
        }
    }
}

static float log_of(double count) {
    return (float)log1p(count);
}

/* Signs that are counted each for itself. */
static const char SIGNS[] = "?!.,:;()[]{}<>=+-*/\\\"'`_|#$%&^";

enum { FIRST_SIGN = 21 };

_Static_assert(FIRST_SIGN + sizeof SIGNS - 1 == ODMA_FEATURES_STATS, "every statistic is set");

typedef struct tally {
    uint32_t of[256];
    uint32_t digits, letters, capitals, foreign, blanks;
    uint32_t numbers, number_digits, longest_number, longest_line, empty_lines;
    double greatest, last; /* number, of at most nine digits */
} tally;

static void count_numbers(const uint8_t *seen, uint32_t length, tally *t) {
    for (uint32_t i = 0; i < length;) {
        if (!is_digit(seen[i])) {
            i++;
            continue;
        }
        uint32_t digits = 0;
        double number = 0;
        for (; i < length && is_digit(seen[i]); i++) {
            if (digits++ < 9) number = number * 10 + (seen[i] - '0');
        }
        t->numbers++;
        if (digits > t->longest_number) t->longest_number = digits;
        if (number > t->greatest) t->greatest = number;
        t->last = number;
    }
}

static void count_lines(const uint8_t *seen, uint32_t length, tally *t) {
    uint32_t start = 0;
    for (uint32_t i = 0; i <= length; i++) {
        if (i < length && seen[i] != '\n') continue;
        if (i - start > t->longest_line) t->longest_line = i - start;
        if (i == start && i < length) t->empty_lines++;
        start = i + 1;
    }
}

static void tally_text(const uint8_t *seen, uint32_t length, tally *t) {
    memset(t, 0, sizeof *t);
    for (uint32_t i = 0; i < length; i++) {
        uint8_t byte = seen[i];
        t->of[byte]++;
        t->digits += is_digit(byte);
        t->letters += is_letter(byte);
        t->capitals += is_upper(byte);
        t->foreign += byte >= 0x80;
        t->blanks += byte == ' ' || byte == '\n' || byte == '\t' || byte == '\r';
    }
    count_numbers(seen, length, t);
    count_lines(seen, length, t);
}

static uint8_t last_sign(const uint8_t *seen, uint32_t length) {
    while (length > 0 && (seen[length - 1] == ' ' || seen[length - 1] == '\n')) length--;
    return length > 0 ? seen[length - 1] : 0;
}

/* prompt_tokens is the first: the only one that needs no text. */
static void add_stats(const uint8_t *seen, uint32_t length, size_t bytes, uint32_t prompt_tokens,
                      uint32_t words, odma_features *to) {
    tally t;
    tally_text(seen, length, &t);
    double all = length > 0 ? length : 1;
    uint8_t end = last_sign(seen, length);
    float *stats = to->stats;
    *stats++ = log_of(prompt_tokens);
    *stats++ = log_of((double)bytes);
    *stats++ = (float)fmin((double)bytes / (prompt_tokens > 0 ? prompt_tokens : 1), 32.0);
    *stats++ = bytes > CUT;
    *stats++ = log_of(words);
    *stats++ = (float)((t.letters + t.digits) / (words > 0 ? (double)words : 1.0));
    *stats++ = (float)(t.digits / all);
    *stats++ = (float)(t.capitals / all);
    *stats++ = (float)(t.foreign / all);
    *stats++ = (float)(t.blanks / all);
    *stats++ = log_of(t.numbers);
    *stats++ = log_of(t.longest_number);
    *stats++ = log_of(t.greatest);
    *stats++ = log_of(t.last);
    *stats++ = log_of(t.of['\n']);
    *stats++ = log_of(t.empty_lines);
    *stats++ = log_of(t.longest_line);
    *stats++ = log_of(t.of['\t']);
    *stats++ = end == '?';
    *stats++ = end == ':';
    *stats++ = end == '.';
    for (const char *sign = SIGNS; *sign != 0; sign++) *stats++ = log_of(t.of[(uint8_t)*sign]);
}

odma_status odma_features_see(const uint8_t *text, size_t bytes, uint32_t prompt_tokens,
                              odma_features *features) {
    if (features == NULL || (text == NULL && bytes > 0)) return ODMA_INVALID;
    uint8_t seen[CUT];
    word words[WORDS];
    uint32_t length = cut_text(text, bytes, seen), found = words_of(seen, length, words), at = 0;

    add_words(words, found, features, &at);
    features->counts[0] = at;
    add_pairs(words, found, features, &at);
    features->counts[1] = at - features->counts[0];
    for (uint32_t i = 0; i < found; i++) add_pieces(seen, &words[i], features, &at);
    features->counts[2] = at - features->counts[0] - features->counts[1];
    add_stats(seen, length, bytes, prompt_tokens, found, features);
    return ODMA_OK;
}

static odma_status pool_group(const uint16_t *ids, uint32_t count, const odma_embeddings *from,
                              float *pooled, float *known) {
    int32_t sums[ODMA_FEATURES_DIMS] = {0};
    uint32_t dims = from->dims, found = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (ids[i] >= ODMA_FEATURES_BUCKETS) return ODMA_INVALID;
        uint32_t row = from->row_of[ids[i]];
        if (row == ODMA_FEATURES_NO_ROW) continue;
        if (row >= from->row_count) return ODMA_INVALID;
        const int8_t *embedding = from->rows + (size_t)row * dims;
        for (uint32_t d = 0; d < dims; d++) sums[d] += embedding[d];
        found++;
    }
    for (uint32_t d = 0; d < dims; d++) {
        pooled[d] = found > 0 ? (float)sums[d] / (float)found * from->scales[d] : 0.0f;
    }
    *known = count > 0 ? (float)found / (float)count : 0.0f;
    return ODMA_OK;
}

odma_status odma_features_pool(const odma_features *features, const odma_embeddings *embeddings,
                               float *pooled, float known[ODMA_FEATURES_GROUPS]) {
    if (embeddings->dims == 0 || embeddings->dims > ODMA_FEATURES_DIMS) return ODMA_INVALID;
    uint32_t at = 0;
    for (int g = 0; g < ODMA_FEATURES_GROUPS; g++) {
        uint32_t count = features->counts[g];
        if (count > ODMA_FEATURES_IDS - at) return ODMA_INVALID;
        odma_status status = pool_group(features->ids + at, count, embeddings,
                                        pooled + (size_t)g * embeddings->dims, &known[g]);
        if (status != ODMA_OK) return status;
        at += count;
    }
    return ODMA_OK;
}
