/* prefetch.c - memory that a batch will need is asked for before it is needed.
 *
 * Nothing here changes what is answered, only how soon.
 */

/* Regions of which all that is known stays in the processor's cache; beyond it
 * memory is asked for before it is needed, this many operations ahead. */
enum { CACHED_REGIONS = 1024, AHEAD = 6 };

/* Ask for what is known of a slot, in memory and in the file. Always inlined: to
 * the compiler a function that only prefetches does nothing. */
static inline __attribute__((always_inline)) void fetch_region(const odma_arena *arena,
                                                               uint32_t slot) {
    const uint8_t *books = (const uint8_t *)arena->books;
    const uint8_t *file = arena->map + arena->layout.books_offset;
    size_t cell = (size_t)((const uint8_t *)&arena->cells[slot] - books);
    __builtin_prefetch(&arena->runs[slot], 1);
    __builtin_prefetch(books + cell, 1);
    __builtin_prefetch(file + cell, 1);
}

/* The same of its request id, which only an allocate writes. */
static inline __attribute__((always_inline)) void fetch_id(const odma_arena *arena, uint32_t slot) {
    const char *id = arena->request_ids[slot];
    size_t at = (size_t)((const uint8_t *)id - (const uint8_t *)arena->books);
    __builtin_prefetch(id, 1);
    __builtin_prefetch(arena->map + arena->layout.books_offset + at, 1);
}

/* Which slots a batch is going to take, as far as can be seen: first those that it
 * has freed itself, then spare ones. */
struct foresight {
    uint32_t spare;  /* slots left, 0: nothing is asked for */
    uint32_t freed;  /* of arena->step.freed_slots */
    bool frees_at_once;
};

static struct foresight foresight_of(const odma_arena *arena) {
    return (struct foresight){.spare = arena->live > CACHED_REGIONS ? arena->spare_slot_count : 0,
                              .frees_at_once =
                                  arena->books->engine.single_ordered_stream != 0};
}

static void foresee_allocate(odma_arena *arena, struct foresight *foresight, uint32_t hash) {
    if (foresight->spare == 0) return;
    __builtin_prefetch(&arena->ids[hash & arena->ids_mask], 1);
    if (foresight->freed > 0) { /* its region was asked for then */
        fetch_id(arena, arena->step.freed_slots[--foresight->freed]);
        return;
    }
    uint32_t slot = arena->spare_slots[--foresight->spare];
    fetch_region(arena, slot);
    fetch_id(arena, slot);
}

static void foresee_other(odma_arena *arena, struct foresight *foresight, const odma_op *op) {
    uint64_t slot = op->handle & HANDLE_SLOT;
    if (foresight->spare == 0 || slot >= arena->layout.table_size) return;
    fetch_region(arena, (uint32_t)slot);
    if (op->kind == ODMA_OP_FREE && foresight->frees_at_once)
        arena->step.freed_slots[foresight->freed++] = (uint32_t)slot;
}

/* Ask for what surrounds the region that an operation names. */
static inline __attribute__((always_inline)) void fetch_around(const odma_arena *arena,
                                                               const odma_op *op) {
    uint64_t slot = op->handle & HANDLE_SLOT;
    if (slot >= arena->layout.table_size) return;
    const struct run *run = &arena->runs[slot];
    __builtin_prefetch(&arena->runs[run->prev == NONE ? 0 : run->prev], 1);
    __builtin_prefetch(&arena->runs[run->next == NONE ? 0 : run->next], 1);
    __builtin_prefetch(&arena->ids[run->id_hash & arena->ids_mask], 1);
}
