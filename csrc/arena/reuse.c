/* reuse.c - what a request finds written: adopted, or gathered.
 *
 * A request brings the keys of its granules. The walk over them ends at the first that
 * stands nowhere; the runs where the last one stands begin as the request does. One of
 * these that is kept and has nothing more to lose is adopted: the request becomes its
 * writer, in place. Else the beginning is gathered: copied to a new region by copies that
 * come after all others of the batch, as far as these leave copies and tokens. Else a
 * kept run is adopted that loses less than it gives. Whatever fails leaves the request
 * with less, or nothing, to reuse: it is refused only if it would be without keys.
 *
 * Room is looked for twice. First what is kept stays: then, if that was refused, spare
 * runs count as gaps, and those of the cheapest place are given up. Then the place is
 * there for a search that knows nothing of keeping.
 */
#include <math.h>

/* --- room that is given up --- */

/* End a search among gaps: give up the spare runs of what it has found (left NONE: nothing). */
static void end_giving(odma_arena *arena, uint32_t left, uint32_t right) {
    arena->step.giving = false;
    if (left != NONE) give_up_between(arena, left, right);
}

/* Give up kept runs so that plan_new() finds `length` blocks. Nothing is given up if it
 * would be refused all the same, but for the budget: then as much as lies in its window,
 * so that the slide can be done in parts. */
static bool clear_for_new(odma_arena *arena, uint32_t length, struct plan_refusal *refusal) {
    if (arena->spare_blocks == 0 || !may_search(arena)) return false;
    bool slides = allowed(arena) == ODMA_OVERFLOW_COMPACT && arena->step.seq != NO_BATCH &&
                  arena->books->engine.single_ordered_stream;
    uint32_t left = NONE, right = NONE;
    struct cost cost = {0};
    *refusal = (struct plan_refusal){0};
    arena->step.giving = true;
    bool found = room_blocks(arena) >= length &&
                 (cheapest_window(arena, length, NOBODY, &left, &right) ||
                  (slides && cheapest_window(arena, length, NOT_PINNED, &left, &right)));
    if (found && left != right) pack(arena, left, arena->runs[right].prev, right, &cost);
    if (found && !within_budget(arena, &cost)) {
        found = over_budget(arena, refusal, &cost);
    } else if (!found) {
        uint32_t a, b;
        bool pinned = slides && arena->step.pins > 0 && room_blocks(arena) >= length &&
                      cheapest_window(arena, length, ANYBODY, &a, &b);
        no_plan(refusal, pinned ? ODMA_REASON_PINNED
                                : lack(arena, length, waiting_would_do(arena, length)));
    }
    end_giving(arena, left, right);
    return found;
}

/* The last of the gaps behind a region that hold `more` blocks, or NONE. */
static uint32_t gaps_behind(odma_arena *arena, uint32_t slot, uint32_t more) {
    uint32_t sum = 0;
    for (uint32_t id = arena->runs[slot].next; id != NONE && is_gap(arena, id);
         id = arena->runs[id].next) {
        arena->steps++;
        sum += arena->runs[id].length;
        if (sum >= more) return id;
    }
    return NONE;
}

/* What is lost with the spare runs of a window. */
static double worth_between(const odma_arena *arena, const struct window *window) {
    uint32_t end = arena->runs[window->right].start;
    double sum = 0;
    for (uint32_t id = window->left; id != NONE && arena->runs[id].start <= end;
         id = arena->runs[id].next)
        sum += is_spare(arena, id) ? worth(arena, id) : 0;
    return sum;
}

/* Give up kept runs so that a region can have `length` blocks, in place or by plan_room():
 * the same for growth. */
static bool clear_for_room(odma_arena *arena, uint32_t slot, uint32_t length,
                           struct plan_refusal *refusal) {
    if (arena->spare_blocks == 0 || !may_search(arena)) return false;
    uint32_t more = length - arena->runs[slot].length;
    *refusal = (struct plan_refusal){0};
    arena->step.giving = true;
    struct window behind = {.left = arena->runs[slot].next,
                            .right = gaps_behind(arena, slot, more)};
    bool moves = allowed(arena) != ODMA_OVERFLOW_PREEMPT && arena->step.seq != NO_BATCH;
    bool ordered = arena->books->engine.single_ordered_stream;
    bool itself = may_move(arena, slot, false) && (ordered || !note_of(arena, slot)->moved);
    struct window room = {.left = NONE}, hole = {.left = NONE};
    struct cost cost = {0}, own = {.tokens = used_of(arena, slot), .moves = 1};
    own.copies = own.tokens > 0;
    bool goes = moves && itself &&
                cheapest_window(arena, length, NOBODY, &hole.left, &hole.right);
    if (behind.right != NONE) { /* to move itself costs little beside what is lost behind it */
        bool leaves = goes && within_budget(arena, &own) &&
                      2 * worth_between(arena, &hole) < worth_between(arena, &behind);
        if (!leaves) hole = behind;
        end_giving(arena, hole.left, hole.right);
        return true;
    }
    bool slides = moves && ordered && room_blocks(arena) >= more &&
                  cheapest_room(arena, slot, more, false, &room);
    if (slides) pack(arena, room.left, slot, room.right, &cost);
    bool slide = slides && within_budget(arena, &cost);
    bool go = goes && within_budget(arena, &own) && !(slide && room.price <= price_of(arena, slot));
    if (!slide && !go) {
        if (slides) over_budget(arena, refusal, &cost);
        if (goes) over_budget(arena, refusal, &own);
        if (!slides && !goes) no_plan(refusal, room_lack(arena, slot, more, length));
    }
    const struct window *chosen = go || !slides ? &hole : &room;
    end_giving(arena, chosen->left, chosen->right);
    return slide || go;
}

/* Let a region that has fewer have exactly `length` blocks. */
static bool grow_to(odma_arena *arena, uint32_t slot, uint32_t length) {
    struct plan_refusal refusal = {0};
    for (int i = 0; i < 2; i++) {
        if (grow_in_place(arena, slot, length, length) ||
            plan_room(arena, slot, length, &refusal))
            return true;
        if (i > 0 || !clear_for_room(arena, slot, length, &refusal)) return false;
    }
    return false;
}

/* Let a slot that holds nothing hold `length` blocks. */
static inline bool place_new(odma_arena *arena, uint32_t slot, uint32_t length,
                             struct plan_refusal *refusal) {
    return plan_new(arena, slot, length, refusal) ||
           (clear_for_new(arena, length, refusal) && plan_new(arena, slot, length, refusal));
}

/* --- what there is --- */

struct found {
    uint32_t granules;  /* from the first that are written somewhere; 0: none */
    uint32_t kept;      /* the run that may be adopted with the least loss, or NONE */
    uint32_t loss;      /* granules that it has beyond */
    uint32_t source;    /* a run to gather from */
};

/* Whether a run may get a writer who writes beyond its first `granules`. */
static bool is_adoptable(const odma_arena *arena, uint32_t slot, uint32_t granules) {
    if (!is_kept(arena, slot) || arena->cells[slot].slot.generation == UINT32_MAX) return false;
    if (arena->cells[slot].slot.seq > arena->books->completed_seq) return false;
    if (granules >= arena->marks[slot].keyed) return true;
    uint64_t read = arena->marks[slot].read_seq;
    return read <= arena->books->completed_seq &&
           gathered_blocks(arena, slot) <= granules * arena->granule_blocks;
}

static struct found look_up(odma_arena *arena, const odma_op *op) {
    struct found found = {.kept = NONE, .source = NONE, .loss = UINT32_MAX};
    uint32_t most = granules_in(arena, op->prompt_tokens + op->generated_tokens - 1);
    uint32_t count = op->key_bytes / ODMA_KEY_BYTES, first = NONE;
    if (count < most) most = count;
    for (; found.granules < most; found.granules++) {
        const uint8_t *bytes = op->keys + (size_t)found.granules * ODMA_KEY_BYTES;
        uint32_t key = same_from(arena, *head_of(arena, bytes), bytes, found.granules);
        if (key == NONE) break;
        first = key;
    }
    if (found.granules == 0) return found;
    uint32_t index = found.granules - 1;
    const uint8_t *bytes = op->keys + (size_t)index * ODMA_KEY_BYTES;
    found.source = arena->keys[first].slot;
    for (uint32_t i = 0; first != NONE && i < MOST_CANDIDATES && found.loss > 0; i++) {
        uint32_t slot = arena->keys[first].slot;
        uint32_t loss = arena->marks[slot].keyed - found.granules;
        if (is_live(arena, slot)) found.source = slot;
        if (loss < found.loss && is_adoptable(arena, slot, found.granules)) {
            found.loss = loss;
            found.kept = slot;
        }
        first = same_from(arena, arena->links[first].next, bytes, index);
    }
    return found;
}

/* --- adopting --- */

/* Let a kept run have a writer, and `length` blocks, of which the first `granules` are
 * written. Answers whether there is room; if not, nothing has changed. */
static bool adopt(odma_arena *arena, uint32_t slot, uint32_t granules, uint32_t length) {
    struct slot before = arena->cells[slot].slot, *run = &arena->cells[slot].slot;
    struct mark *mark = &arena->marks[slot];
    uint32_t keyed = mark->keyed;
    leave_kept(arena, slot);
    *run = (struct slot){.state = ODMA_REGION_LIVE,
                         .generation = before.generation + 1,
                         .start = before.start,
                         .length = before.length,
                         .seq = arena->step.seq};
    mark->keyed = granules; /* so much of it has to be moved */
    bool fits = arena->runs[slot].length >= length || grow_to(arena, slot, length);
    mark->keyed = keyed;
    if (!fits) {
        *run = before;
        enter_kept(arena, slot);
        return false;
    }
    if (arena->runs[slot].length > length) run_cut(arena, slot, length);
    set_place(arena, slot);
    cut_keys(arena, slot, granules);
    mark->reused = granules;
    arena->reuse->adopted_tokens += (uint64_t)granules * arena->geometry.granule_tokens;
    return true;
}

/* --- gathering --- */

/* Lone operations have no tokens to copy. */
static bool may_gather(const odma_arena *arena) {
    return arena->step.copy_tokens_left >= arena->geometry.granule_tokens &&
           arena->step.copy_count + arena->step.gather_count < arena->geometry.max_copies;
}

/* Hold what a batch gathers from a run: `blocks` from its beginning. Answers what was held
 * before. */
static struct hold hold_source(odma_arena *arena, uint32_t slot, uint32_t blocks) {
    struct hold *hold = &arena->holds[slot], before = *hold;
    if (blocks > gathered_blocks(arena, slot)) hold->gathered = blocks;
    hold->gathered_tick = arena->step.tick;
    refresh(arena, slot);
    return before;
}

static void let_source_go(odma_arena *arena, uint32_t slot, struct hold before) {
    arena->holds[slot].gathered = before.gathered;
    arena->holds[slot].gathered_tick = before.gathered_tick;
    refresh(arena, slot);
}

/* Place a new region of which the first `granules` will be gathered. Not inlined: few
 * allocates come here, and all would carry it. */
static __attribute__((noinline)) bool place_gathering(odma_arena *arena, uint32_t slot,
                                                      uint32_t length,
                                                      const struct found *found) {
    struct plan_refusal refusal = {0};
    uint32_t source = found->source, blocks = found->granules * arena->granule_blocks;
    struct hold before = hold_source(arena, source, blocks);
    if (!place_new(arena, slot, length, &refusal)) {
        let_source_go(arena, source, before);
        return false;
    }
    if (!arena->books->engine.single_ordered_stream)
        arena->marks[source].read_seq = arena->step.seq;
    note_use(arena, source);
    return true;
}

/* Where the tokens of a gather's source lie when the gathers are done: after the slides
 * where copies run in one order; else where they lay before the batch. */
static uint32_t source_start(odma_arena *arena, uint32_t slot) {
    const struct step *step = &arena->step;
    uint32_t i = 0;
    if (arena->books->engine.single_ordered_stream || !note_of(arena, slot)->moved)
        return arena->runs[slot].start;
    while (i < step->moved_count && step->moved[i].slot != slot) i++;
    return step->moved[i].first_start;
}

/* The copies of the gathers of a batch, as far as it has copies and tokens left. */
static void settle_gathers(odma_arena *arena) {
    struct step *step = &arena->step;
    uint32_t unit = arena->geometry.granule_tokens;
    for (uint32_t i = 0; i < step->gather_count; i++) {
        const struct gather *gather = &step->gathers[i];
        uint32_t rule, slot = slot_of(arena, gather->handle, &rule);
        uint32_t granules = gather->granules, left = step->copy_tokens_left / unit;
        uint64_t block_tokens = arena->geometry.block_tokens;
        arena->holds[gather->source].gathered = 0;
        if (granules > left) granules = left;
        if (slot == NONE || step->copy_count == arena->geometry.max_copies) continue;
        uint32_t room = arena->runs[slot].length / arena->granule_blocks;
        if (granules > room) granules = room;
        if (granules == 0) continue;
        uint64_t from = source_start(arena, gather->source) * block_tokens;
        copy(arena, slot, from, arena->runs[slot].start * block_tokens, granules * unit);
        step->copies[step->copy_count - 1].overlaps = 0;
        step->copy_tokens_left -= granules * unit;
        arena->books->counters.copies++;
        arena->books->counters.copied_tokens += granules * unit;
        arena->reuse->gathered_tokens += granules * unit;
        arena->marks[slot].reused = granules;
        set_keyed(arena, slot, granules);
        mark_mark(arena, slot);
        step->places_changed = true;
    }
}

/* --- both --- */

/* Give a new region a slot and a place, and as much to reuse as there is. NONE: it is
 * refused. */
static uint32_t place_region(odma_arena *arena, const odma_op *op, uint32_t length,
                             struct plan_refusal *refusal) {
    struct found found = {.kept = NONE, .source = NONE};
    if (op->key_bytes > 0) found = look_up(arena, op);
    if (found.kept != NONE && found.loss == 0) {
        if (adopt(arena, found.kept, found.granules, length)) return found.kept;
        found = look_up(arena, op); /* it may have given up what was found */
        if (found.loss == 0) found.kept = NONE;
    }
    uint32_t slot = take_slot(arena);
    if (found.source != NONE && may_gather(arena) &&
        place_gathering(arena, slot, length, &found)) {
        arena->step.gathers[arena->step.gather_count++] =
            (struct gather){.source = found.source, .granules = found.granules};
    } else if (found.kept != NONE && is_kept(arena, found.kept) && found.loss > 0 &&
               found.loss <= found.granules && adopt(arena, found.kept, found.granules, length)) {
        give_slot(arena, slot);
        return found.kept;
    } else if (!place_new(arena, slot, length, refusal)) {
        give_slot(arena, slot);
        return NONE;
    }
    arena->cells[slot].slot.generation++;
    if (arena->granule_blocks == 0) return slot;
    begin_mark(arena, slot);
    if (arena->step.gather_count > 0 && /* its own has no handle yet */
        arena->step.gathers[arena->step.gather_count - 1].handle == 0)
        arena->step.gathers[arena->step.gather_count - 1].handle = handle_of(arena, slot);
    return slot;
}

/* The keys that a request brings besides those of what it has adopted. */
static void take_keys(odma_arena *arena, uint32_t slot, const odma_op *op) {
    const struct mark *mark = &arena->marks[slot];
    uint32_t most = arena->runs[slot].length / arena->granule_blocks;
    for (uint32_t i = mark->given; i < op->key_bytes / ODMA_KEY_BYTES && i < most; i++)
        add_key(arena, slot, op->keys + (size_t)i * ODMA_KEY_BYTES);
    note_use(arena, slot);
    arena->reuse->prompt_tokens += (uint64_t)op->prompt_tokens + op->generated_tokens;
    books_mark(arena, arena->reuse, sizeof *arena->reuse);
}
