/* keep.c - runs that are kept: free memory with a memory.
 *
 *   Rule 1   A kept run has no writer. Keys stand for its beginning.
 *   Rule 2   It is spare, and counts as free, unless somebody may still read or write it:
 *            this batch gathers from it, or with several streams an answer that is not
 *            completed frees it or gathers from it. Then it counts as waiting.
 *   Rule 3   A spare run is given up for whatever else needs its place. While a search for
 *            room gives runs up (step.giving), spare runs are gaps for it, as free ones are.
 */
#include <math.h>

static inline bool is_kept(const odma_arena *arena, uint32_t run) {
    return run < arena->layout.table_size && arena->cells[run].slot.state == ODMA_REGION_KEPT;
}

static inline bool is_spare(const odma_arena *arena, uint32_t run) {
    return arena->granule_blocks > 0 && run < arena->layout.table_size && arena->holds[run].spare;
}

/* Whether a run is free for the search that is under way. */
static inline bool is_gap(const odma_arena *arena, uint32_t run) {
    return is_free_run(arena, run) || (arena->step.giving && is_spare(arena, run));
}

/* What is free or will be given up, and what will be that after a completion. */
static inline uint32_t room_blocks(const odma_arena *arena) {
    return arena->free_blocks + arena->spare_blocks;
}
static inline uint32_t coming_blocks(const odma_arena *arena) {
    return arena->waiting_blocks + arena->kept_blocks - arena->spare_blocks;
}

static inline uint32_t live_blocks(const odma_arena *arena) {
    return arena->geometry.blocks - arena->free_blocks - arena->waiting_blocks -
           arena->kept_blocks;
}

/* The longest run of blocks that are free or would be given up; once a step has searched
 * enough, only of what is free. */
static uint32_t largest_room(odma_arena *arena) {
    if (arena->spare_blocks == 0 || !may_search(arena)) return largest_run(arena);
    uint32_t largest = 0, sum = 0;
    for (uint32_t id = arena->first_run; id != NONE; id = arena->runs[id].next) {
        arena->steps++;
        sum = is_free_run(arena, id) || is_spare(arena, id) ? sum + arena->runs[id].length : 0;
        if (sum > largest) largest = sum;
    }
    return largest;
}

/* --- who may still use a run --- */

/* Blocks from the beginning that this batch gathers from a run. */
static uint32_t gathered_blocks(const odma_arena *arena, uint32_t slot) {
    const struct hold *hold = &arena->holds[slot];
    return hold->gathered_tick == arena->step.tick ? hold->gathered : 0;
}

/* The answer after whose completion nobody gathers from a run, as far as is known now; 0: now. */
static uint64_t read_until(const odma_arena *arena, uint32_t slot) {
    uint64_t seq = arena->marks[slot].read_seq;
    if (gathered_blocks(arena, slot) > 0) seq = arena->books->seq;
    return seq > arena->books->completed_seq ? seq : 0;
}

/* The same of anybody who might use a kept run. */
static uint64_t used_until(const odma_arena *arena, uint32_t slot) {
    uint64_t seq = arena->cells[slot].slot.seq, read = read_until(arena, slot);
    if (seq <= arena->books->completed_seq) seq = 0;
    return seq > read ? seq : read;
}

/* Free what a kept run holds beyond its keys. */
static void cut_tail(odma_arena *arena, uint32_t slot) {
    uint32_t blocks = arena->marks[slot].keyed * arena->granule_blocks;
    uint32_t length = arena->runs[slot].length;
    if (blocks == length) return;
    run_cut(arena, slot, blocks);
    set_place(arena, slot);
    arena->kept_blocks -= length - blocks;
}

/* Find out whether a kept run is spare. */
static void refresh(odma_arena *arena, uint32_t slot) {
    struct hold *hold = &arena->holds[slot];
    bool spare = is_kept(arena, slot) && used_until(arena, slot) == 0;
    if (spare && !hold->spare) {
        cut_tail(arena, slot);
        arena->spare_blocks += arena->runs[slot].length;
    }
    if (!spare && hold->spare) arena->spare_blocks -= arena->runs[slot].length;
    hold->spare = spare;
    if (spare || hold->tied || !is_kept(arena, slot)) return;
    hold->tied = true;
    arena->tied[arena->tied_count++] = slot;
}

/* The same of all that were not: after a batch, or a completion. */
static void refresh_tied(odma_arena *arena) {
    uint32_t count = arena->tied_count;
    arena->tied_count = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = arena->tied[i];
        arena->holds[slot].tied = false;
        if (is_kept(arena, slot)) refresh(arena, slot);
    }
}

/* --- kept, and not any more --- */

/* A run has become a kept one. The tail that it has beyond its keys is free with it. */
static void enter_kept(odma_arena *arena, uint32_t slot) {
    arena->kept++;
    arena->kept_blocks += arena->runs[slot].length;
    arena->kept_granules += arena->marks[slot].keyed;
    refresh(arena, slot);
}

/* A kept run is about to be something else. */
static void leave_kept(odma_arena *arena, uint32_t slot) {
    arena->kept--;
    arena->kept_blocks -= arena->runs[slot].length;
    arena->kept_granules -= arena->marks[slot].keyed;
    if (arena->holds[slot].spare) arena->spare_blocks -= arena->runs[slot].length;
    arena->holds[slot].spare = false;
}

static void note_use(odma_arena *arena, uint32_t slot) {
    arena->marks[slot].last_use = arena->books->turns;
    mark_mark(arena, slot);
}

static void count_given_up(odma_arena *arena, uint32_t slot) {
    uint64_t granules = arena->marks[slot].keyed;
    arena->reuse->given_up_tokens += granules * arena->geometry.granule_tokens;
    books_mark(arena, arena->reuse, sizeof *arena->reuse);
}

/* Make a spare run free memory. */
static void give_up(odma_arena *arena, uint32_t slot) {
    count_given_up(arena, slot);
    leave_kept(arena, slot);
    run_release(arena, slot);
    clear_slot(arena, slot);
}

/* Give up all spare runs among those from `left` to `right`. */
static void give_up_between(odma_arena *arena, uint32_t left, uint32_t right) {
    uint32_t end = arena->runs[right].start + arena->runs[right].length;
    for (uint32_t id = left; id != NONE && arena->runs[id].start < end;) {
        uint32_t next = arena->runs[id].next;
        while (is_free_run(arena, next)) next = arena->runs[next].next; /* they may be joined */
        if (is_spare(arena, id)) give_up(arena, id);
        id = next;
    }
}

/* What it costs to give a run up: always less than any copy. The longer its last use is
 * ago the longer its next one will take, and the less its tokens are worth. */
static double worth(const odma_arena *arena, uint32_t slot) {
    const struct mark *mark = &arena->marks[slot];
    double age = (double)(arena->books->turns - mark->last_use + 1);
    return 1e-18 * mark->keyed * arena->geometry.granule_tokens / age;
}

/* Give up the spare run that was not used for longest. Answers whether there was one. */
static bool give_up_oldest(odma_arena *arena) {
    uint32_t oldest = NONE;
    if (!may_search(arena)) return false;
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        arena->steps++;
        if (is_spare(arena, i) &&
            (oldest == NONE || arena->marks[i].last_use < arena->marks[oldest].last_use))
            oldest = i;
    }
    if (oldest != NONE) give_up(arena, oldest);
    return oldest != NONE;
}

/* Keep the beginning of a region that has ended, as far as `tokens` and keys go. Answers
 * whether there was anything to keep, and room in the table. */
static bool keep(odma_arena *arena, uint32_t slot, uint32_t tokens) {
    struct mark *mark = &arena->marks[slot];
    uint32_t granules = granules_in(arena, tokens);
    if (granules > mark->given) granules = mark->given;
    if (granules == 0) return false;
    if (arena->kept == arena->geometry.max_regions && !give_up_oldest(arena)) return false;
    cut_keys(arena, slot, granules);
    set_keyed(arena, slot, granules);
    mark->reused = 0;
    note_use(arena, slot);
    struct slot *run = &arena->cells[slot].slot;
    *run = (struct slot){.state = ODMA_REGION_KEPT,
                         .generation = run->generation,
                         .seq = frees_at_once(arena) ? 0 : arena->step.seq};
    set_place(arena, slot);
    struct note *note = note_of(arena, slot);
    note->listed = note->pinned = note->placed = false;
    enter_kept(arena, slot);
    return true;
}
