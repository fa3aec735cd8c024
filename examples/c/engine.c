/* engine.c - an engine with an embedded pool: no service, the same books.
 *
 * Build   cc -std=c11 -Icsrc examples/c/engine.c csrc/odma.c -lm -o engine
 *         or with -lodma instead of the source.
 * Run     ./engine FILE, where FILE does not exist yet: it will hold the books.
 *
 * The device is an array of token ids; each step every token must lie where the
 * books say. The pool holds BATCH requests of the greatest length, so nobody is
 * refused: the other examples show what an engine does then. Requests are turns of
 * conversations: what the turn before has left is kept, and not computed again.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "odma.h"

enum { BLOCK = 16, LONGEST = 512, BATCH = 8, BLOCKS = BATCH * LONGEST / BLOCK, STEPS = 4000 };
enum { GRANULE = 64, REGIONS = 16 };

typedef struct request {
    uint64_t handle; /* 0: not admitted */
    uint32_t id, talk;
    uint32_t prompt, total, goal, start; /* tokens */
    uint8_t keys[LONGEST / GRANULE][ODMA_KEY_BYTES];
} request;

static uint32_t memory[BLOCKS * BLOCK];

static uint32_t token(const request *r, uint32_t i) { return r->talk << 16 | i; }

/* The turn of a conversation behind `before` tokens, or the first of another one. Here a token
 * follows from its conversation and place, and so does a key; a real engine hashes the tokens,
 * behind a secret. */
static request next_request(uint32_t id, uint32_t talk, uint32_t before) {
    bool goes_on = before > 0 && before < LONGEST / 2;
    request r = {.id = id, .talk = goes_on ? talk : id};
    r.prompt = r.total = (goes_on ? before : 0) + 16 + id * 7 % 100;
    r.goal = r.prompt + 1 + id * 101 % (LONGEST - 20 - r.prompt);
    for (uint32_t i = 0; i < LONGEST / GRANULE; i++)
        memcpy(r.keys[i], (uint32_t[]){r.talk, i}, 2 * sizeof(uint32_t));
    return r;
}

static void must(bool fact, const char *what) {
    if (fact) return;
    fprintf(stderr, "violation or failure: %s\n", what);
    exit(1);
}

/* Ask for memory, for more of it (no change where there is room), or give it back. */
static odma_op want(const request *r) {
    odma_op op = {.kind = ODMA_OP_EXTEND, .handle = r->handle, .least_tokens = r->total + 1,
                  .end = ODMA_END_FINISHED, .output_tokens = r->total - r->prompt,
                  .prompt_tokens = r->prompt, .max_total_tokens = LONGEST};
    uint32_t asked = r->prompt / GRANULE, whole = r->total / GRANULE;
    if (r->handle == 0) {
        op.kind = ODMA_OP_ALLOCATE;
        op.keys = r->keys[0];
        op.key_bytes = asked * ODMA_KEY_BYTES;
    } else if (r->total == r->goal) {
        op.kind = ODMA_OP_FREE;
        op.keep_tokens = r->total;
        op.keys = r->keys[asked]; /* those behind the allocate's */
        op.key_bytes = (whole - asked) * ODMA_KEY_BYTES;
    }
    snprintf(op.request_id, sizeof op.request_id, "request-%u", r->id);
    return op;
}

int main(int argc, char **argv) {
    odma_geometry geometry = {.blocks = BLOCKS, .block_tokens = BLOCK, .max_copies = BLOCKS,
                              .max_regions = REGIONS, .granule_tokens = GRANULE};
    odma_engine engine = {ODMA_MOVES_ANY, 1, 1, 56, 1e-6, 57344 / 307.2e9, 0, 0};
    odma_policy elastic = {.name = "elastic", .start = ODMA_START_STEP, .step_tokens = 64,
                           .overflow = ODMA_OVERFLOW_COMPACT, .max_copy_tokens = BLOCKS * BLOCK};
    char reason[ODMA_REASON_BYTES] = "give the name of a new file";
    odma_arena *arena = NULL;
    must(argc == 2 && !odma_arena_create(argv[1], &geometry, &arena, reason), reason);
    must(!odma_arena_open_epoch(arena, 1, &engine, "", "", 0), "open epoch");
    must(!odma_arena_set_policy(arena, NULL, &elastic, 0), "set policy");

    uint32_t requests = 0, copied = 0, reused = 0;
    request batch[BATCH] = {0};
    odma_result results[BATCH];
    odma_copy copies[BLOCKS];
    odma_place moved[BLOCKS + REGIONS];
    odma_reused moved_reused[BLOCKS + REGIONS];
    odma_answer answer = {.results = results, .copies = copies, .moved = moved,
                          .moved_reused = moved_reused};
    for (uint64_t seq = 1; seq <= STEPS; seq++) {
        odma_used used[BATCH];
        odma_op ops[BATCH];
        odma_batch step = {.epoch = 1, .seq = seq, .completed_seq = seq - 1,
                           .op_count = BATCH, .used = used, .ops = ops};
        for (request *r = batch; r < batch + BATCH; r++) {
            if (r->handle) used[step.used_count++] = (odma_used){r->handle, r->total, 0, 0, 0};
            else *r = next_request(++requests, r->talk, r->total);
            ops[r - batch] = want(r);
        }
        must(!odma_arena_apply(arena, &step, &answer), "apply");

        for (uint32_t k = 0; k < answer.copy_count; k++, copied++)
            memmove(memory + copies[k].to_token, memory + copies[k].from_token,
                    copies[k].tokens * sizeof *memory);
        for (uint32_t k = 0; k < BATCH * answer.moved_count; k++)
            if (batch[k % BATCH].handle == moved[k / BATCH].handle)
                batch[k % BATCH].start = moved[k / BATCH].start * BLOCK;
        for (request *r = batch; r < batch + BATCH; r++) {
            const odma_result *result = &results[r - batch];
            must(result->outcome != ODMA_REFUSED, "refused");
            uint32_t first = r->handle ? r->total : result->reused_tokens; /* new: its prefill */
            if (r->handle == 0) reused += result->reused_tokens;
            r->handle = result->handle; /* 0 if it was freed */
            r->start = result->start * BLOCK;
            if (r->handle == 0) continue;
            for (uint32_t t = first; t < r->total; t++) memory[r->start + t] = token(r, t);
            for (uint32_t t = 0; t < r->total; t++)
                must(memory[r->start + t] == token(r, t), "a token is not where it should be");
            memory[r->start + r->total] = token(r, r->total); /* decode */
            r->total++;
        }
    }
    must(!odma_arena_check(arena, reason), reason);
    odma_arena_close(arena);
    printf("steps %d, requests %u, copies %u, reused %u, violations 0\n", STEPS, requests, copied,
           reused);
}
