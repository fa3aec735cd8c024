/* learn.c - what completions teach, per request class and for the pool.
 *
 * Old completions count less: rather than scaling all bins down at each
 * completion, the weight of the next one is scaled up (forward decay, Cormode
 * et al., ICDE 2009). Only when the weights have grown by 2^40 are all bins
 * scaled, in a commit of its own.
 */
#include <math.h>
#include <string.h>

static const double HALF_LIFE_COMPLETIONS = 512;
static const double LARGEST_INCREMENT = 1099511627776.0; /* 2^40 */

/* How much heavier a completion counts than the one before it. */
static double decay_growth(void) { return exp2(1 / HALF_LIFE_COMPLETIONS); }

enum { OUTPUT = 0, TOTAL = 2, CENSORED = 1 };

/* Upper ends: multiples of a block for half of the bins, then geometric up to
 * the longest total, each at least one block further. */
static void bins_init(odma_arena *arena) {
    uint32_t unit = arena->geometry.block_tokens, half = ODMA_BINS / 2;
    uint64_t capacity = (uint64_t)arena->geometry.blocks * unit;
    uint64_t most = arena->geometry.model_length_tokens;
    if (most > capacity) most = capacity;
    uint64_t upper = 0;
    for (uint32_t i = 0; i < ODMA_BINS; i++) {
        if (i < half) {
            upper += unit;
        } else {
            uint32_t left = ODMA_BINS - i;
            double ratio = most > upper ? pow((double)most / (double)upper, 1.0 / left) : 1;
            uint64_t next = (uint64_t)ceil((double)upper * ratio / unit) * unit;
            upper = next > upper ? next : upper + unit;
        }
        arena->bin_upper[i] = (uint32_t)upper;
    }
}

static uint32_t bin_of_tokens(const odma_arena *arena, uint64_t tokens) {
    uint32_t low = 0, high = ODMA_BINS - 1;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (arena->bin_upper[middle] < tokens)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Index of a class, ODMA_CLASS_OTHER if it shares, NONE if it is new. */
static uint32_t class_of(const odma_arena *arena, const char name[ODMA_NAME_BYTES]) {
    const struct books *books = arena->books;
    for (uint32_t i = 0; i < books->class_count; i++)
        if (memcmp(books->class_names[i], name, ODMA_NAME_BYTES) == 0) return i;
    return books->class_count == ODMA_CLASSES ? ODMA_CLASS_OTHER : NONE;
}

/* The same, and a new one gets an index. */
static uint32_t class_for(odma_arena *arena, const char name[ODMA_NAME_BYTES]) {
    uint32_t index = class_of(arena, name);
    if (index != NONE) return index;
    struct books *books = arena->books;
    index = books->class_count++;
    memcpy(books->class_names[index], name, ODMA_NAME_BYTES);
    books_mark(arena, books->class_names[index], ODMA_NAME_BYTES);
    return index;
}

static void count_in_bin(odma_arena *arena, struct stats *stats, uint32_t kind, uint64_t tokens) {
    double *bin = &stats->bins[kind][bin_of_tokens(arena, tokens)];
    *bin += stats->increment;
    books_mark(arena, bin, sizeof *bin);
}

/* Count a completion in bins; the next one will weigh more. */
static void count(odma_arena *arena, struct stats *stats, uint32_t prompt_tokens,
                  uint32_t output_tokens, bool censored) {
    if (stats->increment == 0) stats->increment = 1;
    count_in_bin(arena, stats, OUTPUT + censored, output_tokens);
    count_in_bin(arena, stats, TOTAL + censored, (uint64_t)prompt_tokens + output_tokens);
    stats->increment *= decay_growth();
}

static odma_completion completion_of(const odma_arena *arena, uint32_t slot,
                                     uint32_t output_tokens, bool censored) {
    const struct request *request = &arena->cells[slot].request;
    uint64_t allocates = arena->books->counters.allocates;
    odma_completion entry = {.quantiles = {-1},
                             .overflow_risk = arena->cells[slot].slot.overflow_risk,
                             .prompt_tokens = request->prompt_tokens,
                             .output_tokens = output_tokens,
                             .censored = censored,
                             .issue = allocates - (arena->books->births - request->birth),
                             .until = allocates};
    if (request->predicted == 0) return entry;
    memcpy(entry.quantiles, arena->predictions[slot].quantiles, sizeof entry.quantiles);
    memcpy(entry.raw, arena->predictions[slot].raw, sizeof entry.raw);
    return entry;
}

static void learn_in(odma_arena *arena, struct stats *stats, uint32_t slot, uint32_t output_tokens,
                     bool censored) {
    count(arena, stats, arena->cells[slot].request.prompt_tokens, output_tokens, censored);
    odma_completion *entry = &stats->ring[stats->completions % ODMA_RING];
    *entry = completion_of(arena, slot, output_tokens, censored);
    books_mark(arena, entry, sizeof *entry);
    stats->completions++;
    if (stats->increment > LARGEST_INCREMENT) arena->rescale = true;
    books_mark(arena, stats, offsetof(struct stats, bins));
}

static void learn(odma_arena *arena, uint32_t slot, uint32_t output_tokens, bool censored) {
    struct stats *stats = arena->books->stats;
    learn_in(arena, &stats[arena->cells[slot].request.class_index], slot, output_tokens, censored);
    learn_in(arena, &stats[ODMA_CLASS_POOL], slot, output_tokens, censored);
}

static const struct stats *known_stats(const odma_arena *arena, uint32_t class_index) {
    const struct stats *stats = &arena->books->stats[class_index];
    if (stats->completions < ODMA_LEARNT_ENOUGH) stats = &arena->books->stats[ODMA_CLASS_POOL];
    return stats->completions < ODMA_LEARNT_ENOUGH ? NULL : stats;
}

/* Kaplan-Meier over the bins above `more_than`: at the end of a bin its
 * finished weight leaves the share that survives, then its censored weight
 * leaves those at risk. A level that is never reached gets the last bin. */
static bool survival_quantiles(const odma_arena *arena, const struct stats *stats,
                               uint32_t more_than, float quantiles[ODMA_QUANTILES],
                               double *weight) {
    const double *finished = stats->bins[OUTPUT], *censored = stats->bins[OUTPUT + CENSORED];
    uint32_t first = more_than == 0 ? 0 : bin_of_tokens(arena, (uint64_t)more_than + 1);
    double at_risk = 0;
    uint32_t last = first;
    for (uint32_t i = ODMA_BINS; i-- > first;) {
        at_risk += finished[i] + censored[i];
        if (last == first && finished[i] + censored[i] > 0) last = i;
    }
    if (at_risk <= 0) return false;
    *weight = at_risk / stats->increment;

    double surviving = 1;
    uint32_t level = 0;
    for (uint32_t i = first; i <= last && level < ODMA_QUANTILES; i++) {
        double low = i == 0 ? 0 : arena->bin_upper[i - 1], high = arena->bin_upper[i];
        if (low < more_than) low = more_than;
        double after = at_risk > 0 ? surviving * (1 - finished[i] / at_risk) : 0;
        for (; level < ODMA_QUANTILES && 1 - after >= LEVELS[level]; level++) {
            double part = (LEVELS[level] - (1 - surviving)) / (surviving - after);
            quantiles[level] = (float)(low + part * (high - low));
        }
        surviving = after;
        at_risk -= finished[i] + censored[i];
    }
    for (; level < ODMA_QUANTILES; level++) quantiles[level] = (float)arena->bin_upper[last];
    return true;
}
