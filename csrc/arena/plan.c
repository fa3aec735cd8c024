/* plan.c - where a region goes, and what has to move for it.
 *
 * There are two plans. To relocate: the region that grows goes to the shortest
 * hole that fits. To slide: the regions of one window of neighbours are packed
 * against its ends, so that its holes become one. The window is the cheapest
 * there is; it is found with two pointers, in one pass over the address order.
 *
 * What an engine can do decides what a plan may be. Where copies run in one
 * order, a slide is a list of copies in which each may write where an earlier
 * one has read: regions that go down are copied from the lowest up, regions
 * that go up from the highest down, so no copy writes over what another still
 * has to read. Engines that cannot copy onto an overlapping source get a slide
 * in pieces as long as the shift. Where copies run in any order, nothing may be
 * written that the same batch reads, so there are relocations only, each region
 * moves once a batch, and what it leaves waits for completion.
 */
#include <math.h>
#include <string.h>

/* One end of a window around a region that grows. */
struct side {
    uint32_t edge;   /* outermost run: free, or the region itself */
    uint32_t gap;    /* free blocks between region and edge, edge included */
    double price;
};

struct plan_refusal {
    uint32_t reason;
    uint32_t copy_tokens_needed;
};

struct cost {
    uint64_t tokens;
    uint64_t copies;
    uint32_t moves;
};

/* --- what moving costs --- */

/* Seconds of copies: see odma_engine. */
static double price(const odma_arena *arena, uint64_t tokens, uint64_t copies) {
    const struct plain_engine *engine = &arena->books->engine;
    return (double)tokens * engine->token_seconds +
           (double)copies * engine->planes * engine->descriptor_seconds;
}

/* Of one region in one piece: exact, but for slides that need several. */
static double price_of(const odma_arena *arena, uint32_t slot) {
    uint32_t used = used_of(arena, slot);
    return price(arena, used, used > 0);
}

static uint64_t pieces(const odma_arena *arena, uint32_t used, uint32_t from, uint32_t to) {
    uint64_t shift = (uint64_t)(from > to ? from - to : to - from) * arena->geometry.block_tokens;
    if (used == 0 || shift == 0) return 0;
    if (shift >= used || arena->books->engine.copies_may_overlap) return 1;
    return (used + shift - 1) / shift;
}

static void add_cost(const odma_arena *arena, struct cost *cost, uint32_t slot, uint32_t to) {
    uint32_t from = arena->runs[slot].start, used = used_of(arena, slot);
    if (from == to) return;
    cost->tokens += used;
    cost->copies += pieces(arena, used, from, to);
    cost->moves++;
}

static bool within_budget(const odma_arena *arena, const struct cost *cost) {
    return cost->tokens <= arena->step.copy_tokens_left &&
           arena->step.copy_count + cost->copies <= arena->geometry.max_copies &&
           arena->step.moves + cost->moves <= arena->geometry.max_copies;
}

static bool may_move(odma_arena *arena, uint32_t run, bool ignore_pins) {
    return is_live(arena, run) && (ignore_pins || !note_of(arena, run)->pinned);
}

static uint32_t allowed(const odma_arena *arena) {
    uint32_t moves = arena->books->engine.moves, overflow = arena->books->policy.overflow;
    return moves < overflow ? moves : overflow; /* the enums count alike */
}

/* --- moving --- */

static void copy(odma_arena *arena, uint32_t slot, uint64_t from, uint64_t to, uint64_t tokens) {
    uint64_t shift = from > to ? from - to : to - from;
    arena->step.copies[arena->step.copy_count++] = (odma_copy){.handle = handle_of(arena, slot),
                                                               .from_token = (uint32_t)from,
                                                               .to_token = (uint32_t)to,
                                                               .tokens = (uint32_t)tokens,
                                                               .overlaps = shift < tokens};
}

/* Write down the copies of a region that moves from block `from` to `to`. */
static void emit(odma_arena *arena, uint32_t slot, uint32_t from, uint32_t to) {
    uint32_t used = used_of(arena, slot);
    uint64_t count = pieces(arena, used, from, to);
    if (count == 0) return;
    uint64_t unit = arena->geometry.block_tokens, source = from * unit, target = to * unit;
    uint64_t piece = count == 1 ? used : (from > to ? source - target : target - source);
    for (uint64_t done = 0; done < used; done += piece) {
        uint64_t tokens = used - done < piece ? used - done : piece;
        uint64_t offset = from > to ? done : used - done - tokens;
        copy(arena, slot, source + offset, target + offset, tokens);
    }
    arena->step.copy_tokens_left -= used;
    arena->books->counters.copies += count;
    arena->books->counters.copied_tokens += used;
}

static void note_move(odma_arena *arena, uint32_t slot) {
    struct note *note = note_of(arena, slot);
    if (!note->moved) {
        note->moved = true;
        arena->step.moved[arena->step.moved_count++] =
            (struct move){.slot = slot, .first_start = arena->runs[slot].start};
    }
    arena->step.moves++;
}

/* Move a region within an opened window if the budget allows it. Answers where it lies. */
static uint32_t shift(odma_arena *arena, uint32_t slot, uint32_t to) {
    uint32_t from = arena->runs[slot].start;
    struct cost cost = {0};
    add_cost(arena, &cost, slot, to);
    if (from == to || !within_budget(arena, &cost)) return from;
    fix_used(arena, slot);
    note_move(arena, slot);
    emit(arena, slot, from, to);
    arena->runs[slot].start = to;
    set_place(arena, slot);
    return to;
}

/* Where the runs of a window [left .. right] come to lie if its regions up to
 * and including `pivot` go down and the others up. Either the cost is added up
 * (`cost`), or they are moved as far as the budget goes. */
static void pack(odma_arena *arena, uint32_t left, uint32_t pivot, uint32_t right,
                 struct cost *cost) {
    uint32_t low = arena->runs[left].start;
    uint32_t high = arena->runs[right].start + arena->runs[right].length;
    uint32_t before = arena->runs[left].prev, after = arena->runs[right].next;
    uint32_t first_up = arena->runs[pivot].next;
    if (cost == NULL) {
        open_window(arena, left, right);
        left = before == NONE ? arena->first_run : arena->runs[before].next;
        right = after == NONE ? arena->last_run : arena->runs[after].prev;
        first_up = arena->runs[pivot].next;
    }
    for (uint32_t id = left; id != first_up; id = arena->runs[id].next) {
        arena->steps++;
        if (is_gap(arena, id)) continue;
        if (cost != NULL)
            add_cost(arena, cost, id, low);
        else
            low = shift(arena, id, low);
        low += arena->runs[id].length;
    }
    for (uint32_t id = right; id != pivot; id = arena->runs[id].prev) {
        arena->steps++;
        if (is_gap(arena, id)) continue;
        high -= arena->runs[id].length;
        if (cost != NULL)
            add_cost(arena, cost, id, high);
        else
            high = shift(arena, id, high);
    }
}

/* --- a hole for a new region --- */

/* Which regions may be moved out of a window. */
enum movable { NOBODY, NOT_PINNED, ANYBODY };

/* What it costs to make a gap of a run that a window takes in. */
static double price_in_window(const odma_arena *arena, uint32_t id) {
    if (is_free_run(arena, id)) return 0;
    return is_gap(arena, id) ? worth(arena, id) : price_of(arena, id);
}

/* The cheapest window whose holes hold `length` blocks together. */
static bool cheapest_window(odma_arena *arena, uint32_t length, enum movable movable,
                            uint32_t *left, uint32_t *right) {
    double best = INFINITY, sum = 0;
    uint32_t first = NONE, gap = 0;
    for (uint32_t id = arena->first_run; id != NONE; id = arena->runs[id].next) {
        arena->steps++;
        if (!is_gap(arena, id)) {
            if (first == NONE) continue;
            if (movable != NOBODY && may_move(arena, id, movable == ANYBODY)) {
                sum += price_of(arena, id);
            } else {
                first = NONE;
                gap = 0;
                sum = 0;
            }
            continue;
        }
        if (first == NONE) first = id;
        gap += arena->runs[id].length;
        sum += price_in_window(arena, id);
        while (gap - arena->runs[first].length >= length) {
            gap -= arena->runs[first].length;
            sum -= price_in_window(arena, first);
            for (first = arena->runs[first].next; !is_gap(arena, first);
                 first = arena->runs[first].next, arena->steps++)
                sum -= price_of(arena, first);
        }
        if (gap >= length && sum < best) {
            best = sum;
            *left = first;
            *right = id;
        }
    }
    return best < INFINITY;
}

/* Whether a run of `length` blocks will be free once all that waits is done. */
static bool waiting_would_do(odma_arena *arena, uint32_t length) {
    uint32_t sum = 0;
    if (coming_blocks(arena) == 0 || !may_search(arena)) return false;
    for (uint32_t id = arena->first_run; id != NONE; id = arena->runs[id].next) {
        arena->steps++;
        sum = is_live(arena, id) ? 0 : sum + arena->runs[id].length;
        if (sum >= length) return true;
    }
    return false;
}

static bool no_plan(struct plan_refusal *refusal, uint32_t reason) {
    refusal->reason = reason;
    return false;
}

/* Refuse for the budget, naming the cheapest of the plans that were tried: its
 * tokens, or 0 if it has more copies than the answer holds. */
static bool over_budget(const odma_arena *arena, struct plan_refusal *refusal,
                        const struct cost *cost) {
    bool first = refusal->reason != ODMA_REASON_COPY_BUDGET;
    uint32_t needed = cost->tokens > arena->step.copy_tokens_left ? (uint32_t)cost->tokens : 0;
    if (first || refusal->copy_tokens_needed == 0 ||
        (needed != 0 && needed < refusal->copy_tokens_needed))
        refusal->copy_tokens_needed = needed;
    return no_plan(refusal, ODMA_REASON_COPY_BUDGET);
}

/* Why `blocks` cannot be had although nothing that was tried is against it;
 * `would_do`: they could, once nothing waits any more. */
static uint32_t lack(const odma_arena *arena, uint32_t blocks, bool would_do) {
    if (coming_blocks(arena) > 0 && would_do) return ODMA_REASON_WAITS_FOR_COMPLETION;
    return room_blocks(arena) < blocks ? ODMA_REASON_NO_SPACE : ODMA_REASON_FRAGMENTED;
}

/* Make a hole of `length` blocks by moving others, if the policy and the engine allow it. */
static uint32_t win_hole(odma_arena *arena, uint32_t length, struct plan_refusal *refusal) {
    bool slides = allowed(arena) == ODMA_OVERFLOW_COMPACT &&
                  arena->books->engine.single_ordered_stream;
    if (arena->free_blocks < length || !slides || arena->step.seq == NO_BATCH ||
        !may_search(arena)) {
        no_plan(refusal, lack(arena, length, waiting_would_do(arena, length)));
        return NONE;
    }
    uint32_t left = NONE, right = NONE;
    if (!cheapest_window(arena, length, NOT_PINNED, &left, &right)) {
        bool pinned = arena->step.pins > 0 &&
                      cheapest_window(arena, length, ANYBODY, &left, &right);
        no_plan(refusal, pinned ? ODMA_REASON_PINNED
                                : lack(arena, length, waiting_would_do(arena, length)));
        return NONE;
    }
    struct cost cost = {0};
    uint32_t pivot = arena->runs[right].prev, after = arena->runs[right].next;
    pack(arena, left, pivot, right, &cost);
    if (!within_budget(arena, &cost)) {
        over_budget(arena, refusal, &cost);
        return NONE;
    }
    pack(arena, left, pivot, right, NULL);
    arena->books->counters.compactions++;
    return close_window(arena, pivot, after);
}

/* Let a slot that holds nothing hold `length` blocks. */
static inline bool plan_new(odma_arena *arena, uint32_t slot, uint32_t length,
                            struct plan_refusal *refusal) {
    uint32_t hole = best_fit(arena, length);
    if (hole == NONE) hole = win_hole(arena, length, refusal);
    if (hole == NONE) return false;
    run_hold(arena, slot, hole, length);
    return true;
}

/* --- room for a region that grows --- */

/* The next free run beyond `side`, with what has to move to win it, or false. */
static bool widen(odma_arena *arena, struct side *side, bool down, bool others, bool ignore_pins) {
    uint32_t id = side->edge;
    for (;;) {
        arena->steps++;
        id = down ? arena->runs[id].prev : arena->runs[id].next;
        if (id == NONE) return false;
        if (is_gap(arena, id)) break;
        if (!others || !may_move(arena, id, ignore_pins)) return false;
        side->price += price_of(arena, id);
    }
    side->price += price_in_window(arena, id);
    side->edge = id;
    side->gap += arena->runs[id].length;
    return true;
}

struct window {
    uint32_t left, right;
    double price;
};

/* The cheapest window around a region that wins it `more` blocks. */
static bool cheapest_room(odma_arena *arena, uint32_t slot, uint32_t more, bool ignore_pins,
                          struct window *best) {
    bool others = allowed(arena) == ODMA_OVERFLOW_COMPACT;
    bool itself = may_move(arena, slot, ignore_pins);
    struct side *right = arena->sides;
    uint32_t b = 0;
    right[0] = (struct side){.edge = slot};
    while (right[b].gap < more) {
        right[b + 1] = right[b];
        if (!widen(arena, &right[b + 1], false, others, ignore_pins)) break;
        b++;
    }
    uint32_t free_behind = is_free_run(arena, arena->runs[slot].next) ? 1 : 0; /* costs nothing */
    struct side left = {.edge = slot};
    best->price = INFINITY;
    for (;;) {
        while (b > free_behind && left.gap + right[b - 1].gap >= more) b--;
        double both = left.price + right[b].price;
        if (left.gap + right[b].gap >= more && both < best->price)
            *best = (struct window){.left = left.edge, .right = right[b].edge, .price = both};
        if (!itself || left.gap >= more || left.price >= best->price) break;
        if (left.edge == slot) left.price = price_of(arena, slot);
        if (!widen(arena, &left, true, others, ignore_pins)) break;
    }
    return best->price < INFINITY;
}

static bool slide(odma_arena *arena, uint32_t slot, uint32_t length, const struct window *window,
                  const struct cost *cost, struct plan_refusal *refusal) {
    if (!within_budget(arena, cost)) return over_budget(arena, refusal, cost);
    pack(arena, window->left, slot, window->right, NULL);
    close_window(arena, slot, arena->runs[slot].next);
    fix_used(arena, slot);
    run_grow(arena, slot, length);
    set_place(arena, slot);
    arena->books->counters.compactions++;
    return true;
}

static bool relocate(odma_arena *arena, uint32_t slot, uint32_t length, uint32_t hole,
                     struct plan_refusal *refusal) {
    uint32_t from = arena->runs[slot].start, to = arena->runs[hole].start;
    struct cost cost = {0};
    add_cost(arena, &cost, slot, to);
    if (!within_budget(arena, &cost)) return over_budget(arena, refusal, &cost);
    uint32_t old = take_slot(arena);
    if (old == NONE) return no_plan(refusal, ODMA_REASON_TABLE_FULL);
    fix_used(arena, slot);
    note_move(arena, slot);
    emit(arena, slot, from, to);
    run_swap(arena, slot, old);
    run_hold(arena, slot, hole, length);
    set_waiting(arena, old);
    set_place(arena, slot);
    return true;
}

static bool grow_in_place(odma_arena *arena, uint32_t slot, uint32_t least, uint32_t aim) {
    uint32_t next = arena->runs[slot].next, length = arena->runs[slot].length;
    uint32_t most = length + (is_free_run(arena, next) ? arena->runs[next].length : 0);
    if (most < least) return false;
    fix_used(arena, slot);
    run_grow(arena, slot, aim < most ? aim : most);
    set_place(arena, slot);
    return true;
}

/* Whether a region that grows by `more` blocks to `length` will have room once all
 * that waits is done. */
static bool waiting_gives_room(odma_arena *arena, uint32_t slot, uint32_t more, uint32_t length) {
    uint32_t behind = 0;
    for (uint32_t id = arena->runs[slot].next; id != NONE && !is_live(arena, id) && behind < more;
         id = arena->runs[id].next, arena->steps++)
        behind += arena->runs[id].length;
    bool elsewhere = allowed(arena) != ODMA_OVERFLOW_PREEMPT && arena->step.seq != NO_BATCH;
    return behind >= more || (elsewhere && waiting_would_do(arena, length));
}

static uint32_t room_lack(odma_arena *arena, uint32_t slot, uint32_t more, uint32_t length) {
    if (!may_search(arena)) return lack(arena, more, false);
    struct window window;
    bool slides = arena->books->engine.single_ordered_stream;
    if (arena->step.pins > 0 && room_blocks(arena) >= more &&
        allowed(arena) != ODMA_OVERFLOW_PREEMPT &&
        ((slides && cheapest_room(arena, slot, more, true, &window)) ||
         best_fit(arena, length) != NONE))
        return ODMA_REASON_PINNED;
    return lack(arena, more, waiting_gives_room(arena, slot, more, length));
}

/* Let a region that cannot grow in place have `length` blocks, by the cheaper
 * plan that keeps the budget; of two that cost the same the slide, for it
 * leaves its spare room behind the region. */
static bool plan_room(odma_arena *arena, uint32_t slot, uint32_t length,
                      struct plan_refusal *refusal) {
    uint32_t more = length - arena->runs[slot].length;
    if (allowed(arena) == ODMA_OVERFLOW_PREEMPT || arena->step.seq == NO_BATCH)
        return no_plan(refusal, room_lack(arena, slot, more, length));
    bool ordered = arena->books->engine.single_ordered_stream;
    bool itself = may_move(arena, slot, false) && (ordered || !note_of(arena, slot)->moved);
    struct window window;
    struct cost cost = {0};
    bool slides = ordered && arena->free_blocks >= more && may_search(arena) &&
                  cheapest_room(arena, slot, more, false, &window);
    if (slides) pack(arena, window.left, slot, window.right, &cost);
    uint32_t hole = itself ? best_fit(arena, length) : NONE;
    bool slide_first = slides && (hole == NONE || price(arena, cost.tokens, cost.copies) <=
                                                      price_of(arena, slot));
    if (slide_first && slide(arena, slot, length, &window, &cost, refusal)) return true;
    if (hole != NONE && relocate(arena, slot, length, hole, refusal)) {
        arena->books->counters.relocations++;
        return true;
    }
    if (slides && !slide_first && slide(arena, slot, length, &window, &cost, refusal)) return true;
    if (refusal->reason != ODMA_REASON_NONE) return false;
    return no_plan(refusal, room_lack(arena, slot, more, length));
}

/* --- making way where copies run in any order ---
 *
 * Nothing can be won from a neighbour in the batch that moves it. But regions
 * can be sent to holes elsewhere now, so that what they leave is one run once
 * that is completed. The refusal then says so. */

enum { MOST_EVACUATED = 4 };

/* Runs in address order that fill [low, high), and the regions among them. */
struct stretch {
    uint32_t low, high;
    uint32_t regions[MOST_EVACUATED + 1], count; /* one too many before the first is let go */
    double price;
};

/* Whether a run is no region, or one that can go elsewhere. */
static bool can_go(odma_arena *arena, uint32_t id) {
    return !is_live(arena, id) ||
           (may_move(arena, id, false) && !note_of(arena, id)->moved &&
            best_fit(arena, arena->runs[id].length) != NONE);
}

/* Add the next run. */
static void take_in(odma_arena *arena, struct stretch *stretch, uint32_t id) {
    arena->steps++;
    stretch->high += arena->runs[id].length;
    if (is_live(arena, id)) stretch->regions[stretch->count++] = id;
}

/* Take the first run out. */
static void let_go(odma_arena *arena, struct stretch *stretch, uint32_t id) {
    arena->steps++;
    stretch->low += arena->runs[id].length;
    if (!is_live(arena, id)) return;
    stretch->count--;
    memmove(stretch->regions, stretch->regions + 1, stretch->count * sizeof *stretch->regions);
}

/* The hole outside of the stretch for its i-th region, or NONE. */
static uint32_t elsewhere(odma_arena *arena, const struct stretch *stretch, uint32_t i) {
    uint32_t hole = best_fit(arena, arena->runs[stretch->regions[i]].length);
    if (hole == NONE) return NONE;
    uint32_t start = arena->runs[hole].start;
    return start < stretch->low || start >= stretch->high ? hole : NONE;
}

static void send_away(odma_arena *arena, const struct stretch *stretch,
                      struct plan_refusal *refusal) {
    struct plan_refusal tried = {0};
    uint32_t gone = 0;
    for (; gone < stretch->count; gone++) {
        uint32_t region = stretch->regions[gone], hole = elsewhere(arena, stretch, gone);
        if (hole == NONE || !relocate(arena, region, arena->runs[region].length, hole, &tried))
            break;
    }
    if (gone > 0) {
        arena->books->counters.compactions++;
        *refusal = (struct plan_refusal){.reason = ODMA_REASON_WAITS_FOR_COMPLETION};
    } else if (tried.reason == ODMA_REASON_COPY_BUDGET) {
        *refusal = tried;
    }
}

static bool may_send_away(const odma_arena *arena) {
    return !arena->books->engine.single_ordered_stream && arena->step.seq != NO_BATCH &&
           allowed(arena) == ODMA_OVERFLOW_COMPACT;
}

/* Whether the regions of a stretch cost less than the best, and all find a hole. */
static bool is_better(odma_arena *arena, struct stretch *stretch, double best) {
    stretch->price = 0;
    for (uint32_t i = 0; i < stretch->count; i++)
        stretch->price += price_of(arena, stretch->regions[i]);
    bool better = stretch->price < best;
    for (uint32_t i = 0; better && i < stretch->count; i++)
        better = elsewhere(arena, stretch, i) != NONE;
    return better;
}

/* Make way for `length` blocks in one run, anywhere but where `slot` lies (NONE:
 * anywhere): the cheapest stretch whose regions all find a hole is cleared. It is
 * found with two pointers: each run is taken in once and let go once. */
static void plan_hole(odma_arena *arena, uint32_t slot, uint32_t length,
                      struct plan_refusal *refusal) {
    struct stretch best = {.price = INFINITY}, stretch = {0};
    if (!may_send_away(arena) || refusal->reason != ODMA_REASON_FRAGMENTED) return;
    uint32_t first = NONE;
    for (uint32_t id = arena->first_run; id != NONE; id = arena->runs[id].next) {
        arena->steps++;
        if (id == slot || !can_go(arena, id)) {
            first = NONE;
            continue;
        }
        if (first == NONE) {
            uint32_t start = arena->runs[id].start;
            stretch = (struct stretch){.low = start, .high = start};
            first = id;
        }
        take_in(arena, &stretch, id);
        while (stretch.low < stretch.high &&
               (is_live(arena, first) || stretch.count > MOST_EVACUATED ||
                stretch.high - stretch.low - arena->runs[first].length >= length)) {
            let_go(arena, &stretch, first);
            first = arena->runs[first].next;
        }
        if (stretch.low == stretch.high)
            first = NONE;
        else if (stretch.high - stretch.low >= length && is_better(arena, &stretch, best.price))
            best = stretch;
    }
    if (best.price < INFINITY) send_away(arena, &best, refusal);
}

/* --- slides that take several batches --- */

/* The cheapest window for a region that grows to `length` blocks, or (slot NONE) for
 * a new one, and the last of its regions that go down. */
static bool cheapest_slide(odma_arena *arena, uint32_t slot, uint32_t length,
                           struct window *window, uint32_t *pivot) {
    *pivot = slot;
    if (slot != NONE)
        return cheapest_room(arena, slot, length - arena->runs[slot].length, false, window);
    if (!cheapest_window(arena, length, NOT_PINNED, &window->left, &window->right)) return false;
    *pivot = arena->runs[window->right].prev;
    return true;
}

/* A slide was refused for the budget: do as much of it as the budget allows, so that
 * the next batch has less to do, and say what is lacking then. */
static void slide_partly(odma_arena *arena, uint32_t slot, uint32_t length,
                         struct plan_refusal *refusal) {
    struct window window;
    uint32_t pivot, moves = arena->step.moves;
    bool slides = arena->books->engine.single_ordered_stream &&
                  allowed(arena) == ODMA_OVERFLOW_COMPACT;
    if (refusal->reason != ODMA_REASON_COPY_BUDGET || !slides || !may_search(arena) ||
        !cheapest_slide(arena, slot, length, &window, &pivot))
        return;
    uint32_t before = arena->runs[window.left].prev, end = arena->runs[window.right].next;
    pack(arena, window.left, pivot, window.right, NULL);
    close_gaps(arena, before, end);
    if (arena->step.moves == moves) return;
    arena->books->counters.compactions++;
    struct cost cost = {0};
    *refusal = (struct plan_refusal){0};
    if (cheapest_slide(arena, slot, length, &window, &pivot))
        pack(arena, window.left, pivot, window.right, &cost);
    over_budget(arena, refusal, &cost);
    if (slot == NONE || !may_move(arena, slot, false) || best_fit(arena, length) == NONE) return;
    over_budget(arena, refusal, &(struct cost){.tokens = used_of(arena, slot)});
}

/* --- after a refusal --- */

/* Make way for a new region that plan_new() refused. */
static void plan_way_new(odma_arena *arena, uint32_t length, struct plan_refusal *refusal) {
    if (!may_search(arena)) return;
    slide_partly(arena, NONE, length, refusal);
    plan_hole(arena, NONE, length, refusal);
}

/* Make way for a region that plan_room() refused: behind it, or elsewhere. */
static void plan_way(odma_arena *arena, uint32_t slot, uint32_t length,
                     struct plan_refusal *refusal) {
    if (!may_search(arena)) return;
    slide_partly(arena, slot, length, refusal);
    if (!may_send_away(arena)) return;
    uint32_t low = arena->runs[slot].start, end = low + arena->runs[slot].length;
    struct stretch behind = {.low = low, .high = end};
    uint32_t id = arena->runs[slot].next;
    for (; id != NONE && behind.high - low < length; id = arena->runs[id].next) {
        if (!can_go(arena, id) || (is_live(arena, id) && behind.count == MOST_EVACUATED)) break;
        take_in(arena, &behind, id);
    }
    if (behind.high - low >= length) send_away(arena, &behind, refusal);
    plan_hole(arena, slot, length, refusal);
}
