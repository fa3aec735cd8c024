/* index.c - every index of the books: emptied with them, or built from their slots. */
#include <stdlib.h>
#include <string.h>

/* Indexes of books without regions: one free run. */
static void runs_reset(odma_arena *arena) {
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
    if (arena->granule_blocks > 0) keys_reset(arena);
}

struct ranked {
    uint64_t value;
    uint32_t slot;
};

static int by_value(const void *a, const void *b) {
    uint64_t left = ((const struct ranked *)a)->value, right = ((const struct ranked *)b)->value;
    return (left > right) - (left < right);
}

static const char *link_slots(odma_arena *arena, const struct ranked *keys, uint32_t count) {
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
static const char *runs_rebuild(odma_arena *arena) {
    uint32_t table = arena->layout.table_size, count = 0;
    runs_reset(arena);
    struct ranked *keys = (struct ranked *)(void *)arena->sides; /* scratch, larger than this */
    for (uint32_t i = 0; i < table; i++)
        if (arena->cells[i].slot.state != SLOT_FREE)
            keys[count++] = (struct ranked){.value = arena->cells[i].slot.start, .slot = i};
    qsort(keys, count, sizeof *keys, by_value);
    const char *fault = link_slots(arena, keys, count);
    if (fault != NULL) return fault;

    uint32_t waits = 0;
    for (uint32_t i = 0; i < table; i++) {
        if (is_live(arena, i)) {
            uint32_t hash = id_hash(arena->request_ids[i]);
            if (find_id(arena, arena->request_ids[i], hash) != NONE)
                return "two regions have one id";
            if (++arena->live > arena->geometry.max_regions) return "too many regions are live";
            add_id(arena, i, hash);
        } else if (arena->cells[i].slot.state == ODMA_REGION_WAITING) {
            keys[waits++] = (struct ranked){.value = arena->cells[i].slot.seq, .slot = i};
            arena->waiting_blocks += arena->cells[i].slot.length;
        }
    }
    qsort(keys, waits, sizeof *keys, by_value);
    for (uint32_t i = 0; i < waits; i++) arena->waits[i] = keys[i].slot;
    arena->waiting = waits;
    count_accounts(arena);
    if (arena->granule_blocks == 0) return NULL;
    fault = keys_rebuild(arena);
    for (uint32_t i = 0; i < table && fault == NULL; i++)
        if (is_kept(arena, i)) enter_kept(arena, i);
    if (arena->kept > arena->geometry.max_regions) fault = "too many runs are kept";
    return fault;
}

/* No run, so no key: generations begin anew with the next epoch. */
static void forget_keys(odma_arena *arena) {
    const struct key none = {0};
    const struct mark unmarked = {0};
    for (uint32_t i = 0; i < arena->layout.key_room; i++)
        books_put(arena, &arena->keys[i], &none, sizeof none);
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        books_put(arena, &arena->marks[i], &unmarked, sizeof unmarked);
}

/* Empty books: every region, id, seq and handle is forgotten, what was learnt
 * stays. */
static void forget_books(odma_arena *arena) {
    struct books *books = arena->books;
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        if (arena->cells[i].slot.generation == 0 && arena->cells[i].slot.state == SLOT_FREE)
            continue;
        arena->cells[i].slot = (struct slot){0};
        mark_slot(arena, i);
    }
    if (arena->granule_blocks > 0) forget_keys(arena);
    books->epoch = books->seq = books->completed_seq = books->births = books->turns = 0;
    books->owner = books->number = books->refused = 0;
    memset(books->boot_id, 0, sizeof books->boot_id);
    memset(&books->engine, 0, sizeof books->engine);
    if (books->policy.version == 0) books->policy = finished_policy((odma_policy){.version = 1});
    memset(books->claims, 0, sizeof books->claims);
    books_mark(arena, books, offsetof(struct books, class_names));
    runs_reset(arena);
    count_accounts(arena);
}
