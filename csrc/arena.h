/* arena.h - what the files of the library share. Nothing here is public.
 *
 * The file of a pool
 *
 *     header | record | record | record | books
 *
 * The books are plain memory, divided into granules of 32 bytes. The process
 * works on a copy of them (`books`), marks the granules that it changes, and
 * commits: the new values go into a record, the record's commit word is set,
 * then they are copied into the file's books. A record that was committed can
 * be applied again; one that was not is as if it had never been. Indexes (runs,
 * bins, request ids) live in process memory and are rebuilt from the books.
 *
 *   file.c    the file: create, attach, commit, redo
 *   runs.c    address order and free runs
 *   plan.c    where a region goes, and what has to move for it
 *   policy.c  lengths and admission
 *   shares.c  what tenants hold, may hold and have a claim to
 *   batch.c   operations
 *   learn.c   histograms and completions
 *   report.c  reading and checking
 *   limits.c  optimal bucket limits
 */
#ifndef ODMA_ARENA_H
#define ODMA_ARENA_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "odma.h"

enum {
    GRANULE_BYTES = 32,
    LINE_BYTES = 64,     /* of a cache */
    RECORDS = 3,         /* two batches take turns, the third is for the rest */
    RECORD_OTHER = 2,
    SLOT_BITS = 20,      /* of a handle; the rest is the generation */
    HANDLE_SLOT = (1 << SLOT_BITS) - 1,
    SLOT_FREE = 0,       /* else an odma_region_state */
    STATS = ODMA_CLASSES + 2,
    EXACT_BINS = 1024,   /* free runs shorter than this have a bin for each length */
    SUB_BINS = 64,       /* longer ones: bins per power of two */
    FREE_BINS = EXACT_BINS + 15 * SUB_BINS,
    LEARNT_ENOUGH = 32,
    MOST_OUTPUT_TOKENS = 1 << 24
};

static const uint32_t NONE = UINT32_MAX;
static const double LEVELS[ODMA_QUANTILES] = {0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99};
static const uint64_t MAX_WIRE = (uint64_t)1 << 53;

/* --- the books, as they lie in the file --- */

struct slot {
    uint32_t state;
    uint32_t generation;  /* of the last handle issued for this slot */
    uint32_t start;
    uint32_t length;
    uint32_t used_tokens; /* live: as said in batch `seq`, else it counts as full */
    float overflow_risk;  /* live: accepted for it */
    uint64_t seq;         /* waiting: the completed_seq that frees it */
};

/* What a region is held for. Its id and its prediction are in arrays of their
 * own, for few operations look at them. */
struct request {
    uint64_t birth;       /* order of its allocate in this epoch */
    uint64_t tenant;      /* hash of its name */
    uint32_t prompt_tokens;
    uint32_t generated_tokens;
    uint32_t max_total_tokens;
    uint16_t class_index;
    uint16_t predicted;   /* 1: there is a prediction */
};

struct cell {
    struct slot slot;
    struct request request;
};

struct prediction {
    float quantiles[ODMA_QUANTILES]; /* [0] < 0: none */
    float pad;
    float raw[ODMA_QUANTILES];
    float more_pad;
};

struct stats {
    double increment;     /* weight of the next completion: grows, so old ones decay */
    uint64_t completions;
    uint64_t pad[2];
    double bins[4][ODMA_BINS]; /* output finished, censored; total finished, censored */
    odma_completion ring[ODMA_RING];
};

/* An allocate within a guarantee that found no room. */
struct claim {
    uint64_t turn;        /* when it was last asked for; 0: no claim */
    uint32_t blocks;
    uint32_t request;     /* hash of its id */
};

struct books {
    uint64_t epoch;       /* 0: none is running */
    uint64_t last_epoch;
    uint64_t seq;
    uint64_t completed_seq;
    uint64_t births;
    char boot_id[ODMA_BOOT_BYTES];
    uint32_t class_count;
    uint32_t description_bytes;
    uint64_t turns;       /* batches and unary calls */
    uint64_t pad[3];
    odma_engine engine;
    odma_counters counters;
    odma_policy policy;   /* from here on a batch marks only what it changes */
    struct claim claims[ODMA_TENANTS]; /* of the policy's tenants */
    char class_names[ODMA_CLASSES][ODMA_NAME_BYTES];
    uint8_t description[ODMA_DESCRIPTION_BYTES];
    struct stats stats[STATS];
    /* then table_size cells, as many request ids, as many predictions */
};

_Static_assert(sizeof(struct slot) == GRANULE_BYTES, "a slot is one granule");
_Static_assert(sizeof(struct request) == GRANULE_BYTES, "a request is one granule");
_Static_assert(sizeof(struct prediction) % GRANULE_BYTES == 0, "predictions are whole granules");
_Static_assert(sizeof(struct stats) % GRANULE_BYTES == 0, "stats are whole granules");
_Static_assert(sizeof(struct books) % LINE_BYTES == 0, "cells, ids and predictions are cache lines");

/* --- indexes in process memory --- */

/* What one batch has noted about a slot, valid if tick is the arena's. */
struct note {
    uint32_t tick;
    bool moved, pinned, listed, placed;
};

/* A run of blocks in address order: run i < table_size is slot i, the others
 * are free runs. */
struct run {
    uint32_t start;
    uint32_t length;
    uint32_t prev, next;   /* in address order */
    union {
        uint32_t bin_prev; /* free runs of one bin */
        uint32_t id_hash;  /* of a live slot's request id */
    };
    uint32_t bin_next;     /* free runs of one bin; free ids */
    struct note note;
};

/* A request id's place in the table of ids. */
struct entry {
    uint32_t slot;         /* NONE: nothing */
    uint32_t hash;
};

/* What one tenant holds in live regions. */
struct account {
    uint64_t tenant;       /* hash of its name */
    uint32_t blocks;
    uint32_t regions;
    uint32_t owner;        /* index in the policy, NOT_NAMED; NO_ACCOUNT: nothing */
    uint32_t pad;
};

/* A slot that the batch in hand has moved, and where it was before. */
struct move {
    uint32_t slot;
    uint32_t first_start;
};

struct layout {
    uint64_t record_bytes;
    uint64_t results, copies, moved, indexes, granules; /* offsets in a record */
    uint64_t books_offset;
    uint64_t books_bytes;
    uint64_t file_bytes;
    uint32_t record_granules;    /* room for changed granules */
    uint32_t table_size;
};

struct odma_arena {
    pthread_mutex_t lock;
    odma_geometry geometry;
    struct layout layout;
    int descriptor;
    uint8_t *map;
    volatile uint32_t *fork_mark; /* a page that a forked child sees zeroed */
    uint64_t lsn;                /* of the last commit */
    uint64_t sum;                /* of the file's books */
    bool broken;
    bool rebooted;
    uint32_t recovery;           /* odma_recovery */
    bool rescale;                /* some histogram's weights have grown too large */

    struct books *books;
    struct cell *cells;
    char (*request_ids)[ODMA_ID_BYTES];
    struct prediction *predictions;

    uint32_t *dirty;             /* granules changed since the last commit */
    uint32_t dirty_count;
    uint64_t *dirty_bits;

    struct run *runs;
    uint32_t first_run, last_run;
    uint32_t spare_runs;         /* free ids, chained by bin_next */
    uint32_t bins[FREE_BINS];
    uint64_t bin_bits[(FREE_BINS + 63) / 64];
    uint32_t free_runs, free_blocks;
    uint32_t live, waiting, waiting_blocks;
    uint32_t *spare_slots;       /* a stack */
    uint32_t spare_slot_count;
    uint32_t *waits;             /* waiting slots, oldest seq first: a ring */
    uint32_t waits_first;
    struct entry *ids;           /* of request ids, open addressing */
    uint32_t ids_mask;
    struct account *accounts;    /* by tenant, open addressing, while it `limits` any */
    uint32_t accounts_mask, account_count;
    uint32_t named[ODMA_TENANTS]; /* places of the policy's tenants among them */
    bool limits;                 /* the policy limits tenants */
    uint32_t bin_upper[ODMA_BINS];

    /* the batch in hand */
    uint32_t tick;
    uint32_t safety_blocks;      /* that admission must leave free */
    uint64_t batch_seq;          /* used_tokens said in it hold; UINT64_MAX: none */
    uint32_t *hashes;            /* of its allocates' request ids */
    uint32_t *freed_slots;       /* by it, as far as can be seen: at most max_ops */
    struct move *moved;          /* at most max_copies */
    uint32_t moved_count;
    uint32_t moves;              /* moves so far, copied or not */
    uint32_t pins;
    uint32_t held_up;            /* bit i: an operation of the policy's tenant i was refused */
    bool places_changed;         /* since they were put into results */
    uint32_t copy_tokens_left;
    odma_result *results;
    odma_copy *copies;
    uint32_t copy_count;
    odma_place *places;
    uint32_t place_count;
    struct side *sides;          /* scratch of the planner */
};

/* The finalizer of MurmurHash3: a bijection that spreads every bit. */
static inline uint64_t mix(uint64_t value) {
    value ^= value >> 33;
    value *= 0xff51afd7ed558ccdULL;
    value ^= value >> 33;
    value *= 0xc4ceb9fe1a85ec53ULL;
    return value ^ (value >> 33);
}

/* One step of a quick hash, whose end is to be mixed. */
static inline uint64_t stir(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
    return hash << 29 | hash >> 35;
}

/* --- file.c --- */
/* A granule is about to be committed. */
static inline void mark_granule(odma_arena *arena, uint32_t granule) {
    uint64_t bit = (uint64_t)1 << (granule % 64);
    if (arena->dirty_bits[granule / 64] & bit) return;
    arena->dirty_bits[granule / 64] |= bit;
    arena->dirty[arena->dirty_count++] = granule;
}
void mark(odma_arena *arena, const void *object, size_t bytes);
void put(odma_arena *arena, void *object, const void *from, size_t bytes);
static inline uint32_t granule_of_slot(uint32_t slot) {
    return (uint32_t)((sizeof(struct books) + slot * sizeof(struct cell)) / GRANULE_BYTES);
}
static inline void mark_slot(odma_arena *arena, uint32_t slot) {
    mark_granule(arena, granule_of_slot(slot));
}
odma_status commit(odma_arena *arena);
odma_status commit_batch(odma_arena *arena, uint64_t seq, const uint64_t fingerprint[2],
                         uint32_t results);
odma_status stored_answer(odma_arena *arena, const uint64_t fingerprint[2], odma_answer *answer);
odma_status enter(odma_arena *arena);
odma_status leave(odma_arena *arena, odma_status status);
odma_status refuse(char reason[ODMA_REASON_BYTES], odma_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

void pad_boot_id(char into[ODMA_BOOT_BYTES], const char *boot_id);
uint64_t hash_bytes(const void *bytes, size_t count);

/* --- runs.c --- */
void runs_reset(odma_arena *arena);
const char *runs_rebuild(odma_arena *arena);
static inline bool is_free_run(const odma_arena *arena, uint32_t run) {
    return run != NONE && run >= arena->layout.table_size;
}
uint32_t best_fit(const odma_arena *arena, uint32_t length);
uint32_t largest_run(const odma_arena *arena);
void hold(odma_arena *arena, uint32_t slot, uint32_t free_run, uint32_t length);
void release(odma_arena *arena, uint32_t slot);
void grow(odma_arena *arena, uint32_t slot, uint32_t length);
void cut(odma_arena *arena, uint32_t slot, uint32_t length);
void cut_to_slot(odma_arena *arena, uint32_t slot, uint32_t length, uint32_t tail);
void swap_runs(odma_arena *arena, uint32_t slot, uint32_t other);
uint32_t open_window(odma_arena *arena, uint32_t left, uint32_t right);
uint32_t close_window(odma_arena *arena, uint32_t prev, uint32_t next);
uint32_t take_slot(odma_arena *arena);
void give_slot(odma_arena *arena, uint32_t slot);
uint32_t id_hash(const char id[ODMA_ID_BYTES]);
uint32_t find_id(const odma_arena *arena, const char id[ODMA_ID_BYTES], uint32_t hash);
void add_id(odma_arena *arena, uint32_t slot, uint32_t hash);
void drop_id(odma_arena *arena, uint32_t slot);

/* --- policy.c --- */
const char *policy_fault(const odma_policy *policy);
uint32_t safety_blocks(const odma_arena *arena);
double accepted_risk(const odma_arena *arena, const odma_op *op);
uint32_t first_blocks(const odma_arena *arena, const odma_op *op, uint32_t max_total);
uint32_t growth_blocks(const odma_arena *arena, uint32_t slot, uint32_t least, uint32_t want);
bool are_quantiles(const float quantiles[ODMA_QUANTILES]);
bool is_unsure(const odma_arena *arena, const float quantiles[ODMA_QUANTILES]);
uint32_t blocks_of(const odma_arena *arena, uint32_t tokens);

/* --- shares.c --- */
/* A tenant, in blocks, as it stands before an operation. */
struct standing {
    uint64_t tenant;      /* hash of its name */
    uint32_t index;       /* in the policy; NONE: not named there */
    uint32_t held, guaranteed, maximum;
};
const char *tenants_fault(const odma_policy *policy);
void count_accounts(odma_arena *arena);
const char *accounts_fault(odma_arena *arena);
void credit_region(odma_arena *arena, uint32_t slot);
void debit_region(odma_arena *arena, uint32_t slot);
void resize_region(odma_arena *arena, uint32_t slot, uint32_t before);
uint64_t tenant_hash(const char name[ODMA_NAME_BYTES]);
struct standing standing_of(const odma_arena *arena, uint64_t tenant);
bool is_covered(const struct standing *tenant, uint32_t more);
bool may_borrow(const odma_arena *arena, const struct standing *tenant);
void set_claim(odma_arena *arena, const struct standing *tenant, uint32_t request,
               uint32_t blocks);
void end_claim(odma_arena *arena, const struct standing *tenant, uint32_t request);
uint64_t borrower(odma_arena *arena, const struct standing *asker);
uint64_t youngest(odma_arena *arena, const struct standing *asker);

/* --- plan.c --- */
struct plan_refusal {
    uint32_t reason;
    uint32_t copy_tokens_needed;
};
uint32_t used_of(const odma_arena *arena, uint32_t slot);
void fix_used(odma_arena *arena, uint32_t slot);
bool place_new(odma_arena *arena, uint32_t slot, uint32_t length, struct plan_refusal *refusal);
bool make_room(odma_arena *arena, uint32_t slot, uint32_t length, struct plan_refusal *refusal);
void make_hole(odma_arena *arena, uint32_t slot, uint32_t length, struct plan_refusal *refusal);
void make_way(odma_arena *arena, uint32_t slot, uint32_t length, struct plan_refusal *refusal);
size_t side_bytes(void);

/* --- batch.c --- */
static inline struct note *note_of(odma_arena *arena, uint32_t slot) {
    struct note *note = &arena->runs[slot].note;
    if (note->tick != arena->tick) *note = (struct note){.tick = arena->tick};
    return note;
}
uint64_t handle_of(const odma_arena *arena, uint32_t slot);
void set_place(odma_arena *arena, uint32_t slot);
void set_waiting(odma_arena *arena, uint32_t slot);
void forget_books(odma_arena *arena);

/* --- learn.c --- */
void bins_init(odma_arena *arena);
uint32_t class_of(const odma_arena *arena, const char name[ODMA_NAME_BYTES]);
uint32_t class_for(odma_arena *arena, const char name[ODMA_NAME_BYTES]);
void learn(odma_arena *arena, uint32_t slot, uint32_t output_tokens, bool censored);
odma_status rescale(odma_arena *arena);

/* --- report.c --- */
const char *engine_fault(const odma_engine *engine);
const char *books_fault(const odma_arena *arena);
uint64_t last_batch(const struct books *books);

#endif
