/* torture.c - an engine that is killed: batches back to back on an arena.
 *
 *     torture FILE NANOSECONDS
 *
 * A timer sends it SIGKILL so long after its first batch began. Another process
 * would mostly get to send it when this one does not run. Reads the batches from stdin before it does the first, so that little of its
 * time lies between them:
 *
 *     BATCHES
 *     SEQ COMPLETED_SEQ PASS_REFUSED USED OPS    for each, then its lines
 *     HANDLE USED_TOKENS
 *     free HANDLE END OUTPUT_TOKENS
 *     trim HANDLE TO_TOKENS
 *     extend HANDLE LEAST_TOKENS
 *     allocate REQUEST_ID PROMPT_TOKENS MAX_TOTAL_TOKENS
 *
 * Writes a pair of 64-bit words to stdout for each answer: its seq and digest.
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

static odma_op read_op(void) {
    char kind[16], id[ODMA_ID_BYTES + 1];
    odma_op op = {.overflow_risk = -1, .quantiles = {-1}};
    want(scanf("%15s", kind), 1);
    if (strcmp(kind, "free") == 0) {
        op.kind = ODMA_OP_FREE;
        want(scanf("%" SCNu64 " %" SCNu32 " %" SCNu32, &op.handle, &op.end, &op.output_tokens), 3);
    } else if (strcmp(kind, "extend") == 0 || strcmp(kind, "trim") == 0) {
        op.kind = kind[0] == 'e' ? ODMA_OP_EXTEND : ODMA_OP_TRIM;
        want(scanf("%" SCNu64 " %" SCNu32, &op.handle, &op.least_tokens), 2);
    } else {
        op.kind = ODMA_OP_ALLOCATE;
        want(scanf("%64s %" SCNu32 " %" SCNu32, id, &op.prompt_tokens, &op.max_total_tokens), 3);
        memcpy(op.request_id, id, strlen(id));
    }
    return op;
}

static odma_batch read_batch(uint64_t epoch) {
    odma_batch batch = {.epoch = epoch, .max_copy_tokens = ODMA_UNSET};
    want(scanf("%" SCNu64 " %" SCNu64 " %" SCNu32 " %" SCNu32 " %" SCNu32, &batch.seq,
               &batch.completed_seq, &batch.pass_refused, &batch.used_count, &batch.op_count),
         5);
    odma_used *used = room_for(batch.used_count, sizeof *used);
    odma_op *ops = room_for(batch.op_count, sizeof *ops);
    for (uint32_t i = 0; i < batch.used_count; i++)
        want(scanf("%" SCNu64 " %" SCNu32, &used[i].handle, &used[i].used_tokens), 2);
    for (uint32_t i = 0; i < batch.op_count; i++) ops[i] = read_op();
    batch.used = used;
    batch.ops = ops;
    return batch;
}

/* --- digests: FNV-1a over words, places and reasons in tokens --- */

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
        case ODMA_PLACED: feed_place(digest, result->handle, result->start, result->length); break;
        case ODMA_REFUSED:
            feed(digest, result->reason);
            feed(digest, result->copy_tokens_needed);
            feed(digest, result->preempt_handle);
            break;
        default: feed(digest, result->outcome == ODMA_ALREADY_FREE);
    }
}

static uint64_t digest_of(const odma_answer *answer) {
    uint64_t digest = 0xcbf29ce484222325ULL;
    for (uint32_t i = 0; i < answer->result_count; i++) feed_result(&digest, &answer->results[i]);
    for (uint32_t i = 0; i < answer->copy_count; i++) {
        const odma_copy *copy = &answer->copies[i];
        feed(&digest, copy->handle);
        feed(&digest, copy->from_token);
        feed(&digest, copy->to_token);
        feed(&digest, copy->tokens);
        feed(&digest, copy->overlaps);
    }
    for (uint32_t i = 0; i < answer->moved_count; i++)
        feed_place(&digest, answer->moved[i].handle, answer->moved[i].start,
                   answer->moved[i].length);
    return digest;
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
    odma_arena *arena = NULL;
    odma_report report;
    if (argc != 3 || odma_arena_attach(argv[1], NULL, NULL, &arena, reason) != ODMA_OK)
        fail("attach", reason);
    if (odma_arena_geometry(arena, &geometry) != ODMA_OK ||
        odma_arena_report(arena, &report) != ODMA_OK)
        fail("attach", "the arena cannot be read");
    odma_answer answer = {.results = room_for(geometry.max_ops, sizeof *answer.results),
                          .copies = room_for(geometry.max_copies, sizeof *answer.copies),
                          .moved = room_for(geometry.max_copies, sizeof *answer.moved)};
    uint32_t count;
    want(scanf("%" SCNu32, &count), 1);
    odma_batch *batches = room_for(count, sizeof *batches);
    for (uint32_t i = 0; i < count; i++) batches[i] = read_batch(report.epoch);

    be_killed_in(strtoull(argv[2], NULL, 10));
    for (uint32_t i = 0; i < count; i++) {
        odma_status status = odma_arena_apply(arena, &batches[i], &answer);
        if (status != ODMA_OK) fail("apply", odma_status_name(status));
        tell(answer.seq, digest_of(&answer));
    }
    for (;;) pause();
}
