/* bins.c - free runs by length.
 *
 *   Rule   Every free run is in the bin of its length; a bin's bit is set if it
 *          holds a run.
 *
 * A run shorter than EXACT_BINS has a bin of its own length, so the first bin
 * that is not empty holds the best fit. Longer ones share a bin with lengths
 * up to 1.6 % apart, which is searched; once a step has searched enough, any run
 * of a longer bin will do.
 */

static uint32_t bin_of(uint32_t length) {
    if (length < EXACT_BINS) return length;
    uint32_t log = 31 - (uint32_t)__builtin_clz(length); /* EXACT_BINS is 2^10 */
    return EXACT_BINS + (log - 10) * SUB_BINS + ((length >> (log - 6)) & (SUB_BINS - 1));
}

static inline void bin_add(odma_arena *arena, uint32_t id) {
    struct run *run = &arena->runs[id];
    uint32_t bin = bin_of(run->length);
    run->bin_prev = NONE;
    run->bin_next = arena->bins[bin];
    if (run->bin_next != NONE) arena->runs[run->bin_next].bin_prev = id;
    arena->bins[bin] = id;
    arena->bin_bits[bin / 64] |= (uint64_t)1 << (bin % 64);
    arena->free_runs++;
    arena->free_blocks += run->length;
}

static inline void bin_remove(odma_arena *arena, uint32_t id) {
    struct run *run = &arena->runs[id];
    uint32_t bin = bin_of(run->length);
    if (run->bin_prev != NONE)
        arena->runs[run->bin_prev].bin_next = run->bin_next;
    else
        arena->bins[bin] = run->bin_next;
    if (run->bin_next != NONE) arena->runs[run->bin_next].bin_prev = run->bin_prev;
    if (arena->bins[bin] == NONE) arena->bin_bits[bin / 64] &= ~((uint64_t)1 << (bin % 64));
    arena->free_runs--;
    arena->free_blocks -= run->length;
}

/* First bin at or after `bin` that is not empty, or NONE. */
static uint32_t next_bin(const odma_arena *arena, uint32_t bin) {
    if (bin >= FREE_BINS) return NONE;
    uint32_t word = bin / 64;
    uint64_t bits = arena->bin_bits[word] & (~(uint64_t)0 << (bin % 64));
    while (bits == 0) {
        if (++word == (FREE_BINS + 63) / 64) return NONE;
        bits = arena->bin_bits[word];
    }
    return word * 64 + (uint32_t)__builtin_ctzll(bits);
}

/* The shortest free run of at least `length` blocks, or NONE. */
static uint32_t best_fit(odma_arena *arena, uint32_t length) {
    for (uint32_t bin = next_bin(arena, bin_of(length)); bin != NONE;
         bin = next_bin(arena, bin + 1)) {
        uint32_t best = arena->bins[bin];
        if (bin < EXACT_BINS) return best;
        if (!may_search(arena)) {
            if (bin > bin_of(length)) return best;
            continue;
        }
        best = NONE;
        for (uint32_t id = arena->bins[bin]; id != NONE; id = arena->runs[id].bin_next) {
            arena->steps++;
            if (arena->runs[id].length >= length &&
                (best == NONE || arena->runs[id].length < arena->runs[best].length))
                best = id;
        }
        if (best != NONE) return best;
    }
    return NONE;
}

/* Its length; once a step has searched enough, that of one up to 1.6 % shorter. */
static uint32_t largest_run(odma_arena *arena) {
    uint32_t largest = 0;
    for (uint32_t word = (FREE_BINS + 63) / 64; word-- > 0;) {
        if (arena->bin_bits[word] == 0) continue;
        uint32_t bin = word * 64 + 63 - (uint32_t)__builtin_clzll(arena->bin_bits[word]);
        if (bin < EXACT_BINS || !may_search(arena)) return arena->runs[arena->bins[bin]].length;
        for (uint32_t id = arena->bins[bin]; id != NONE; id = arena->runs[id].bin_next) {
            arena->steps++;
            if (arena->runs[id].length > largest) largest = arena->runs[id].length;
        }
        return largest;
    }
    return 0;
}
