/* slots.c - slots: which are spare, what each holds, and which wait. */

/* --- what a slot holds --- */

/* Whether a run is a live region. */
static inline bool is_live(const odma_arena *arena, uint32_t run) {
    return run < arena->layout.table_size && arena->cells[run].slot.state == ODMA_REGION_LIVE;
}

/* The first live region at or after a run in address order, or NONE. */
static uint32_t live_from(const odma_arena *arena, uint32_t run) {
    while (run != NONE && !is_live(arena, run)) run = arena->runs[run].next;
    return run;
}

static uint32_t first_live(const odma_arena *arena) { return live_from(arena, arena->first_run); }

static uint32_t next_live(const odma_arena *arena, uint32_t slot) {
    return live_from(arena, arena->runs[slot].next);
}

/* The batch that said how much is used. */
static uint64_t last_batch(const struct books *books) {
    return books->seq > 0 ? books->seq : NO_BATCH;
}

static uint64_t handle_of(const odma_arena *arena, uint32_t slot) {
    return (uint64_t)arena->cells[slot].slot.generation << SLOT_BITS | slot;
}

/* The slot of a live region, or NONE with the rule that the handle breaks. */
static inline uint32_t slot_of(const odma_arena *arena, uint64_t handle, uint32_t *rule) {
    uint64_t slot = handle & HANDLE_SLOT, generation = handle >> SLOT_BITS;
    *rule = ODMA_RULE_HANDLE_UNKNOWN;
    if (slot >= arena->layout.table_size || generation == 0 ||
        generation > arena->cells[slot].slot.generation)
        return NONE;
    *rule = ODMA_RULE_HANDLE_DEAD;
    if (!is_live(arena, (uint32_t)slot) ||
        generation != arena->cells[slot].slot.generation)
        return NONE;
    *rule = ODMA_RULE_NONE;
    return (uint32_t)slot;
}

static inline struct note *note_of(odma_arena *arena, uint32_t slot) {
    struct note *note = &arena->runs[slot].note;
    if (note->tick != arena->step.tick) *note = (struct note){.tick = arena->step.tick};
    return note;
}

/* Tokens of a live region that have to be kept, as said in batch `seq`. */
static uint32_t used_at(const odma_arena *arena, uint32_t slot, uint64_t seq) {
    const struct slot *region = &arena->cells[slot].slot;
    if (region->seq == seq) return region->used_tokens;
    return region->length * arena->geometry.block_tokens;
}

/* The same, as said in the batch in hand, and what the region reuses or others may reuse. */
static uint32_t used_of(const odma_arena *arena, uint32_t slot) {
    uint32_t used = used_at(arena, slot, arena->step.seq);
    if (arena->granule_blocks == 0) return used;
    const struct mark *mark = &arena->marks[slot];
    uint32_t granules = mark->keyed > mark->reused ? mark->keyed : mark->reused;
    uint32_t tokens = granules * arena->geometry.granule_tokens;
    return used > tokens ? used : tokens;
}

/* Tokens of a region that needed no prefill. */
static uint32_t reused_of(const odma_arena *arena, uint32_t slot) {
    return arena->granule_blocks == 0 ? 0
                                      : arena->marks[slot].reused * arena->geometry.granule_tokens;
}

/* Tokens for which a region has keys, final or not yet. */
static uint32_t given_of(const odma_arena *arena, uint32_t slot) {
    return arena->granule_blocks == 0 ? 0
                                      : arena->marks[slot].given * arena->geometry.granule_tokens;
}

/* Fix what is used before a region's length changes: unlisted means full, and
 * full means as long as it was. */
static void fix_used(odma_arena *arena, uint32_t slot) {
    if (arena->step.seq == NO_BATCH) return;
    arena->cells[slot].slot.used_tokens = used_of(arena, slot);
    arena->cells[slot].slot.seq = arena->step.seq;
}

/* --- taking and giving back --- */

static uint32_t take_slot(odma_arena *arena) {
    if (arena->spare_slot_count == 0) return NONE;
    return arena->spare_slots[--arena->spare_slot_count];
}

/* A slot whose generations are used up is never given out again. */
static void give_slot(odma_arena *arena, uint32_t slot) {
    if (arena->cells[slot].slot.generation != UINT32_MAX)
        arena->spare_slots[arena->spare_slot_count++] = slot;
}

static inline void set_place(odma_arena *arena, uint32_t slot) {
    arena->cells[slot].slot.start = arena->runs[slot].start;
    arena->cells[slot].slot.length = arena->runs[slot].length;
    mark_slot(arena, slot);
}

static inline void clear_slot(odma_arena *arena, uint32_t slot) {
    arena->cells[slot].slot = (struct slot){.generation = arena->cells[slot].slot.generation};
    mark_slot(arena, slot);
    if (arena->granule_blocks > 0) end_mark(arena, slot);
    give_slot(arena, slot);
}

/* Whether what is vacated is free at once, and need not wait for completion. */
static bool frees_at_once(const odma_arena *arena) {
    return arena->books->engine.single_ordered_stream || arena->step.seq == NO_BATCH;
}
