/* batch.c - operations, one by one and in batches.
 *
 * Everything is done to the process's copy of the books, then committed as one
 * record. Whatever can fail is looked at before the first change, so there is
 * nothing to take back: an operation is refused whole or done whole.
 */
#include <math.h>
#include <string.h>

#include "arena.h"

enum { MOST_WANT_TOKENS = 1 << 28 };

/* Regions of which all that is known stays in the processor's cache; beyond it
 * memory is asked for before it is needed, this many operations ahead. */
enum { CACHED_REGIONS = 1024, AHEAD = 6 };

/* --- small things --- */

void set_place(odma_arena *arena, uint32_t slot) {
    arena->cells[slot].slot.start = arena->runs[slot].start;
    arena->cells[slot].slot.length = arena->runs[slot].length;
    mark_slot(arena, slot);
}

static void clear_slot(odma_arena *arena, uint32_t slot) {
    arena->cells[slot].slot = (struct slot){.generation = arena->cells[slot].slot.generation};
    mark_slot(arena, slot);
    give_slot(arena, slot);
}

/* Whether what is vacated is free at once, and need not wait for completion. */
static bool frees_at_once(const odma_arena *arena) {
    return arena->books->engine.single_ordered_stream || arena->batch_seq == UINT64_MAX;
}

/* What a slot holds was vacated: it is free at once if the engine's copies and
 * kernels run in one order, or nothing uses it; else once the batch is done. */
void set_waiting(odma_arena *arena, uint32_t slot) {
    if (frees_at_once(arena)) {
        release(arena, slot);
        clear_slot(arena, slot);
        return;
    }
    arena->cells[slot].slot = (struct slot){.state = ODMA_REGION_WAITING,
                                       .generation = arena->cells[slot].slot.generation,
                                       .seq = arena->batch_seq};
    set_place(arena, slot);
    arena->waits[(arena->waits_first + arena->waiting) % arena->layout.table_size] = slot;
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
        release(arena, slot);
        clear_slot(arena, slot);
    }
}

uint64_t handle_of(const odma_arena *arena, uint32_t slot) {
    return (uint64_t)arena->cells[slot].slot.generation << SLOT_BITS | slot;
}

/* The slot of a live region, or NONE with the rule that the handle breaks. */
static uint32_t slot_of(const odma_arena *arena, uint64_t handle, uint32_t *rule) {
    uint64_t slot = handle & HANDLE_SLOT, generation = handle >> SLOT_BITS;
    *rule = ODMA_RULE_HANDLE_UNKNOWN;
    if (slot >= arena->layout.table_size || generation == 0 ||
        generation > arena->cells[slot].slot.generation)
        return NONE;
    *rule = ODMA_RULE_HANDLE_DEAD;
    if (arena->cells[slot].slot.state != ODMA_REGION_LIVE ||
        generation != arena->cells[slot].slot.generation)
        return NONE;
    *rule = ODMA_RULE_NONE;
    return (uint32_t)slot;
}

/* Empty books: every region, id, seq and handle is forgotten, what was learnt
 * stays. */
void forget_books(odma_arena *arena) {
    struct books *books = arena->books;
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        if (arena->cells[i].slot.generation == 0 && arena->cells[i].slot.state == SLOT_FREE) continue;
        arena->cells[i].slot = (struct slot){0};
        mark_slot(arena, i);
    }
    books->epoch = books->seq = books->completed_seq = books->births = books->turns = 0;
    memset(books->boot_id, 0, sizeof books->boot_id);
    memset(&books->engine, 0, sizeof books->engine);
    if (books->policy.version == 0)
        books->policy = (odma_policy){.name = "static",
                                      .version = 1,
                                      .start = ODMA_START_MAXIMUM,
                                      .overflow = ODMA_OVERFLOW_PREEMPT,
                                      .step_tokens = 64,
                                      .growth = 1,
                                      .tenant_share = 1};
    memset(books->claims, 0, sizeof books->claims);
    mark(arena, books, offsetof(struct books, class_names));
    runs_reset(arena);
    count_accounts(arena);
}

/* --- results --- */

/* A result that says where a region lies. It is looked at again once the batch
 * is done if an earlier result of the batch said it too. */
static void placed(odma_arena *arena, uint32_t slot, odma_result *result) {
    note_of(arena, slot)->placed = true;
    *result = (odma_result){.outcome = ODMA_PLACED,
                            .handle = handle_of(arena, slot),
                            .start = arena->runs[slot].start,
                            .length = arena->runs[slot].length};
}

/* What earlier results of the batch say of a region is about to be wrong. */
static void will_change(odma_arena *arena, uint32_t slot) {
    arena->places_changed |= note_of(arena, slot)->placed;
}

static void refused(const odma_arena *arena, uint32_t reason, uint32_t rule, odma_result *result) {
    *result = (odma_result){.outcome = ODMA_REFUSED,
                            .reason = reason,
                            .rule = rule,
                            .free_blocks = arena->free_blocks,
                            .largest_run = largest_run(arena),
                            .waiting_blocks = arena->waiting_blocks};
}

static void invalid(const odma_arena *arena, uint32_t rule, odma_result *result) {
    bool unknown = rule == ODMA_RULE_HANDLE_DEAD || rule == ODMA_RULE_HANDLE_UNKNOWN;
    refused(arena, unknown ? ODMA_REASON_NOT_FOUND : ODMA_REASON_INVALID, rule, result);
}

/* A tenant's own requests keep their order, whatever its guarantee. */
static void hold_up(odma_arena *arena, const struct standing *tenant) {
    if (tenant->index != NONE) arena->held_up |= (uint32_t)1 << tenant->index;
}

/* --- free, trim, extend --- */

static void do_free(odma_arena *arena, const odma_op *op, odma_result *result) {
    uint32_t rule, slot = slot_of(arena, op->handle, &rule);
    if (op->end < ODMA_END_FINISHED || op->end > ODMA_END_PREEMPTED) rule = ODMA_RULE_END;
    if (op->output_tokens > MOST_OUTPUT_TOKENS) rule = ODMA_RULE_OUTPUT_TOKENS;
    if (rule == ODMA_RULE_HANDLE_DEAD) {
        *result = (odma_result){.outcome = ODMA_ALREADY_FREE};
        return;
    }
    if (rule != ODMA_RULE_NONE) {
        invalid(arena, rule, result);
        return;
    }
    will_change(arena, slot);
    odma_counters *counters = &arena->books->counters;
    if (op->end == ODMA_END_FINISHED || op->end == ODMA_END_HIT_LIMIT)
        learn(arena, slot, op->output_tokens, op->end == ODMA_END_HIT_LIMIT);
    counters->finished += op->end == ODMA_END_FINISHED;
    counters->hit_limit += op->end == ODMA_END_HIT_LIMIT;
    counters->preempted += op->end == ODMA_END_PREEMPTED;
    counters->frees++;
    drop_id(arena, slot);
    debit_region(arena, slot);
    arena->live--;
    set_waiting(arena, slot);
    *result = (odma_result){.outcome = ODMA_FREED};
}

static void do_trim(odma_arena *arena, const odma_op *op, odma_result *result) {
    uint32_t rule, slot = slot_of(arena, op->handle, &rule);
    if (slot == NONE) {
        invalid(arena, rule, result);
        return;
    }
    uint32_t blocks = blocks_of(arena, op->least_tokens), length = arena->runs[slot].length;
    if (blocks < 1 || blocks > length || op->least_tokens < used_of(arena, slot)) {
        if (blocks != length) {
            invalid(arena, ODMA_RULE_TO_TOKENS, result);
            return;
        }
    }
    will_change(arena, slot);
    bool at_once = frees_at_once(arena);
    if (blocks < length && at_once) {
        cut(arena, slot, blocks);
    } else if (blocks < length) {
        uint32_t tail = take_slot(arena);
        if (tail == NONE) {
            refused(arena, ODMA_REASON_TABLE_FULL, ODMA_RULE_NONE, result);
            return;
        }
        cut_to_slot(arena, slot, blocks, tail);
        set_waiting(arena, tail);
    }
    set_place(arena, slot);
    resize_region(arena, slot, length);
    arena->books->counters.trims++;
    placed(arena, slot, result);
}

static bool grow_in_place(odma_arena *arena, uint32_t slot, uint32_t least, uint32_t aim) {
    uint32_t next = arena->runs[slot].next, length = arena->runs[slot].length;
    uint32_t most = length + (is_free_run(arena, next) ? arena->runs[next].length : 0);
    if (most < least) return false;
    fix_used(arena, slot);
    grow(arena, slot, aim < most ? aim : most);
    set_place(arena, slot);
    return true;
}

/* Name who makes way for a region that cannot grow by `more` blocks: as far as
 * its tenant's guarantee goes those that borrow, else the youngest. */
static void advise_growth(odma_arena *arena, uint32_t slot, uint32_t more, odma_result *result) {
    struct standing tenant = standing_of(arena, arena->cells[slot].request.tenant);
    if (is_covered(&tenant, more)) result->preempt_handle = borrower(arena, &tenant);
    if (result->preempt_handle == 0) result->preempt_handle = youngest(arena, &tenant);
    hold_up(arena, &tenant);
}

static void do_extend(odma_arena *arena, const odma_op *op, odma_result *result) {
    uint32_t rule, slot = slot_of(arena, op->handle, &rule);
    if (slot != NONE) {
        uint32_t most = blocks_of(arena, arena->cells[slot].request.max_total_tokens);
        if (op->least_tokens < 1 || blocks_of(arena, op->least_tokens) > most)
            rule = ODMA_RULE_LEAST_TOKENS;
        else if (op->want_tokens != 0 &&
                 (op->want_tokens < op->least_tokens || op->want_tokens > MOST_WANT_TOKENS))
            rule = ODMA_RULE_WANT_TOKENS;
    }
    if (rule != ODMA_RULE_NONE) {
        invalid(arena, rule, result);
        return;
    }
    will_change(arena, slot);
    odma_counters *counters = &arena->books->counters;
    uint32_t least = blocks_of(arena, op->least_tokens), length = arena->runs[slot].length;
    if (least > length) {
        uint32_t aim = growth_blocks(arena, slot, op->least_tokens, op->want_tokens);
        struct plan_refusal refusal = {0};
        bool done = grow_in_place(arena, slot, least, aim) || make_room(arena, slot, aim, &refusal);
        if (!done && aim > least) {
            refusal = (struct plan_refusal){0};
            done = make_room(arena, slot, least, &refusal);
        }
        if (!done) {
            make_way(arena, slot, least, &refusal);
            refused(arena, refusal.reason, ODMA_RULE_NONE, result);
            result->copy_tokens_needed = refusal.copy_tokens_needed;
            advise_growth(arena, slot, least - length, result);
            counters->refused_extends++;
            return;
        }
        resize_region(arena, slot, length);
        if (arena->live > 1 && arena->free_blocks < arena->safety_blocks)
            counters->safety_hits_growth++;
    }
    counters->extends++;
    placed(arena, slot, result);
}

/* --- allocate --- */

static uint32_t quantiles_rule(const float quantiles[ODMA_QUANTILES]) {
    for (uint32_t i = 0; i < ODMA_QUANTILES; i++)
        if (!isfinite(quantiles[i]) || !(quantiles[i] >= (i == 0 ? 0 : quantiles[i - 1])))
            return ODMA_RULE_QUANTILES;
    return ODMA_RULE_NONE;
}

static uint32_t allocate_rule(const odma_arena *arena, const odma_op *op, uint32_t max_total) {
    uint64_t capacity = (uint64_t)arena->geometry.blocks * arena->geometry.block_tokens;
    if (op->request_id[0] == 0) return ODMA_RULE_REQUEST_ID;
    if (max_total < 1 || max_total > capacity) return ODMA_RULE_MAX_TOTAL_TOKENS;
    if (op->prompt_tokens < 1 || (uint64_t)op->prompt_tokens + op->generated_tokens > max_total)
        return ODMA_RULE_PROMPT_TOKENS;
    if (!(op->overflow_risk < 0) && !(op->overflow_risk <= 1)) return ODMA_RULE_OVERFLOW_RISK;
    uint32_t rule = op->quantiles[0] < 0 ? ODMA_RULE_NONE : quantiles_rule(op->quantiles);
    return rule == ODMA_RULE_NONE ? quantiles_rule(op->raw) : rule;
}

static bool is_predicted(const odma_op *op) {
    return op->quantiles[0] >= 0 || op->raw[ODMA_QUANTILES - 1] > 0; /* they ascend */
}

/* Births and allocates are counted together: the one tells the other. */
static void write_request(odma_arena *arena, uint32_t slot, const odma_op *op, uint32_t max_total,
                          uint64_t tenant) {
    bool predicted = is_predicted(op);
    arena->books->counters.allocates++;
    arena->cells[slot].request = (struct request){
        .birth = ++arena->books->births,
        .tenant = tenant,
        .prompt_tokens = op->prompt_tokens,
        .generated_tokens = op->generated_tokens,
        .max_total_tokens = max_total,
        .class_index = (uint16_t)class_for(arena, op->request_class),
        .predicted = predicted};
    mark_granule(arena, granule_of_slot(slot) + 1);
    put(arena, arena->request_ids[slot], op->request_id, ODMA_ID_BYTES);
    if (!predicted) return;
    struct prediction *prediction = &arena->predictions[slot];
    memcpy(prediction->quantiles, op->quantiles, sizeof prediction->quantiles);
    memcpy(prediction->raw, op->raw, sizeof prediction->raw);
    mark(arena, prediction, sizeof *prediction);
}

static void begin_region(odma_arena *arena, uint32_t slot, float risk, uint32_t hash) {
    struct slot *region = &arena->cells[slot].slot;
    bool batch = arena->batch_seq != UINT64_MAX;
    *region = (struct slot){.state = ODMA_REGION_LIVE,
                            .generation = region->generation + 1,
                            .overflow_risk = risk,
                            .seq = batch ? arena->batch_seq : 0};
    set_place(arena, slot);
    arena->runs[slot].note = (struct note){.tick = arena->tick};
    add_id(arena, slot, hash);
    arena->live++;
    credit_region(arena, slot);
}

/* Why an allocate has to wait before anybody looks for a place, or none. */
static uint32_t admission(const odma_arena *arena, uint32_t length, const struct standing *tenant,
                          bool unsure) {
    if (arena->live == arena->geometry.max_regions || arena->spare_slot_count == 0)
        return ODMA_REASON_TABLE_FULL;
    if (tenant->maximum < arena->geometry.blocks &&
        (uint64_t)tenant->held + length > tenant->maximum)
        return ODMA_REASON_QUOTA;
    if (!is_covered(tenant, length) && !may_borrow(arena, tenant)) return ODMA_REASON_CLAIMED;
    if (arena->live > 0 && !unsure && arena->free_blocks >= length &&
        arena->free_blocks - length < arena->safety_blocks)
        return ODMA_REASON_SAFETY_SHARE;
    return ODMA_REASON_NONE;
}

/* An allocate was refused that its tenant's guarantee covers: it has a claim,
 * and unless room is on its way somebody who borrows should make way. */
static void press_claim(odma_arena *arena, uint32_t request, uint32_t length,
                        const struct standing *tenant, odma_result *result) {
    set_claim(arena, tenant, request, length);
    uint64_t coming = (uint64_t)arena->free_blocks + arena->waiting_blocks;
    bool short_of = coming < (uint64_t)length + arena->safety_blocks;
    if (result->reason == ODMA_REASON_FRAGMENTED ||
        (result->reason == ODMA_REASON_TABLE_FULL && arena->waiting == 0) ||
        (short_of && (result->reason == ODMA_REASON_NO_SPACE ||
                      result->reason == ODMA_REASON_SAFETY_SHARE)))
        result->preempt_handle = borrower(arena, tenant);
}

static void do_allocate(odma_arena *arena, const odma_op *op, uint32_t hash, bool skip,
                        odma_result *result) {
    uint64_t capacity = (uint64_t)arena->geometry.blocks * arena->geometry.block_tokens;
    uint32_t max_total = op->max_total_tokens;
    if (max_total == ODMA_UNSET)
        max_total = (uint32_t)(arena->geometry.model_length_tokens < capacity
                                   ? arena->geometry.model_length_tokens
                                   : capacity);
    uint32_t rule = allocate_rule(arena, op, max_total);
    uint32_t alive = rule == ODMA_RULE_NONE ? find_id(arena, op->request_id, hash) : NONE;
    if (alive != NONE) {
        const struct request *request = &arena->cells[alive].request;
        if (request->prompt_tokens == op->prompt_tokens &&
            request->generated_tokens == op->generated_tokens &&
            request->max_total_tokens == max_total) {
            placed(arena, alive, result);
            return;
        }
        rule = ODMA_RULE_REQUEST_ID_CHANGED;
    }
    if (rule != ODMA_RULE_NONE) {
        invalid(arena, rule, result);
        return;
    }
    uint32_t length = first_blocks(arena, op, max_total);
    uint64_t name = tenant_hash(op->tenant);
    struct standing tenant = standing_of(arena, name);
    bool covered = tenant.index != NONE && is_covered(&tenant, length);
    if (skip && !(covered && (arena->held_up >> tenant.index & 1) == 0)) {
        refused(arena, ODMA_REASON_SKIPPED, ODMA_RULE_NONE, result);
        hold_up(arena, &tenant);
        return;
    }
    bool unsure = is_unsure(arena, op->quantiles);
    struct plan_refusal refusal = {.reason = admission(arena, length, &tenant, unsure)};
    uint32_t slot = refusal.reason == ODMA_REASON_NONE ? take_slot(arena) : NONE;
    if (slot == NONE || !place_new(arena, slot, length, &refusal)) {
        if (slot != NONE) give_slot(arena, slot);
        make_hole(arena, NONE, length, &refusal);
        refused(arena, refusal.reason, ODMA_RULE_NONE, result);
        result->copy_tokens_needed = refusal.copy_tokens_needed;
        if (covered) press_claim(arena, hash, length, &tenant, result);
        hold_up(arena, &tenant);
        arena->books->counters.refused_allocates++;
        return;
    }
    end_claim(arena, &tenant, hash);
    write_request(arena, slot, op, max_total, name);
    if (arena->live > 0 && arena->free_blocks < arena->safety_blocks)
        arena->books->counters.safety_hits_unsure++;
    begin_region(arena, slot, (float)accepted_risk(arena, op), hash);
    placed(arena, slot, result);
}

/* `hash` is that of an allocate's request id. */
static void do_op(odma_arena *arena, const odma_op *op, uint32_t hash, bool skip,
                  odma_result *result) {
    switch (op->kind) {
        case ODMA_OP_FREE: do_free(arena, op, result); break;
        case ODMA_OP_TRIM: do_trim(arena, op, result); break;
        case ODMA_OP_EXTEND: do_extend(arena, op, result); break;
        default: do_allocate(arena, op, hash, skip, result); break;
    }
}

/* --- batches --- */

struct digest {
    uint64_t low, high;
};

static void feed(struct digest *digest, uint64_t value) {
    digest->low = stir(digest->low, value);
    digest->high = (digest->high + value) * 0xd6e8feb86659fd93ULL;
    digest->high ^= digest->high >> 32;
}

/* Words up to the first that is all padding. Answers how many bytes those are. */
static size_t feed_name(struct digest *digest, const char *name, size_t bytes) {
    size_t i = 0;
    for (; i < bytes; i += 8) {
        uint64_t word;
        memcpy(&word, name + i, 8);
        if (word == 0) break;
        feed(digest, word);
    }
    return i;
}

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

static void feed_allocate(struct digest *digest, const odma_op *op) {
    uint32_t risk;
    memcpy(&risk, &op->overflow_risk, sizeof risk);
    feed(digest, (uint64_t)op->prompt_tokens << 32 | op->generated_tokens);
    feed(digest, (uint64_t)op->max_total_tokens << 32 | op->guess_tokens);
    feed(digest, (uint64_t)risk << 32 | op->has_text);
    feed(digest, op->text_digest[0]);
    feed(digest, op->text_digest[1]);
    uint64_t words = feed_name(digest, op->request_id, sizeof op->request_id);
    words = words << 16 | feed_name(digest, op->request_class, sizeof op->request_class);
    words = words << 16 | feed_name(digest, op->tenant, sizeof op->tenant);
    feed(digest, words);
}

/* Which slots a batch is going to take, as far as can be seen: first those that it
 * has freed itself, then spare ones. */
struct foresight {
    uint32_t spare;  /* slots left, 0: nothing is asked for */
    uint32_t freed;  /* of arena->freed_slots */
    bool frees_at_once;
};

static void foresee_allocate(odma_arena *arena, struct foresight *foresight, uint32_t hash) {
    if (foresight->spare == 0) return;
    __builtin_prefetch(&arena->ids[hash & arena->ids_mask], 1);
    if (foresight->freed > 0) { /* its region was asked for then */
        fetch_id(arena, arena->freed_slots[--foresight->freed]);
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
        arena->freed_slots[foresight->freed++] = (uint32_t)slot;
}

/* Feed an operation's own digest, so that those of several operations are worked
 * out at once. While it is in hand, hash its id, and ask for the memory that it
 * will need. */
static void feed_op(odma_arena *arena, struct digest *digest, const odma_op *op, uint32_t i,
                    struct foresight *foresight) {
    struct digest own = {.low = (uint64_t)op->kind << 32 | op->end, .high = op->kind};
    if (op->kind == ODMA_OP_ALLOCATE) {
        arena->hashes[i] = id_hash(op->request_id);
        foresee_allocate(arena, foresight, arena->hashes[i]);
        feed_allocate(&own, op);
    } else {
        foresee_other(arena, foresight, op);
        feed(&own, op->handle);
        feed(&own, (uint64_t)op->output_tokens << 32 | op->least_tokens);
        feed(&own, op->want_tokens);
    }
    feed(digest, own.low);
    feed(digest, own.high);
}

/* 128 bits of all that the client sent, predictions left out. */
static void fingerprint_of(odma_arena *arena, const odma_batch *batch, uint64_t fingerprint[2]) {
    struct digest digest = {.low = 1, .high = 2};
    feed(&digest, batch->seq);
    feed(&digest, batch->completed_seq);
    feed(&digest, (uint64_t)batch->max_copy_tokens << 32 | (batch->pass_refused != 0));
    feed(&digest, (uint64_t)batch->used_count << 32 | batch->op_count);
    for (uint32_t i = 0; i < batch->used_count; i++) {
        feed(&digest, batch->used[i].handle);
        feed(&digest, (uint64_t)batch->used[i].used_tokens << 32 | (batch->used[i].pinned != 0));
    }
    struct foresight foresight = {
        .spare = arena->live > CACHED_REGIONS ? arena->spare_slot_count : 0,
        .frees_at_once = arena->books->engine.single_ordered_stream != 0};
    for (uint32_t i = 0; i < batch->op_count; i++)
        feed_op(arena, &digest, &batch->ops[i], i, &foresight);
    fingerprint[0] = mix(digest.low);
    fingerprint[1] = mix(digest.high);
}

static odma_status breaks(odma_answer *answer, uint32_t rule, uint32_t index) {
    answer->rule = rule;
    answer->rule_index = index;
    return ODMA_INVALID;
}

/* Look at all of a batch that is not one operation's own affair. */
static odma_status batch_fault(odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    const struct books *books = arena->books;
    if (batch->completed_seq < books->completed_seq || batch->completed_seq > books->seq)
        return breaks(answer, ODMA_RULE_COMPLETED_SEQ, 0);
    for (uint32_t i = 0; i < batch->used_count; i++) {
        uint32_t rule, slot = slot_of(arena, batch->used[i].handle, &rule);
        if (slot == NONE || note_of(arena, slot)->listed)
            return breaks(answer, ODMA_RULE_USED_HANDLE, i);
        note_of(arena, slot)->listed = true;
        if (batch->used[i].used_tokens > arena->runs[slot].length * arena->geometry.block_tokens)
            return breaks(answer, ODMA_RULE_USED_TOKENS, i);
    }
    for (uint32_t i = 0; i < batch->op_count; i++)
        if (batch->ops[i].kind < ODMA_OP_FREE || batch->ops[i].kind > ODMA_OP_ALLOCATE)
            return breaks(answer, ODMA_RULE_KIND, i);
    return ODMA_OK;
}

/* Whether a batch is the next one (ODMA_NOT_FOUND), the last one (ODMA_OK, with
 * its stored answer), or neither. */
static odma_status seek(odma_arena *arena, const odma_batch *batch, const uint64_t fingerprint[2],
                        odma_answer *answer) {
    const struct books *books = arena->books;
    if (books->epoch == 0 || batch->epoch != books->epoch) return ODMA_EPOCH;
    if (batch->seq == books->seq + 1 && batch->seq < MAX_WIRE) return ODMA_NOT_FOUND;
    if (batch->seq == 0 || batch->seq < books->seq) return ODMA_SEQ_OLD;
    if (batch->seq > books->seq) return ODMA_SEQ_GAP;
    return stored_answer(arena, fingerprint, answer);
}

static bool batch_is_readable(const odma_arena *arena, const odma_batch *batch,
                              const odma_answer *answer) {
    return batch != NULL && answer != NULL && answer->results != NULL && answer->copies != NULL &&
           answer->moved != NULL && batch->used_count <= arena->geometry.max_regions &&
           batch->op_count <= arena->geometry.max_ops &&
           (batch->used != NULL || batch->used_count == 0) &&
           (batch->ops != NULL || batch->op_count == 0);
}

/* Forget all notes. */
static void next_tick(odma_arena *arena) {
    if (++arena->tick != 0) return;
    for (uint32_t i = 0; i < arena->layout.table_size; i++)
        arena->runs[i].note = (struct note){0};
    arena->tick = 1;
}

static void begin_batch(odma_arena *arena, uint64_t seq, uint32_t copy_tokens) {
    next_tick(arena);
    arena->safety_blocks = safety_blocks(arena);
    arena->batch_seq = seq;
    arena->copy_tokens_left = copy_tokens;
    arena->copy_count = arena->place_count = arena->moved_count = arena->moves = arena->pins = 0;
    arena->held_up = 0;
    arena->places_changed = false;
}

static void take_used(odma_arena *arena, const odma_batch *batch) {
    for (uint32_t i = 0; i < batch->used_count; i++) {
        uint32_t rule, slot = slot_of(arena, batch->used[i].handle, &rule);
        arena->cells[slot].slot.used_tokens = batch->used[i].used_tokens;
        arena->cells[slot].slot.seq = batch->seq;
        mark_slot(arena, slot);
        note_of(arena, slot)->pinned = batch->used[i].pinned != 0;
        arena->pins += batch->used[i].pinned != 0;
    }
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

static bool stops_allocates(const odma_result *result) {
    return result->outcome == ODMA_REFUSED && result->reason != ODMA_REASON_INVALID &&
           result->reason != ODMA_REASON_NOT_FOUND;
}

/* Make every place final, and list what moved and has no place among them. */
static void finish_places(odma_arena *arena, uint32_t results) {
    if (arena->moved_count == 0 && !arena->places_changed) return;
    for (uint32_t i = 0; i < results; i++) {
        odma_result *result = &arena->results[i];
        if (result->outcome != ODMA_PLACED) continue;
        uint32_t rule, slot = slot_of(arena, result->handle, &rule);
        result->start = slot == NONE ? 0 : arena->runs[slot].start;
        result->length = slot == NONE ? 0 : arena->runs[slot].length;
    }
    for (uint32_t i = 0; i < arena->moved_count; i++) {
        uint32_t slot = arena->moved[i].slot;
        struct note *note = note_of(arena, slot);
        if (arena->cells[slot].slot.state != ODMA_REGION_LIVE || !note->moved || note->placed ||
            arena->moved[i].first_start == arena->runs[slot].start)
            continue;
        note->placed = true;
        arena->places[arena->place_count++] = (odma_place){.handle = handle_of(arena, slot),
                                                           .start = arena->runs[slot].start,
                                                           .length = arena->runs[slot].length};
    }
}

static void run_batch(odma_arena *arena, const odma_batch *batch) {
    struct books *books = arena->books;
    books->seq = batch->seq;
    books->completed_seq = batch->completed_seq;
    books->turns++;
    free_waiting_up_to(arena, batch->completed_seq);
    take_used(arena, batch);
    bool stopped = false, large = arena->live > CACHED_REGIONS;
    for (uint32_t i = 0; i < batch->op_count; i++) {
        const odma_op *op = &batch->ops[i];
        if (large && i + AHEAD < batch->op_count) fetch_around(arena, &batch->ops[i + AHEAD]);
        bool skip = stopped && batch->pass_refused == 0;
        do_op(arena, op, arena->hashes[i], skip, &arena->results[i]);
        stopped |= stops_allocates(&arena->results[i]) && op->kind >= ODMA_OP_EXTEND;
    }
    finish_places(arena, batch->op_count);
    books->counters.batches++;
    mark(arena, books, offsetof(struct books, policy));
}

static void write_answer(const odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    answer->seq = batch->seq;
    answer->replayed = 0;
    answer->policy_version = arena->books->policy.version;
    answer->result_count = batch->op_count;
    answer->copy_count = arena->copy_count;
    answer->moved_count = arena->place_count;
    memcpy(answer->results, arena->results, batch->op_count * sizeof(odma_result));
    memcpy(answer->copies, arena->copies, arena->copy_count * sizeof(odma_copy));
    memcpy(answer->moved, arena->places, arena->place_count * sizeof(odma_place));
}

odma_status odma_arena_replay(odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (!batch_is_readable(arena, batch, answer)) {
        if (answer != NULL) breaks(answer, ODMA_RULE_COUNTS, 0);
        return leave(arena, ODMA_INVALID);
    }
    uint64_t fingerprint[2];
    fingerprint_of(arena, batch, fingerprint);
    return leave(arena, seek(arena, batch, fingerprint, answer));
}

odma_status odma_arena_apply(odma_arena *arena, const odma_batch *batch, odma_answer *answer) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (!batch_is_readable(arena, batch, answer)) {
        if (answer != NULL) breaks(answer, ODMA_RULE_COUNTS, 0);
        return leave(arena, ODMA_INVALID);
    }
    uint64_t fingerprint[2];
    fingerprint_of(arena, batch, fingerprint);
    status = seek(arena, batch, fingerprint, answer);
    if (status != ODMA_NOT_FOUND) return leave(arena, status);
    if (arena->rescale && (status = rescale(arena)) != ODMA_OK) return leave(arena, status);

    const odma_policy *policy = &arena->books->policy;
    uint32_t unset = batch->max_copy_tokens == ODMA_UNSET;
    begin_batch(arena, UINT64_MAX, unset ? policy->max_copy_tokens : batch->max_copy_tokens);
    status = batch_fault(arena, batch, answer);
    if (status != ODMA_OK) return leave(arena, status);
    arena->batch_seq = batch->seq;
    run_batch(arena, batch);
    arena->batch_seq = UINT64_MAX;
    status = commit_batch(arena, batch->seq, fingerprint, batch->op_count);
    if (status == ODMA_OK) write_answer(arena, batch, answer);
    return leave(arena, status);
}

odma_status odma_arena_unary(odma_arena *arena, uint64_t epoch, const odma_op *op,
                             odma_result *result) {
    if (op == NULL || result == NULL || op->kind < ODMA_OP_FREE || op->kind > ODMA_OP_ALLOCATE)
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (arena->books->epoch == 0 || epoch != arena->books->epoch) return leave(arena, ODMA_EPOCH);
    if (arena->rescale && (status = rescale(arena)) != ODMA_OK) return leave(arena, status);
    begin_batch(arena, UINT64_MAX, 0);
    odma_result outcome;
    uint32_t hash = op->kind == ODMA_OP_ALLOCATE ? id_hash(op->request_id) : 0;
    arena->books->turns++;
    do_op(arena, op, hash, false, &outcome);
    mark(arena, arena->books, offsetof(struct books, policy));
    status = commit(arena);
    if (status == ODMA_OK) *result = outcome;
    return leave(arena, status);
}

/* --- epochs --- */

odma_status odma_arena_reconcile(odma_arena *arena, uint64_t epoch, const uint64_t *handles,
                                 uint32_t count, odma_place *kept, uint64_t *freed,
                                 uint32_t *freed_count) {
    if ((handles == NULL && count > 0) || (kept == NULL && count > 0) || freed == NULL ||
        freed_count == NULL)
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    struct books *books = arena->books;
    if (books->epoch == 0 || epoch != books->epoch) return leave(arena, ODMA_EPOCH);
    begin_batch(arena, UINT64_MAX, 0);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t rule, slot = slot_of(arena, handles[i], &rule);
        if (slot != NONE) note_of(arena, slot)->listed = true;
    }
    *freed_count = 0;
    for (uint32_t i = 0; i < arena->layout.table_size; i++) {
        if (arena->cells[i].slot.state != ODMA_REGION_LIVE || note_of(arena, i)->listed) continue;
        freed[(*freed_count)++] = handle_of(arena, i);
        drop_id(arena, i);
        debit_region(arena, i);
        arena->live--;
        set_waiting(arena, i);
        books->counters.frees++;
    }
    books->completed_seq = books->seq;
    free_waiting_up_to(arena, books->seq);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t rule, slot = slot_of(arena, handles[i], &rule);
        kept[i] = (odma_place){.handle = handles[i],
                               .start = slot == NONE ? 0 : arena->runs[slot].start,
                               .length = slot == NONE ? 0 : arena->runs[slot].length};
    }
    mark(arena, books, offsetof(struct books, policy));
    return leave(arena, commit(arena));
}

odma_status odma_arena_open_epoch(odma_arena *arena, uint64_t epoch, const odma_engine *engine,
                                  const char *boot_id, const void *description,
                                  uint32_t description_bytes) {
    if (engine == NULL || engine_fault(engine) != NULL || epoch >= MAX_WIRE ||
        description_bytes > ODMA_DESCRIPTION_BYTES ||
        (description == NULL && description_bytes > 0))
        return ODMA_INVALID;
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    struct books *books = arena->books;
    if (epoch <= books->last_epoch) return leave(arena, ODMA_INVALID);
    forget_books(arena);
    books->epoch = books->last_epoch = epoch;
    books->engine = *engine;
    if (boot_id != NULL) pad_boot_id(books->boot_id, boot_id);
    books->description_bytes = description_bytes;
    if (description_bytes > 0) memcpy(books->description, description, description_bytes);
    mark(arena, books->description, ODMA_DESCRIPTION_BYTES);
    return leave(arena, commit(arena));
}

odma_status odma_arena_end_epoch(odma_arena *arena, uint64_t epoch) {
    odma_status status = enter(arena);
    if (status != ODMA_OK) return status;
    if (arena->books->epoch == 0 || arena->books->epoch != epoch) return leave(arena, ODMA_EPOCH);
    forget_books(arena);
    return leave(arena, commit(arena));
}
