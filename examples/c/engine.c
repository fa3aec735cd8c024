/* engine.c - an engine with an embedded pool: no service, the same books.
 *
 * Build   cc -std=c11 -Icsrc examples/c/engine.c csrc/[a-z]*.c -lm -o engine
 *         or with -lodma instead of the sources.
 * Run     ./engine FILE, where FILE does not exist yet: it will hold the books.
 *
 * The device is an array of token ids. Copies are memmove on it, in the order
 * given. Before each step every token must lie where the books say.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "odma.h"

enum { BLOCKS = 64, BLOCK = 16, MAX_TOTAL = 512, BATCH = 8, MAX_COPIES = 64, STEPS = 4000 };

typedef struct request {
    uint64_t handle;                         /* 0: not admitted */
    uint32_t id, start, length, total, goal; /* tokens */
} request;

static uint32_t memory[BLOCKS * BLOCK];

static void must(odma_status status, const char *what) {
    if (status == ODMA_OK) return;
    fprintf(stderr, "%s: %s\n", what, odma_status_name(status));
    exit(1);
}

static uint32_t token(const request *r, uint32_t i) { return r->id << 16 | i; }

/* Ask for memory, for more of it (no change where there is room), or give it back. */
static odma_op want(const request *r) {
    odma_op op = {.handle = r->handle, .max_total_tokens = MAX_TOTAL, .overflow_risk = -1.0f};
    op.kind = !r->handle ? ODMA_OP_ALLOCATE : r->total < r->goal ? ODMA_OP_EXTEND : ODMA_OP_FREE;
    op.prompt_tokens = r->total;
    op.least_tokens = r->total + 1;
    op.end = ODMA_END_FINISHED;
    op.quantiles[0] = -1.0f;
    snprintf(op.request_id, sizeof op.request_id, "request-%u", r->id);
    return op;
}

int main(int argc, char **argv) {
    request batch[BATCH] = {0};
    uint32_t refused = 0, copied = 0, finished = 0;
    odma_result results[BATCH];
    odma_copy copies[MAX_COPIES];
    odma_place moved[MAX_COPIES];
    odma_answer answer = {.results = results, .copies = copies, .moved = moved};
    odma_geometry geometry = {BLOCKS, BLOCK, BATCH, BATCH, MAX_COPIES, MAX_TOTAL, 0};
    odma_engine engine = {ODMA_MOVES_ANY, 1, 1, 56, 1e-6, 57344 / 307.2e9};
    odma_policy elastic = {.name = "elastic", .start = ODMA_START_STEP, .step_tokens = 64,
                           .overflow = ODMA_OVERFLOW_COMPACT, .max_copy_tokens = BLOCKS * BLOCK,
                           .safety_share = 0.05, .growth = 1, .tenant_share = 1};
    char reason[ODMA_REASON_BYTES] = "give the name of a new file";
    odma_arena *arena = NULL;
    must(argc == 2 ? odma_arena_create(argv[1], &geometry, &arena, reason) : ODMA_INVALID, reason);
    must(odma_arena_open_epoch(arena, 1, &engine, "", "", 0), "open epoch");
    must(odma_arena_set_policy(arena, &elastic, 0), "set policy");
    for (uint32_t i = 0; i < BATCH; i++)
        batch[i] = (request){.id = i, .total = 32, .goal = 64 + 48 * i};

    for (uint64_t seq = 1; seq <= STEPS; seq++) {
        odma_used used[BATCH];
        odma_op ops[BATCH];
        odma_batch step = {1, seq, seq - 1, ODMA_UNSET, 0, 0, BATCH, used, ops};
        for (uint32_t i = 0; i < BATCH; i++) {
            ops[i] = want(&batch[i]);
            if (batch[i].handle)
                used[step.used_count++] = (odma_used){batch[i].handle, batch[i].total, 0};
        }
        must(odma_arena_apply(arena, &step, &answer), "apply");

        for (uint32_t i = 0; i < answer.copy_count; i++, copied++)
            memmove(memory + copies[i].to_token, memory + copies[i].from_token,
                    copies[i].tokens * sizeof *memory);
        for (uint32_t i = 0; i < BATCH * answer.moved_count; i++)
            if (batch[i % BATCH].handle == moved[i / BATCH].handle)
                batch[i % BATCH].start = moved[i / BATCH].start * BLOCK;

        for (uint32_t i = 0; i < BATCH; i++) {
            request *r = &batch[i];
            const odma_result *result = &results[i];
            if (result->outcome == ODMA_PLACED) {
                r->start = result->start * BLOCK, r->length = result->length * BLOCK;
                for (uint32_t t = 0; !r->handle && t < r->total; t++) /* prefill */
                    memory[r->start + t] = token(r, t);
                r->handle = result->handle;
            } else if (result->outcome == ODMA_REFUSED) {
                refused++;       /* a whole engine frees result->preempt_handle instead */
                if (r->handle && r->total == r->length) r->goal = r->total;
            } else {
                finished++;
                *r = (request){.id = r->id + BATCH, .total = 16 + r->id * 7 % 100};
                r->goal = r->total + 1 + r->id * 101 % 380;
            }
        }
        for (uint32_t i = 0; i < BATCH; i++) { /* verify, then decode a token each */
            request *r = &batch[i];
            for (uint32_t t = 0; r->handle && t < r->total; t++)
                if (memory[r->start + t] != token(r, t)) must(ODMA_CORRUPT, "a token");
            if (!r->handle || r->total >= r->goal || r->total == r->length) continue;
            memory[r->start + r->total] = token(r, r->total);
            r->total++;
        }
    }
    must(odma_arena_check(arena, reason), reason);
    odma_arena_close(arena);
    printf("steps %d, finished %u, refused %u, copies %u, violations 0\n", STEPS, finished, refused,
           copied);
}
