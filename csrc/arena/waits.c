/* waits.c - what was vacated, until nothing uses it any more.
 *
 *   Rule   The slots that wait are in a ring, those first whose completion is due first.
 */

/* The completion that frees what a slot holds, once it is vacated; 0: it is free at once. */
static uint64_t free_from(const odma_arena *arena, uint32_t slot) {
    uint64_t seq = frees_at_once(arena) ? 0 : arena->step.seq;
    uint64_t read = arena->granule_blocks > 0 ? read_until(arena, slot) : 0;
    return seq > read ? seq : read;
}

/* What a slot holds was vacated: it is free at once if the engine's copies and
 * kernels run in one order, or nothing uses it; else once the batch is done. */
static void set_waiting(odma_arena *arena, uint32_t slot) {
    uint64_t seq = free_from(arena, slot);
    if (seq == 0) {
        run_release(arena, slot);
        clear_slot(arena, slot);
        return;
    }
    if (arena->granule_blocks > 0) end_mark(arena, slot);
    arena->cells[slot].slot = (struct slot){.state = ODMA_REGION_WAITING,
                                       .generation = arena->cells[slot].slot.generation,
                                       .seq = seq};
    set_place(arena, slot);
    uint32_t size = arena->layout.table_size, at = arena->waits_first + arena->waiting;
    for (; at > arena->waits_first; at--) { /* what gathers have read may be due before others */
        uint32_t before = arena->waits[(at - 1) % size];
        if (arena->cells[before].slot.seq <= seq) break;
        arena->waits[at % size] = before;
    }
    arena->waits[at % size] = slot;
    arena->waiting++;
    arena->waiting_blocks += arena->runs[slot].length;
}

static void free_waiting_up_to(odma_arena *arena, uint64_t completed_seq) {
    while (arena->waiting > 0) {
        uint32_t slot = arena->waits[arena->waits_first];
        if (arena->cells[slot].slot.seq > completed_seq) return;
        arena->waits_first = (arena->waits_first + 1) % arena->layout.table_size;
        arena->waiting--;
        arena->waiting_blocks -= arena->runs[slot].length;
        run_release(arena, slot);
        clear_slot(arena, slot);
    }
}
