/* torture.c - an engine that is killed: calls back to back on an arena.
 *
 *     torture FILE NANOSECONDS
 *
 * A timer sends it SIGKILL so long after its first call began. Another process
 * would mostly get to send it when this one does not run. Reads the calls from
 * stdin before it does the first, so that little of its time lies between them:
 *
 *     CALLS, then for each one of
 *     batch SEQ COMPLETED_SEQ PASS_REFUSED USED OPS, then the lines of these
 *     alone, then the line of an operation
 *     reconcile COMPLETED_SEQ COUNT HANDLE...
 *     epoch EPOCH
 *
 *     HANDLE USED_TOKENS SHAREABLE_TOKENS
 *     free HANDLE END OUTPUT_TOKENS KEEP_TOKENS KEYS
 *     trim HANDLE TO_TOKENS
 *     extend HANDLE LEAST_TOKENS
 *     allocate REQUEST_ID PROMPT_TOKENS MAX_TOTAL_TOKENS KEYS
 *
 * KEYS is how many bytes there are, and these as hex digits behind a colon.
 *
 * Writes a pair of 64-bit words to stdout for each answer: the last seq, and a
 * digest.
 * Then it waits for its end.
 */
#define _POSIX_C_SOURCE 200809L
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "odma.h"

static odma_geometry geometry;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "torture: %s: %s\n", what, why);
    exit(1);
}

static void *room_for(size_t count, size_t bytes) {
    void *memory = calloc(count == 0 ? 1 : count, bytes);
    if (memory == NULL) fail("calloc", "out of memory");
    return memory;
}

/* --- batches --- */

static void want(int found, int expected) {
    if (found != expected) fail("stdin", "a line is not as expected");
}

static void read_keys(odma_op *op) {
    want(scanf("%" SCNu32 " :", &op->key_bytes), 1);
    uint8_t *keys = room_for(op->key_bytes, 1);
    for (uint32_t i = 0; i < op->key_bytes; i++) want(scanf("%2" SCNx8, &keys[i]), 1);
    op->keys = keys;
}

static odma_op read_op(void) {
    char kind[16], id[ODMA_ID_BYTES + 1];
    odma_op op = {0};
    want(scanf("%15s", kind), 1);
    if (strcmp(kind, "free") == 0) {
        op.kind = ODMA_OP_FREE;
        want(scanf("%" SCNu64 " %" SCNu32 " %" SCNu32 " %" SCNu32, &op.handle, &op.end,
                   &op.output_tokens, &op.keep_tokens),
             4);
        read_keys(&op);
    } else if (strcmp(kind, "extend") == 0 || strcmp(kind, "trim") == 0) {
        op.kind = kind[0] == 'e' ? ODMA_OP_EXTEND : ODMA_OP_TRIM;
        want(scanf("%" SCNu64 " %" SCNu32, &op.handle, &op.least_tokens), 2);
    } else {
        op.kind = ODMA_OP_ALLOCATE;
        want(scanf("%64s %" SCNu32 " %" SCNu32, id, &op.prompt_tokens, &op.max_total_tokens), 3);
        memcpy(op.request_id, id, strlen(id));
        read_keys(&op);
    }
    return op;
}

static void read_batch(odma_batch *batch) {
    *batch = (odma_batch){0};
    want(scanf("%" SCNu64 " %" SCNu64 " %" SCNu32 " %" SCNu32 " %" SCNu32, &batch->seq,
               &batch->completed_seq, &batch->pass_refused, &batch->used_count, &batch->op_count),
         5);
    odma_used *used = room_for(batch->used_count, sizeof *used);
    odma_op *ops = room_for(batch->op_count, sizeof *ops);
    for (uint32_t i = 0; i < batch->used_count; i++)
        want(scanf("%" SCNu64 " %" SCNu32 " %" SCNu32, &used[i].handle, &used[i].used_tokens,
                   &used[i].shareable_tokens),
             3);
    for (uint32_t i = 0; i < batch->op_count; i++) ops[i] = read_op();
    batch->used = used;
    batch->ops = ops;
}

struct call {
    enum { BATCH, ALONE, RECONCILE, EPOCH } kind;
    odma_batch batch;
    odma_op op;
    uint64_t *handles;
    uint32_t count;
    uint64_t completed_seq;
    uint64_t epoch;
};

static struct call read_call(void) {
    char kind[16];
    struct call call = {.kind = BATCH};
    want(scanf("%15s", kind), 1);
    if (strcmp(kind, "alone") == 0) {
        call.kind = ALONE;
        call.op = read_op();
    } else if (strcmp(kind, "reconcile") == 0) {
        call.kind = RECONCILE;
        want(scanf("%" SCNu64 " %" SCNu32, &call.completed_seq, &call.count), 2);
        call.handles = room_for(call.count, sizeof *call.handles);
        for (uint32_t i = 0; i < call.count; i++)
            want(scanf("%" SCNu64, &call.handles[i]), 1);
    } else if (strcmp(kind, "epoch") == 0) {
        call.kind = EPOCH;
        want(scanf("%" SCNu64, &call.epoch), 1);
    } else {
        read_batch(&call.batch);
    }
    return call;
}

/* --- digests: FNV-1a over words, places and reasons in tokens --- */

static const uint64_t FIRST_DIGEST = 0xcbf29ce484222325ULL;

static void feed(uint64_t *digest, uint64_t word) {
    *digest = (*digest ^ word) * 0x100000001b3ULL;
}

static void feed_place(uint64_t *digest, uint64_t handle, uint32_t start, uint32_t length) {
    feed(digest, handle);
    feed(digest, (uint64_t)start * geometry.block_tokens);
    feed(digest, (uint64_t)length * geometry.block_tokens);
}

static void feed_result(uint64_t *digest, const odma_result *result) {
    switch (result->outcome) {
        case ODMA_PLACED:
            feed_place(digest, result->handle, result->start, result->length);
            feed(digest, result->reused_tokens);
            break;
        case ODMA_REFUSED:
            feed(digest, result->reason);
            feed(digest, result->copy_tokens_needed);
            feed(digest, result->preempt_handle);
            break;
        default: feed(digest, result->outcome == ODMA_ALREADY_FREE);
    }
}

static uint64_t digest_of(const odma_answer *answer) {
    uint64_t digest = FIRST_DIGEST;
    for (uint32_t i = 0; i < answer->result_count; i++) feed_result(&digest, &answer->results[i]);
    for (uint32_t i = 0; i < answer->copy_count; i++) {
        const odma_copy *copy = &answer->copies[i];
        feed(&digest, copy->handle);
        feed(&digest, copy->from_token);
        feed(&digest, copy->to_token);
        feed(&digest, copy->tokens);
        feed(&digest, copy->overlaps);
    }
    for (uint32_t i = 0; i < answer->moved_count; i++) {
        feed_place(&digest, answer->moved[i].handle, answer->moved[i].start,
                   answer->moved[i].length);
        feed(&digest, answer->moved_reused[i].reused_tokens);
    }
    return digest;
}

/* --- calls --- */

struct engine {
    odma_arena *arena;
    odma_engine record;
    uint64_t epoch, seq;
    odma_answer answer;
    odma_place *kept;
    uint64_t *freed;
};

static void must(odma_status status, const char *what) {
    if (status != ODMA_OK) fail(what, odma_status_name(status));
}

/* Do a call; answer the digest of what came back. */
static uint64_t digest_of_call(struct engine *engine, struct call *call) {
    uint64_t digest = FIRST_DIGEST;
    uint32_t freed = 0;
    odma_result result;
    switch (call->kind) {
        case BATCH:
            call->batch.epoch = engine->epoch;
            must(odma_arena_apply(engine->arena, &call->batch, &engine->answer), "apply");
            engine->seq = engine->answer.seq;
            return digest_of(&engine->answer);
        case ALONE:
            must(odma_arena_unary(engine->arena, (odma_caller){.epoch = engine->epoch}, &call->op,
                                  &result),
                 "unary");
            feed_result(&digest, &result);
            return digest;
        case RECONCILE:
            must(odma_arena_reconcile(engine->arena, (odma_caller){.epoch = engine->epoch},
                                      call->completed_seq, call->handles, call->count,
                                      engine->kept, engine->freed, &freed),
                 "reconcile");
            for (uint32_t i = 0; i < call->count; i++)
                feed_place(&digest, engine->kept[i].handle, engine->kept[i].start,
                           engine->kept[i].length);
            for (uint32_t i = 0; i < freed; i++) feed(&digest, engine->freed[i]);
            return digest;
        default:
            must(odma_arena_open_epoch(engine->arena, call->epoch, &engine->record, "torture", "",
                                       0),
                 "open epoch");
            engine->epoch = call->epoch;
            engine->seq = 0;
            feed(&digest, call->epoch);
            return digest;
    }
}

/* One write of so few bytes to a pipe happens wholly or not at all. */
static void tell(uint64_t seq, uint64_t digest) {
    const uint64_t words[2] = {seq, digest};
    if (write(STDOUT_FILENO, words, sizeof words) != (ssize_t)sizeof words)
        fail("stdout", "cannot write");
}

static void be_killed_in(uint64_t nanoseconds) {
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
    struct itimerspec moment = {.it_value = {.tv_sec = (time_t)(nanoseconds / 1000000000),
                                             .tv_nsec = (long)(nanoseconds % 1000000000)}};
    timer_t timer;
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0 ||
        timer_settime(timer, 0, &moment, NULL) != 0)
        fail("timer", "cannot set it");
}

int main(int argc, char **argv) {
    char reason[ODMA_REASON_BYTES] = "give the name of a file and a time";
    struct engine engine = {0};
    odma_report report;
    if (argc != 3 || odma_arena_attach(argv[1], NULL, NULL, &engine.arena, reason) != ODMA_OK)
        fail("attach", reason);
    must(odma_arena_geometry(engine.arena, &geometry), "geometry");
    must(odma_arena_report(engine.arena, &report), "report");
    must(odma_arena_engine(engine.arena, &engine.record), "engine");
    engine.epoch = report.epoch;
    engine.seq = report.seq;
    uint32_t most_moved = geometry.max_copies + geometry.max_regions;
    engine.answer = (odma_answer){.results = room_for(geometry.max_ops, sizeof(odma_result)),
                                  .copies = room_for(geometry.max_copies, sizeof(odma_copy)),
                                  .moved = room_for(most_moved, sizeof(odma_place)),
                                  .moved_reused = room_for(most_moved, sizeof(odma_reused))};
    engine.kept = room_for(geometry.max_regions, sizeof *engine.kept);
    engine.freed = room_for(geometry.max_regions, sizeof *engine.freed);
    uint32_t count;
    want(scanf("%" SCNu32, &count), 1);
    struct call *calls = room_for(count, sizeof *calls);
    for (uint32_t i = 0; i < count; i++) calls[i] = read_call();

    be_killed_in(strtoull(argv[2], NULL, 10));
    for (uint32_t i = 0; i < count; i++) {
        uint64_t digest = digest_of_call(&engine, &calls[i]);
        tell(engine.seq, digest);
    }
    for (;;) pause();
}
