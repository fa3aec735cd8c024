/* runs.c - the blocks in address order, free runs by length, request ids.
 *
 *   Rule 1   Runs tile [0, blocks): no gap, no overlap. Each is a region, a
 *            waiting run, or free.
 *   Rule 2   No two neighbours are both free.
 *   Rule 3   Every free run is in the bin of its length; a bin's bit is set if
 *            it holds a run.
 *
 * A run shorter than EXACT_BINS has a bin of its own length, so the first bin
 * that is not empty holds the best fit. Longer ones share a bin with lengths
 * up to 1.6 % apart, which is searched.
 *
 * All of it is derived from the slots, and rebuilt from them at attach.
 */
#include <stdlib.h>
#include <string.h>

#include "arena.h"

/* --- bins --- */

static uint32_t bin_of(uint32_t length) {
    if (length < EXACT_BINS) return length;
    uint32_t log = 31 - (uint32_t)__builtin_clz(length); /* EXACT_BINS is 2^10 */
    return EXACT_BINS + (log - 10) * SUB_BINS + ((length >> (log - 6)) & (SUB_BINS - 1));
}

static void bin_add(odma_arena *arena, uint32_t id) {
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

static void bin_remove(odma_arena *arena, uint32_t id) {
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
uint32_t best_fit(const odma_arena *arena, uint32_t length) {
    for (uint32_t bin = next_bin(arena, bin_of(length)); bin != NONE;
         bin = next_bin(arena, bin + 1)) {
        uint32_t best = arena->bins[bin];
        if (bin < EXACT_BINS) return best;
        best = NONE;
        for (uint32_t id = arena->bins[bin]; id != NONE; id = arena->runs[id].bin_next)
            if (arena->runs[id].length >= length &&
                (best == NONE || arena->runs[id].length < arena->runs[best].length))
                best = id;
        if (best != NONE) return best;
    }
    return NONE;
}

uint32_t largest_run(const odma_arena *arena) {
    uint32_t largest = 0;
    for (uint32_t word = (FREE_BINS + 63) / 64; word-- > 0;) {
        if (arena->bin_bits[word] == 0) continue;
        uint32_t bin = word * 64 + 63 - (uint32_t)__builtin_clzll(arena->bin_bits[word]);
        for (uint32_t id = arena->bins[bin]; id != NONE; id = arena->runs[id].bin_next)
            if (arena->runs[id].length > largest) largest = arena->runs[id].length;
        return largest;
    }
    return 0;
}

/* --- the list in address order --- */

static void link_between(odma_arena *arena, uint32_t id, uint32_t prev, uint32_t next) {
    arena->runs[id].prev = prev;
    arena->runs[id].next = next;
    if (prev != NONE)
        arena->runs[prev].next = id;
    else
        arena->first_run = id;
    if (next != NONE)
        arena->runs[next].prev = id;
    else
        arena->last_run = id;
}

static void unlink_run(odma_arena *arena, uint32_t id) {
    uint32_t prev = arena->runs[id].prev, next = arena->runs[id].next;
    if (prev != NONE)
        arena->runs[prev].next = next;
    else
        arena->first_run = next;
    if (next != NONE)
        arena->runs[next].prev = prev;
    else
        arena->last_run = prev;
}

static uint32_t add_free(odma_arena *arena, uint32_t start, uint32_t length, uint32_t prev,
                         uint32_t next) {
    uint32_t id = arena->spare_runs;
    arena->spare_runs = arena->runs[id].bin_next;
    arena->runs[id].start = start;
    arena->runs[id].length = length;
    link_between(arena, id, prev, next);
    bin_add(arena, id);
    return id;
}

static void drop_free(odma_arena *arena, uint32_t id) {
    bin_remove(arena, id);
    unlink_run(arena, id);
    arena->runs[id].bin_next = arena->spare_runs;
    arena->spare_runs = id;
}

static void set_free(odma_arena *arena, uint32_t id, uint32_t start, uint32_t length) {
    bin_remove(arena, id);
    arena->runs[id].start = start;
    arena->runs[id].length = length;
    bin_add(arena, id);
}

/* Free [start, start + length) between two runs, one of which may be free. */
static void add_or_join(odma_arena *arena, uint32_t start, uint32_t length, uint32_t prev,
                        uint32_t next) {
    bool left = is_free_run(arena, prev), right = is_free_run(arena, next);
    if (left && right) {
        length += arena->runs[next].length;
        drop_free(arena, next);
    }
    if (left)
        set_free(arena, prev, arena->runs[prev].start, arena->runs[prev].length + length);
    else if (right)
        set_free(arena, next, start, arena->runs[next].length + length);
    else
        add_free(arena, start, length, prev, next);
}

static void shorten_front(odma_arena *arena, uint32_t free_run, uint32_t blocks) {
    struct run *run = &arena->runs[free_run];
    if (run->length == blocks)
        drop_free(arena, free_run);
    else
        set_free(arena, free_run, run->start + blocks, run->length - blocks);
}

/* Give the first `length` blocks of a free run to a slot that holds none. */
void hold(odma_arena *arena, uint32_t slot, uint32_t free_run, uint32_t length) {
    struct run *run = &arena->runs[free_run];
    arena->runs[slot].start = run->start;
    arena->runs[slot].length = length;
    link_between(arena, slot, run->prev, free_run);
    shorten_front(arena, free_run, length);
}

/* Free all that a slot holds. */
void release(odma_arena *arena, uint32_t slot) {
    struct run run = arena->runs[slot];
    unlink_run(arena, slot);
    add_or_join(arena, run.start, run.length, run.prev, run.next);
}

/* Let a slot have `length` blocks, the additional ones from the free run that
 * follows it. */
void grow(odma_arena *arena, uint32_t slot, uint32_t length) {
    uint32_t more = length - arena->runs[slot].length;
    arena->runs[slot].length = length;
    shorten_front(arena, arena->runs[slot].next, more);
}

/* Free all but the first `length` blocks of a slot. */
void cut(odma_arena *arena, uint32_t slot, uint32_t length) {
    struct run *run = &arena->runs[slot];
    uint32_t start = run->start + length, blocks = run->length - length;
    run->length = length;
    add_or_join(arena, start, blocks, slot, run->next);
}

/* Give all but the first `length` blocks of a slot to the slot `tail`. */
void cut_to_slot(odma_arena *arena, uint32_t slot, uint32_t length, uint32_t tail) {
    struct run *run = &arena->runs[slot];
    arena->runs[tail].start = run->start + length;
    arena->runs[tail].length = run->length - length;
    run->length = length;
    link_between(arena, tail, slot, run->next);
}

/* Let `other`, which holds nothing, have what `slot` holds. */
void swap_runs(odma_arena *arena, uint32_t slot, uint32_t other) {
    struct run run = arena->runs[slot];
    unlink_run(arena, slot);
    arena->runs[other].start = run.start;
    arena->runs[other].length = run.length;
    link_between(arena, other, run.prev, run.next);
}

/* --- windows: runs from `left` to `right` whose regions are packed anew --- */

/* Take the window's free runs out and answer the run before it. Its regions
 * stay linked, in their order, at their old starts. */
uint32_t open_window(odma_arena *arena, uint32_t left, uint32_t right) {
    uint32_t before = arena->runs[left].prev, end = arena->runs[right].next;
    for (uint32_t id = left; id != end;) {
        uint32_t next = arena->runs[id].next;
        if (is_free_run(arena, id)) drop_free(arena, id);
        id = next;
    }
    return before;
}

/* Put the one gap of a packed window between two runs, and answer it. */
uint32_t close_window(odma_arena *arena, uint32_t prev, uint32_t next) {
    uint32_t start = prev == NONE ? 0 : arena->runs[prev].start + arena->runs[prev].length;
    uint32_t end = next == NONE ? arena->geometry.blocks : arena->runs[next].start;
    return add_free(arena, start, end - start, prev, next);
}

/* --- slots --- */

uint32_t take_slot(odma_arena *arena) {
    if (arena->spare_slot_count == 0) return NONE;
    return arena->spare_slots[--arena->spare_slot_count];
}

/* A slot whose generations are used up is never given out again. */
void give_slot(odma_arena *arena, uint32_t slot) {
    if (arena->cells[slot].slot.generation != UINT32_MAX)
        arena->spare_slots[arena->spare_slot_count++] = slot;
}

/* --- request ids --- */

/* Of the words up to the first that is all padding. */
uint32_t id_hash(const char id[ODMA_ID_BYTES]) {
    uint64_t hash = 0, word;
    for (size_t i = 0; i < ODMA_ID_BYTES; i += sizeof word) {
        memcpy(&word, id + i, sizeof word);
        if (word == 0) break;
        hash = stir(hash, word);
    }
    return (uint32_t)mix(hash);
}

/* The live region of a request id, or NONE. */
uint32_t find_id(const odma_arena *arena, const char id[ODMA_ID_BYTES], uint32_t hash) {
    for (uint32_t i = hash & arena->ids_mask;; i = (i + 1) & arena->ids_mask) {
        struct entry entry = arena->ids[i];
        if (entry.slot == NONE ||
            (entry.hash == hash && memcmp(arena->request_ids[entry.slot], id, ODMA_ID_BYTES) == 0))
            return entry.slot;
    }
}

void add_id(odma_arena *arena, uint32_t slot, uint32_t hash) {
    uint32_t i = hash & arena->ids_mask;
    while (arena->ids[i].slot != NONE) i = (i + 1) & arena->ids_mask;
    arena->ids[i] = (struct entry){.slot = slot, .hash = hash};
    arena->runs[slot].id_hash = hash;
}

void drop_id(odma_arena *arena, uint32_t slot) {
    uint32_t hole = arena->runs[slot].id_hash & arena->ids_mask;
    while (arena->ids[hole].slot != slot) hole = (hole + 1) & arena->ids_mask;
    for (uint32_t i = (hole + 1) & arena->ids_mask; arena->ids[i].slot != NONE;
         i = (i + 1) & arena->ids_mask) {
        uint32_t home = arena->ids[i].hash;
        if (((i - home) & arena->ids_mask) < ((i - hole) & arena->ids_mask)) continue;
        arena->ids[hole] = arena->ids[i];
        hole = i;
    }
    arena->ids[hole].slot = NONE;
}

/* --- rebuilding --- */

/* Indexes of books without regions: one free run. */
void runs_reset(odma_arena *arena) {
    uint32_t table = arena->layout.table_size;
    memset(arena->bins, 0xff, sizeof arena->bins);
    memset(arena->bin_bits, 0, sizeof arena->bin_bits);
    memset(arena->ids, 0xff, ((size_t)arena->ids_mask + 1) * sizeof *arena->ids);
    arena->free_runs = arena->free_blocks = 0;
    arena->live = arena->waiting = arena->waiting_blocks = arena->waits_first = 0;
    arena->spare_runs = table;
    for (uint32_t i = table; i < 2 * table + 2; i++) arena->runs[i].bin_next = i + 1;
    arena->spare_slot_count = 0;
    for (uint32_t i = table; i-- > 0;)
        if (arena->cells[i].slot.state == SLOT_FREE) give_slot(arena, i);
    add_free(arena, 0, arena->geometry.blocks, NONE, NONE);
}

struct key {
    uint64_t value;
    uint32_t slot;
};

static int by_value(const void *a, const void *b) {
    uint64_t left = ((const struct key *)a)->value, right = ((const struct key *)b)->value;
    return (left > right) - (left < right);
}

static const char *link_slots(odma_arena *arena, const struct key *keys, uint32_t count) {
    uint32_t at = 0, prev = NONE;
    drop_free(arena, arena->first_run);
    arena->first_run = arena->last_run = NONE;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t id = keys[i].slot;
        const struct slot *slot = &arena->cells[id].slot;
        if (slot->start < at) return "two regions overlap";
        if (slot->start > at) prev = add_free(arena, at, slot->start - at, prev, NONE);
        arena->runs[id].start = slot->start;
        arena->runs[id].length = slot->length;
        link_between(arena, id, prev, NONE);
        prev = id;
        at = slot->start + slot->length;
    }
    if (at < arena->geometry.blocks) add_free(arena, at, arena->geometry.blocks - at, prev, NONE);
    return NULL;
}

/* Build every index from the slots, which books_fault() has looked at one by
 * one. Answers the rule that they break together, or NULL. */
const char *runs_rebuild(odma_arena *arena) {
    uint32_t table = arena->layout.table_size, count = 0;
    runs_reset(arena);
    struct key *keys = (struct key *)(void *)arena->sides; /* scratch, larger than this */
    for (uint32_t i = 0; i < table; i++)
        if (arena->cells[i].slot.state != SLOT_FREE)
            keys[count++] = (struct key){.value = arena->cells[i].slot.start, .slot = i};
    qsort(keys, count, sizeof *keys, by_value);
    const char *fault = link_slots(arena, keys, count);
    if (fault != NULL) return fault;

    uint32_t waits = 0;
    for (uint32_t i = 0; i < table; i++) {
        if (arena->cells[i].slot.state == ODMA_REGION_LIVE) {
            uint32_t hash = id_hash(arena->request_ids[i]);
            if (find_id(arena, arena->request_ids[i], hash) != NONE)
                return "two regions have one id";
            if (++arena->live > arena->geometry.max_regions) return "too many regions are live";
            add_id(arena, i, hash);
        } else if (arena->cells[i].slot.state == ODMA_REGION_WAITING) {
            keys[waits++] = (struct key){.value = arena->cells[i].slot.seq, .slot = i};
            arena->waiting_blocks += arena->cells[i].slot.length;
        }
    }
    qsort(keys, waits, sizeof *keys, by_value);
    for (uint32_t i = 0; i < waits; i++) arena->waits[i] = keys[i].slot;
    arena->waiting = waits;
    count_accounts(arena);
    return NULL;
}
