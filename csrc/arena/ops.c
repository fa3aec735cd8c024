/* ops.c - one operation.
 *
 * Whatever can fail is looked at before the first change, so there is nothing to
 * take back: an operation is refused whole or done whole.
 */
#include <string.h>

/* --- results --- */

/* A result that says where a region lies. It is looked at again once the batch
 * is done if an earlier result of the batch said it too. */
static inline void placed(odma_arena *arena, uint32_t slot, odma_result *result) {
    note_of(arena, slot)->placed = true;
    *result = (odma_result){.outcome = ODMA_PLACED,
                            .handle = handle_of(arena, slot),
                            .start = arena->runs[slot].start,
                            .length = arena->runs[slot].length,
                            .reused_tokens = reused_of(arena, slot)};
}

/* What earlier results of the batch say of a region is about to be wrong. */
static void will_change(odma_arena *arena, uint32_t slot) {
    arena->step.places_changed |= note_of(arena, slot)->placed;
}

static void refused(odma_arena *arena, uint32_t reason, uint32_t rule, odma_result *result) {
    *result = (odma_result){.outcome = ODMA_REFUSED,
                            .reason = reason,
                            .rule = rule,
                            .free_blocks = room_blocks(arena),
                            .largest_run = largest_room(arena),
                            .waiting_blocks = coming_blocks(arena)};
}

static void invalid(odma_arena *arena, uint32_t rule, odma_result *result) {
    bool unknown = rule == ODMA_RULE_HANDLE_DEAD || rule == ODMA_RULE_HANDLE_UNKNOWN;
    refused(arena, unknown ? ODMA_REASON_NOT_FOUND : ODMA_REASON_INVALID, rule, result);
}

/* --- free, trim, extend --- */

static bool are_whole_keys(const odma_op *op) {
    return op->key_bytes % ODMA_KEY_BYTES == 0 && (op->key_bytes == 0 || op->keys != NULL) &&
           op->key_bytes <= ODMA_MAX_KEYS * ODMA_KEY_BYTES;
}

/* What is wrong with what a free keeps of the region of a slot, or none. */
static uint32_t keep_rule(const odma_arena *arena, uint32_t slot, const odma_op *op) {
    if (op->keep_tokens == 0 && op->key_bytes == 0) return ODMA_RULE_NONE;
    if (arena->granule_blocks == 0) return ODMA_RULE_NO_GRANULES;
    uint32_t used = used_at(arena, slot, arena->step.seq), reused = reused_of(arena, slot);
    if (op->keep_tokens > used && op->keep_tokens > reused) return ODMA_RULE_KEEP_TOKENS;
    uint32_t keys = op->key_bytes / ODMA_KEY_BYTES, granules = granules_in(arena, op->keep_tokens);
    bool fits = keys == 0 || arena->marks[slot].given + keys <= granules;
    return are_whole_keys(op) && fits ? ODMA_RULE_NONE : ODMA_RULE_FREE_KEYS;
}

/* Keep the region of a slot, or what of it there is to keep. */
static bool keeps(odma_arena *arena, uint32_t slot, const odma_op *op) {
    if (op->keep_tokens == 0) return false;
    if (arena->marks[slot].generation == 0) return false; /* its keys are void */
    for (uint32_t i = 0; i < op->key_bytes / ODMA_KEY_BYTES; i++)
        add_key(arena, slot, op->keys + (size_t)i * ODMA_KEY_BYTES);
    return keep(arena, slot, op->keep_tokens);
}

static void do_free(odma_arena *arena, const odma_op *op, odma_result *result) {
    uint32_t rule, slot = slot_of(arena, op->handle, &rule);
    if (slot != NONE) rule = keep_rule(arena, slot, op);
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
    if (!keeps(arena, slot, op)) set_waiting(arena, slot);
    *result = (odma_result){.outcome = ODMA_FREED};
}

static void do_trim(odma_arena *arena, const odma_op *op, odma_result *result) {
    uint32_t rule, slot = slot_of(arena, op->handle, &rule);
    if (slot == NONE) {
        invalid(arena, rule, result);
        return;
    }
    uint32_t blocks = blocks_of(arena, op->least_tokens), length = arena->runs[slot].length;
    if (blocks < 1 || blocks > length || op->least_tokens < used_of(arena, slot) ||
        op->least_tokens < given_of(arena, slot)) {
        if (blocks != length) {
            invalid(arena, ODMA_RULE_TO_TOKENS, result);
            return;
        }
    }
    will_change(arena, slot);
    bool at_once = frees_at_once(arena);
    if (blocks < length && at_once) {
        run_cut(arena, slot, blocks);
    } else if (blocks < length) {
        uint32_t tail = take_slot(arena);
        if (tail == NONE) {
            refused(arena, ODMA_REASON_TABLE_FULL, ODMA_RULE_NONE, result);
            return;
        }
        run_cut_to_slot(arena, slot, blocks, tail);
        set_waiting(arena, tail);
    }
    set_place(arena, slot);
    resize_region(arena, slot, length);
    arena->books->counters.trims++;
    placed(arena, slot, result);
}

/* Name who makes way for a region that cannot grow by `more` blocks: as far as
 * its tenant's guarantee goes those that borrow, else the youngest. */
static void advise_growth(odma_arena *arena, uint32_t slot, uint32_t more, odma_result *result) {
    struct standing tenant = standing_of(arena, arena->cells[slot].request.tenant);
    if (is_covered(&tenant, more)) result->preempt_handle = borrower(arena, &tenant);
    if (result->preempt_handle == 0) result->preempt_handle = youngest(arena, &tenant);
}

static void do_extend(odma_arena *arena, const odma_op *op, odma_result *result) {
    uint32_t rule, slot = slot_of(arena, op->handle, &rule);
    if (slot != NONE) {
        uint32_t most = blocks_of(arena, arena->cells[slot].request.max_total_tokens);
        if (op->least_tokens < 1 || blocks_of(arena, op->least_tokens) > most)
            rule = ODMA_RULE_LEAST_TOKENS;
        else if (op->want_tokens != 0 &&
                 (op->want_tokens < op->least_tokens || op->want_tokens > ODMA_MAX_TOKENS))
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
        bool done = grow_in_place(arena, slot, least, aim) || plan_room(arena, slot, aim, &refusal);
        if (!done && aim > least) {
            refusal = (struct plan_refusal){0};
            done = plan_room(arena, slot, least, &refusal);
        }
        if (!done && clear_for_room(arena, slot, least, &refusal))
            done = grow_in_place(arena, slot, least, aim) ||
                   plan_room(arena, slot, least, &refusal);
        if (!done) {
            plan_way(arena, slot, least, &refusal);
            refused(arena, refusal.reason, ODMA_RULE_NONE, result);
            result->copy_tokens_needed = refusal.copy_tokens_needed;
            bool comes = refusal.reason == ODMA_REASON_WAITS_FOR_COMPLETION &&
                         waiting_gives_room(arena, slot, least - length, least);
            if (!comes) advise_growth(arena, slot, least - length, result);
            hold_up(arena, arena->cells[slot].request.tenant);
            counters->refused_extends++;
            return;
        }
        resize_region(arena, slot, length);
        if (arena->live > 1 && room_blocks(arena) < arena->step.safety_blocks)
            counters->safety_hits_growth++;
    }
    counters->extends++;
    placed(arena, slot, result);
}

/* --- allocate --- */

/* The longest total of a request: as it says, else what the model and the memory hold. */
static uint32_t max_total_of(const odma_arena *arena, const odma_op *op) {
    if (gives_max_total(op)) return op->max_total_tokens;
    uint64_t capacity = (uint64_t)arena->geometry.blocks * arena->geometry.block_tokens;
    uint32_t longest = arena->geometry.model_length_tokens;
    return longest < capacity ? longest : (uint32_t)capacity;
}

static bool has_padded_names(const odma_op *op) {
    return is_padded(op->request_id, sizeof op->request_id) &&
           is_padded_name(op->request_class) && is_padded_name(op->tenant);
}

static uint32_t allocate_rule(const odma_arena *arena, const odma_op *op, uint32_t max_total) {
    uint64_t capacity = (uint64_t)arena->geometry.blocks * arena->geometry.block_tokens;
    if (op->request_id[0] == 0) return ODMA_RULE_REQUEST_ID;
    if (!has_padded_names(op)) return ODMA_RULE_PADDING;
    if (max_total < 1 || max_total > capacity) return ODMA_RULE_MAX_TOTAL_TOKENS;
    if (op->prompt_tokens < 1 || (uint64_t)op->prompt_tokens + op->generated_tokens > max_total)
        return ODMA_RULE_PROMPT_TOKENS;
    if (!within(op->overflow_risk, 0, 1)) return ODMA_RULE_OVERFLOW_RISK;
    if (op->key_bytes > 0 && arena->granule_blocks == 0) return ODMA_RULE_NO_GRANULES;
    if (op->key_bytes > 0 && (!are_whole_keys(op) || op->key_bytes / ODMA_KEY_BYTES >
                              granules_in(arena, op->prompt_tokens + op->generated_tokens)))
        return ODMA_RULE_KEYS;
    bool sound = are_quantiles(op->quantiles) && are_quantiles(op->raw); /* zeros are, too */
    return sound ? ODMA_RULE_NONE : ODMA_RULE_QUANTILES;
}

static bool is_predicted(const odma_op *op) {
    return gives_quantiles(op) || op->raw[ODMA_QUANTILES - 1] > 0; /* they ascend */
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
    mark_grain(arena, grain_of_slot(slot) + 1);
    books_put(arena, arena->request_ids[slot], op->request_id, ODMA_ID_BYTES);
    if (!predicted) return;
    struct prediction *prediction = &arena->predictions[slot];
    *prediction = (struct prediction){.quantiles = {-1}};
    if (gives_quantiles(op))
        memcpy(prediction->quantiles, op->quantiles, sizeof prediction->quantiles);
    memcpy(prediction->raw, op->raw, sizeof prediction->raw);
    books_mark(arena, prediction, sizeof *prediction);
}

static void begin_region(odma_arena *arena, uint32_t slot, float risk, uint32_t hash) {
    struct slot *region = &arena->cells[slot].slot;
    bool batch = arena->step.seq != NO_BATCH;
    if (region->state != ODMA_REGION_LIVE) /* else it was adopted, and may have moved */
        arena->runs[slot].note = (struct note){.tick = arena->step.tick};
    *region = (struct slot){.state = ODMA_REGION_LIVE,
                            .generation = region->generation,
                            .overflow_risk = risk,
                            .seq = batch ? arena->step.seq : 0};
    set_place(arena, slot);
    add_id(arena, slot, hash);
    arena->live++;
    credit_region(arena, slot);
}

/* Blocks that a request's tenant may have with it. A request that has grown beyond its
 * tenant's maximum, and made way, comes back once its tenant holds nothing else. */
static uint32_t most_with(const struct standing *tenant, const odma_op *op, uint32_t least) {
    return op->generated_tokens > 0 && tenant->maximum < least ? least : tenant->maximum;
}

/* Why an allocate has to wait before anybody looks for a place, or none. */
static uint32_t admission(const odma_arena *arena, uint32_t length, const struct standing *tenant,
                          uint32_t most, bool unsure) {
    if (arena->live == arena->geometry.max_regions || arena->spare_slot_count == 0)
        return ODMA_REASON_TABLE_FULL;
    if (most < arena->geometry.blocks && (uint64_t)tenant->held + length > most)
        return ODMA_REASON_QUOTA;
    if (!is_covered(tenant, length) && !may_borrow(arena, tenant)) return ODMA_REASON_CLAIMED;
    uint32_t room = room_blocks(arena);
    if (arena->live > 0 && !unsure && room >= length && room - length < arena->step.safety_blocks)
        return ODMA_REASON_SAFETY_SHARE;
    return ODMA_REASON_NONE;
}

/* An allocate was refused that its tenant's guarantee covers: it has a claim,
 * and unless room is on its way somebody who borrows should make way. */
static void press_claim(odma_arena *arena, uint32_t request, uint32_t length,
                        const struct standing *tenant, odma_result *result) {
    set_claim(arena, tenant, request, length);
    uint64_t coming = (uint64_t)room_blocks(arena) + coming_blocks(arena);
    bool short_of = coming < (uint64_t)length + arena->step.safety_blocks;
    if (result->reason == ODMA_REASON_FRAGMENTED ||
        (result->reason == ODMA_REASON_TABLE_FULL && arena->waiting == 0) ||
        (short_of && (result->reason == ODMA_REASON_NO_SPACE ||
                      result->reason == ODMA_REASON_SAFETY_SHARE)))
        result->preempt_handle = borrower(arena, tenant);
}

static void do_allocate(odma_arena *arena, const odma_op *op, uint32_t hash,
                        odma_result *result) {
    uint32_t max_total = max_total_of(arena, op);
    uint32_t rule = allocate_rule(arena, op, max_total);
    uint32_t alive = find_id(arena, op->request_id, hash);
    if (alive != NONE && arena->cells[alive].request.birth > arena->step.first_birth) {
        rule = ODMA_RULE_REQUEST_ID_TWICE;
    } else if (alive != NONE && rule == ODMA_RULE_NONE) {
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
    uint64_t name = tenant_hash(arena, op->tenant);
    struct standing tenant = standing_of(arena, name);
    uint32_t least = least_blocks(arena, op, max_total), most = most_with(&tenant, op, least);
    if (least > most) {
        bool whole = least == blocks_of(arena, max_total);
        invalid(arena, whole ? ODMA_RULE_TENANT_MAX_TOTAL : ODMA_RULE_TENANT_PROMPT, result);
        result->most_blocks = most;
        return;
    }
    uint32_t length = first_blocks(arena, op, max_total);
    if (length > most) length = most;
    bool covered = tenant.index != NONE && is_covered(&tenant, length);
    if (arena->step.ordered &&
        (is_held_up(arena, name) || (arena->step.stopped && !covered))) {
        refused(arena, ODMA_REASON_SKIPPED, ODMA_RULE_NONE, result);
        hold_up(arena, name);
        return;
    }
    bool unsure = is_unsure(arena, op);
    struct plan_refusal refusal = {.reason = admission(arena, length, &tenant, most, unsure)};
    uint32_t slot = NONE;
    if (refusal.reason == ODMA_REASON_NONE) slot = place_region(arena, op, length, &refusal);
    if (slot == NONE) {
        plan_way_new(arena, length, &refusal);
        refused(arena, refusal.reason, ODMA_RULE_NONE, result);
        result->copy_tokens_needed = refusal.copy_tokens_needed;
        if (covered) press_claim(arena, hash, length, &tenant, result);
        hold_up(arena, name);
        arena->books->counters.refused_allocates++;
        return;
    }
    end_claim(arena, &tenant, hash);
    write_request(arena, slot, op, max_total, name);
    if (arena->live > 0 && room_blocks(arena) < arena->step.safety_blocks)
        arena->books->counters.safety_hits_unsure++;
    begin_region(arena, slot, (float)accepted_risk(arena, op), hash);
    if (arena->granule_blocks > 0) take_keys(arena, slot, op);
    placed(arena, slot, result);
}

/* `hash` is that of an allocate's request id. */
static void do_op(odma_arena *arena, const odma_op *op, uint32_t hash, odma_result *result) {
    switch (op->kind) {
        case ODMA_OP_FREE: do_free(arena, op, result); break;
        case ODMA_OP_TRIM: do_trim(arena, op, result); break;
        case ODMA_OP_EXTEND: do_extend(arena, op, result); break;
        default: do_allocate(arena, op, hash, result); break;
    }
}
