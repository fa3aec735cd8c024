/* runs.c - the blocks in address order.
 *
 *   Rule 1   Runs tile [0, blocks): no gap, no overlap. Each is a region, a
 *            waiting run, or free.
 *   Rule 2   No two neighbours are both free.
 *
 * All of it is derived from the slots, and rebuilt from them at attach.
 */

static inline bool is_free_run(const odma_arena *arena, uint32_t run) {
    return run != NONE && run >= arena->layout.table_size;
}

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
static void run_hold(odma_arena *arena, uint32_t slot, uint32_t free_run, uint32_t length) {
    struct run *run = &arena->runs[free_run];
    arena->runs[slot].start = run->start;
    arena->runs[slot].length = length;
    link_between(arena, slot, run->prev, free_run);
    shorten_front(arena, free_run, length);
}

/* Free all that a slot holds. */
static void run_release(odma_arena *arena, uint32_t slot) {
    struct run run = arena->runs[slot];
    unlink_run(arena, slot);
    add_or_join(arena, run.start, run.length, run.prev, run.next);
}

/* Let a slot have `length` blocks, the additional ones from the free run that
 * follows it. */
static void run_grow(odma_arena *arena, uint32_t slot, uint32_t length) {
    uint32_t more = length - arena->runs[slot].length;
    arena->runs[slot].length = length;
    shorten_front(arena, arena->runs[slot].next, more);
}

/* Free all but the first `length` blocks of a slot. */
static void run_cut(odma_arena *arena, uint32_t slot, uint32_t length) {
    struct run *run = &arena->runs[slot];
    uint32_t start = run->start + length, blocks = run->length - length;
    run->length = length;
    add_or_join(arena, start, blocks, slot, run->next);
}

/* Give all but the first `length` blocks of a slot to the slot `tail`. */
static void run_cut_to_slot(odma_arena *arena, uint32_t slot, uint32_t length, uint32_t tail) {
    struct run *run = &arena->runs[slot];
    arena->runs[tail].start = run->start + length;
    arena->runs[tail].length = run->length - length;
    run->length = length;
    link_between(arena, tail, slot, run->next);
}

/* Let `other`, which holds nothing, have what `slot` holds. */
static void run_swap(odma_arena *arena, uint32_t slot, uint32_t other) {
    struct run run = arena->runs[slot];
    unlink_run(arena, slot);
    arena->runs[other].start = run.start;
    arena->runs[other].length = run.length;
    link_between(arena, other, run.prev, run.next);
}

/* --- windows: runs from `left` to `right` whose regions are packed anew --- */

/* Take the window's free runs out and answer the run before it. Its regions
 * stay linked, in their order, at their old starts. */
static uint32_t open_window(odma_arena *arena, uint32_t left, uint32_t right) {
    uint32_t before = arena->runs[left].prev, end = arena->runs[right].next;
    for (uint32_t id = left; id != end;) {
        uint32_t next = arena->runs[id].next;
        if (is_free_run(arena, id)) drop_free(arena, id);
        id = next;
    }
    return before;
}

/* Put the gaps between the regions of an opened window, and its ends, back. */
static void close_gaps(odma_arena *arena, uint32_t before, uint32_t end) {
    uint32_t prev = before, id = before == NONE ? arena->first_run : arena->runs[before].next;
    uint32_t at = before == NONE ? 0 : arena->runs[before].start + arena->runs[before].length;
    for (;; id = arena->runs[id].next) {
        uint32_t start = id == NONE ? arena->geometry.blocks : arena->runs[id].start;
        if (start > at) add_free(arena, at, start - at, prev, id);
        if (id == end) return;
        at = start + arena->runs[id].length;
        prev = id;
    }
}

/* Put the one gap of a packed window between two runs, and answer it. */
static uint32_t close_window(odma_arena *arena, uint32_t prev, uint32_t next) {
    uint32_t start = prev == NONE ? 0 : arena->runs[prev].start + arena->runs[prev].length;
    uint32_t end = next == NONE ? arena->geometry.blocks : arena->runs[next].start;
    return add_free(arena, start, end - start, prev, next);
}
