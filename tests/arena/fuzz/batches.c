/* batches.c - any bytes are an engine: its geometry, then what it asks.
 *
 * After every call the books must keep every rule; now and then the arena is
 * attached again, and the last batch must get its stored answer. Handles are
 * mostly taken from earlier answers, so that batches get deep.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fuzz.h"
#include "odma.h"

enum { REGIONS = 12, OPS = 6, COPIES = 24, HANDLES = 32, KEYS = 8 };

struct input {
    const uint8_t *at;
    size_t left;
};

static uint32_t take(struct input *input, uint32_t limit) {
    uint32_t value = 0;
    for (uint32_t span = limit - 1; span > 0 && input->left > 0; span /= 256) {
        value = value * 256 + *input->at++;
        input->left--;
    }
    return value % limit;
}

static char path[64];
static char reason[ODMA_REASON_BYTES];

static void insist(bool fact, const char *what) {
    if (fact) return;
    fprintf(stderr, "%s: %s\n", what, reason);
    abort();
}

struct engine {
    odma_arena *arena;
    odma_geometry geometry;
    uint64_t handles[HANDLES];
    uint32_t handle_count;
    uint64_t epoch, seq;
    odma_used used[REGIONS];
    odma_op ops[OPS];
    odma_result results[OPS];
    odma_copy copies[COPIES];
    odma_place moved[COPIES + REGIONS];
    odma_reused reused[COPIES + REGIONS];
    uint8_t keys[OPS][KEYS * ODMA_KEY_BYTES];
};

static uint64_t any_handle(struct engine *engine, struct input *input) {
    uint32_t choice = take(input, HANDLES + 2);
    if (choice == HANDLES) return (uint64_t)take(input, 64) << 20 | take(input, 64);
    if (choice > HANDLES || engine->handle_count == 0) return take(input, 256);
    return engine->handles[choice % engine->handle_count];
}

static odma_op any_op(struct engine *engine, struct input *input) {
    odma_op op = {.kind = take(input, 16) == 0 ? take(input, 8) : 1 + take(input, 4)};
    op.overflow_risk = take(input, 4) == 0 ? take(input, 200) / 128.0 : 0;
    op.handle = any_handle(engine, input);
    op.end = take(input, 6);
    op.output_tokens = take(input, 512);
    op.least_tokens = take(input, 1024);
    op.want_tokens = take(input, 3) == 0 ? take(input, 1024) : 0;
    op.prompt_tokens = take(input, 256);
    op.generated_tokens = take(input, 4) == 0 ? take(input, 64) : 0;
    op.max_total_tokens = take(input, 8) == 0 ? 0 : take(input, 2048);
    op.request_id[0] = (char)take(input, 20);
    op.request_class[0] = (char)take(input, 70);
    op.tenant[0] = (char)take(input, 3);
    if (take(input, 3) == 0)
        for (int i = 0; i < ODMA_QUANTILES; i++)
            op.quantiles[i] = (i == 0 ? 0 : op.quantiles[i - 1]) + (float)take(input, 64);
    op.given = take(input, 32);
    return op;
}

/* Keys of one of few talks, each of which names the ones before it; or any bytes. */
static void any_keys(struct engine *engine, struct input *input, odma_op *op, uint32_t at) {
    uint8_t talk = (uint8_t)take(input, 3), *keys = engine->keys[at];
    op->key_bytes = take(input, KEYS + 1) * ODMA_KEY_BYTES;
    if (take(input, 16) == 0 && op->key_bytes > 0) op->key_bytes--;
    uint32_t fork = take(input, KEYS), first = op->kind == ODMA_OP_FREE ? take(input, KEYS) : 0;
    for (uint32_t i = 0; i < op->key_bytes; i++) {
        uint32_t granule = i / ODMA_KEY_BYTES + first;
        keys[i] = (uint8_t)(granule < fork ? granule : granule + 16 * talk);
    }
    op->keys = keys;
    op->keep_tokens = take(input, 2) * take(input, 600);
    op->prompt_tokens += take(input, 5) * 64;
}

static void any_policy(struct engine *engine, struct input *input) {
    odma_policy policy = {.name = "fuzz",
                          .start = 1 + take(input, 3),
                          .overflow = 1 + take(input, 3),
                          .step_tokens = 1 + take(input, 128),
                          .max_copy_tokens = take(input, 4096),
                          .limit_count = take(input, 6),
                          .overflow_risk = take(input, 130) / 128.0,
                          .safety_share = take(input, 64) / 128.0,
                          .unsure_ratio = take(input, 6),
                          .growth = 1 + take(input, 4),
                          .tenant_share = 1 - take(input, 9) / 8.0};
    for (uint32_t i = 0; i < ODMA_LIMITS; i++)
        policy.limits_tokens[i] = (i == 0 ? 0 : policy.limits_tokens[i - 1]) + take(input, 300);
    policy.tenant_count = take(input, 2);
    for (uint32_t i = 0; i < policy.tenant_count; i++) {
        policy.tenants[i].name[0] = (char)(1 + i);
        policy.tenants[i].guaranteed_share = take(input, 65) / 128.0;
        policy.tenants[i].maximum_share = take(input, 129) / 128.0;
    }
    odma_arena_set_policy(engine->arena, NULL, &policy, take(input, 8) == 0 ? take(input, 4) : 0);
}

static void reattach(struct engine *engine, bool same_boot) {
    odma_arena_close(engine->arena);
    odma_status status = odma_arena_attach(path, &engine->geometry, same_boot ? "boot" : "other",
                                           &engine->arena, reason);
    insist(status == ODMA_OK, "attach");
}

static bool keeps(const struct engine *engine) { return engine->geometry.granule_tokens > 0; }

static void any_batch(struct engine *engine, struct input *input) {
    odma_batch batch = {.epoch = engine->epoch,
                        .seq = engine->seq + (take(input, 24) != 0),
                        .completed_seq = engine->seq - take(input, 3),
                        .max_copy_tokens = take(input, 4) == 0 ? take(input, 512) : 0,
                        .given = take(input, 2) * ODMA_GIVEN_MAX_COPY,
                        .pass_refused = take(input, 2),
                        .used_count = take(input, REGIONS + 1),
                        .op_count = take(input, OPS + 1),
                        .used = engine->used,
                        .ops = engine->ops};
    for (uint32_t i = 0; i < batch.used_count; i++)
        engine->used[i] = (odma_used){.handle = any_handle(engine, input),
                                      .used_tokens = take(input, 512),
                                      .pinned = take(input, 8) == 0,
                                      .shareable_tokens = keeps(engine) ? take(input, 512) : 0};
    for (uint32_t i = 0; i < batch.op_count; i++) {
        engine->ops[i] = any_op(engine, input);
        if (keeps(engine)) any_keys(engine, input, &engine->ops[i], i);
    }
    for (uint32_t i = 0; i < batch.used_count; i++)
        if (engine->used[i].shareable_tokens > engine->used[i].used_tokens)
            engine->used[i].shareable_tokens = engine->used[i].used_tokens;
    odma_answer answer = {.results = engine->results,
                          .copies = engine->copies,
                          .moved = engine->moved,
                          .moved_reused = engine->reused};
    if (odma_arena_apply(engine->arena, &batch, &answer) != ODMA_OK) return;
    engine->seq = answer.seq;
    for (uint32_t i = 0; i < answer.result_count; i++)
        if (engine->results[i].outcome == ODMA_PLACED)
            engine->handles[engine->handle_count++ % HANDLES] = engine->results[i].handle;
    if (engine->handle_count > HANDLES) engine->handle_count = HANDLES;
    if (answer.replayed || take(input, 4) != 0) return;

    odma_result first[OPS];
    memcpy(first, engine->results, sizeof first);
    if (take(input, 2) == 0) reattach(engine, true);
    insist(odma_arena_apply(engine->arena, &batch, &answer) == ODMA_OK && answer.replayed &&
               memcmp(first, engine->results, batch.op_count * sizeof *first) == 0,
           "the stored answer");
}

static void open_epoch(struct engine *engine, struct input *input) {
    odma_engine kind = {.moves = 1 + take(input, 3),
                        .single_ordered_stream = take(input, 2),
                        .copies_may_overlap = take(input, 2),
                        .planes = 1 + take(input, 4),
                        .descriptor_seconds = take(input, 3) * 1e-4,
                        .token_seconds = 1e-6};
    uint64_t epoch = engine->epoch + 1 + take(input, 2);
    if (odma_arena_open_epoch(engine->arena, epoch, &kind, "boot", "fuzz", 4) != ODMA_OK) return;
    engine->epoch = epoch;
    engine->seq = 0;
    engine->handle_count = 0;
}

static odma_caller caller_of(const struct engine *engine) {
    return (odma_caller){.epoch = engine->epoch};
}

static void one_call(struct engine *engine, struct input *input) {
    uint32_t choice = take(input, 32);
    odma_result result;
    odma_op op;
    uint64_t listed[4], freed[REGIONS];
    odma_place kept[4];
    uint32_t count = 0;
    switch (choice) {
        case 0: open_epoch(engine, input); break;
        case 1: odma_arena_end_epoch(engine->arena, caller_of(engine)); break;
        case 2: any_policy(engine, input); break;
        case 3: reattach(engine, take(input, 8) != 0); break;
        case 4:
            for (int i = 0; i < 4; i++) listed[i] = any_handle(engine, input);
            odma_arena_reconcile(engine->arena, caller_of(engine),
                                 keeps(engine) ? engine->seq - take(input, 2) : 0, listed,
                                 take(input, 5),
                                 kept, freed, &count);
            break;
        case 5:
        case 6:
            op = any_op(engine, input);
            if (keeps(engine)) any_keys(engine, input, &op, 0);
            if (odma_arena_unary(engine->arena, caller_of(engine), &op, &result) ==
                    ODMA_OK &&
                result.outcome == ODMA_PLACED)
                engine->handles[0] = result.handle;
            break;
        default: any_batch(engine, input);
    }
    insist(odma_arena_check(engine->arena, reason) == ODMA_OK, "check");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input input = {.at = data, .left = size};
    static struct engine engine;
    memset(&engine, 0, sizeof engine);
    engine.geometry = (odma_geometry){.blocks = 8 + take(&input, 64),
                                      .block_tokens = 1U << take(&input, 5),
                                      .max_regions = REGIONS,
                                      .max_ops = OPS,
                                      .max_copies = COPIES,
                                      .model_length_tokens = 1 + take(&input, 1024),
                                      .digest = 1};
    if (engine.geometry.blocks >= 64) { /* so that inputs of pools that keep nothing stay so */
        engine.geometry.blocks += 64 * (1 + take(&input, 3));
        engine.geometry.granule_tokens = 64;
    }
    snprintf(path, sizeof path, "/dev/shm/odma-fuzz-%d", (int)getpid());
    unlink(path);
    insist(odma_arena_create(path, &engine.geometry, &engine.arena, reason) == ODMA_OK, "create");
    open_epoch(&engine, &input);
    any_policy(&engine, &input);
    while (input.left > 0) one_call(&engine, &input);
    odma_arena_close(engine.arena);
    unlink(path);
    return 0;
}
