/* arena.h - an arena's books and indexes, which the files of this room share.
 *
 * The books are plain memory, as it lies in a pool's file (record.c draws it),
 * divided into grains of 32 bytes. The process works on a copy of them, marks
 * the grains that it changes, and commits. Indexes (runs, bins, request ids,
 * accounts) live in process memory only and are rebuilt from the books.
 *
 *   change.c, read.c      the doors: they take the lock; those of change.c commit
 *   file.c                a file made, attached, closed
 *   faults.c              a page of a mapped file that fails
 *   batch.c               a whole batch; digest.c, prefetch.c look at it first
 *   record.c              the bytes of the file, and how they change
 *   ops.c, check.c        one operation; every rule
 *   reuse.c               what an allocate begins with: adopted, or gathered
 *   keep.c, keys.c        runs that are kept; the keys of what others may reuse
 *   plan.c                where a region goes, and what has to move for it
 *   index.c               all indexes emptied, or built from the books
 *   policy.c, shares.c    lengths and admission; what tenants hold and may claim
 *   learn.c               histograms and completions
 *   slots.c, waits.c      who holds what; what was vacated
 *   runs.c                the blocks in address order
 *   bins.c, ids.c         free runs by length; regions by request id
 *   defaults.c            what a field that is 0 means
 *   base.c                what all of them use
 *   limits.c              optimal bucket limits, which need no arena
 */
#ifndef ODMA_ARENA_H
#define ODMA_ARENA_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "../odma.h"

enum {
    GRAIN_BYTES = 32,
    LINE_BYTES = 64,     /* of a cache */
    RECORDS = 3,         /* two batches take turns, the third is for the rest */
    RECORD_OTHER = 2,
    SLOT_BITS = 20,      /* of a handle; the rest is the generation */
    HANDLE_SLOT = (1 << SLOT_BITS) - 1,
    SLOT_FREE = 0,       /* else an odma_region_state */
    MOST_CANDIDATES = 64, /* runs that begin alike, of which one is chosen */
    STATS = ODMA_CLASSES + 2,
    EXACT_BINS = 1024,   /* free runs shorter than this have a bin for each length */
    SUB_BINS = 64,       /* longer ones: bins per power of two */
    FREE_BINS = EXACT_BINS + 15 * SUB_BINS,
    MOST_OUTPUT_TOKENS = 1 << 24,
    PLAN_STEPS = 1 << 24, /* of a batch; a search that is under way may end */
    CHANGE_TURNS = ODMA_CLAIM_CALLS / ODMA_CLAIM_TURNS
};

static const uint32_t NONE = UINT32_MAX;
static const double LEVELS[ODMA_QUANTILES] = {0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99};
static const uint64_t MAX_WIRE = (uint64_t)1 << 53;
static const uint64_t NO_BATCH = UINT64_MAX;

/* --- the books, as they lie in the file --- */

struct slot {
    uint32_t state;
    uint32_t generation;  /* of the last handle issued for this slot */
    uint32_t start;
    uint32_t length;
    uint32_t used_tokens; /* live: as said in batch `seq`, else it counts as full */
    float overflow_risk;  /* live: accepted for it */
    uint64_t seq;         /* waiting, kept: the completed_seq that frees it */
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
    uint64_t key[2];      /* of ODMA_CLASS_POOL: of the hashes of tenants' names */
    double bins[4][ODMA_BINS]; /* output finished, censored; total finished, censored */
    odma_completion ring[ODMA_RING];
};

/* An allocate within a guarantee that found no room. */
struct claim {
    uint64_t turn;        /* when it was last asked for; 0: no claim */
    uint32_t blocks;
    uint32_t request;     /* hash of its id */
};

/* An odma_engine as all books have it. */
struct plain_engine {
    uint32_t moves, single_ordered_stream, copies_may_overlap, planes;
    double descriptor_seconds, token_seconds;
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
    uint64_t turns;       /* CHANGE_TURNS for a call that changed something, else 1 */
    uint64_t owner;       /* fence of the epoch, 0: none */
    uint64_t number;      /* last of the owner's messages */
    uint64_t refused;     /* 1: that one was, and stays so */
    struct plain_engine engine;
    odma_counters counters;
    odma_policy policy;   /* from here on a batch marks only what it changes */
    struct claim claims[ODMA_TENANTS]; /* of the policy's tenants */
    char class_names[ODMA_CLASSES][ODMA_NAME_BYTES];
    uint8_t description[ODMA_DESCRIPTION_BYTES];
    struct stats stats[STATS];
    /* then table_size cells, as many request ids, as many predictions; in pools with
     * granules a struct reuse, table_size marks, and a key for each granule */
};

struct reuse {
    uint32_t reads_two_runs;
    uint32_t pad;
    uint64_t prompt_tokens, adopted_tokens, gathered_tokens, shared_tokens, given_up_tokens;
    uint64_t more_pad[2];
};

/* What the run of a slot is to others. A run outlives its writers: who adopts it gets a
 * handle of his own, and the keys stay. */
struct mark {
    uint32_t generation;  /* of the handle under which the run began; 0: its keys are void */
    uint32_t given;       /* granules from the first that have a key */
    uint32_t keyed;       /* of these, those that are final: their keys stand */
    uint32_t reused;      /* granules that the writer has found written */
    uint64_t last_use;    /* turn */
    uint64_t read_seq;    /* several streams: the last answer that gathers from it */
};

/* The key of granule `index` of the run in `slot`: as long as that run is `generation`, and
 * index below mark.given. All zero, or of a run that is over: room for another. */
struct key {
    uint8_t bytes[ODMA_KEY_BYTES];
    uint32_t slot, generation, index;
    uint32_t pad;
};

_Static_assert(sizeof(struct slot) == GRAIN_BYTES, "a slot is one grain");
_Static_assert(sizeof(struct request) == GRAIN_BYTES, "a request is one grain");
_Static_assert(sizeof(struct reuse) % GRAIN_BYTES == 0, "what is reused is whole grains");
_Static_assert(sizeof(struct mark) == GRAIN_BYTES, "a mark is one grain");
_Static_assert(sizeof(struct key) == GRAIN_BYTES, "a key is one grain");
_Static_assert(sizeof(struct prediction) % GRAIN_BYTES == 0, "predictions are whole grains");
_Static_assert(sizeof(struct stats) % GRAIN_BYTES == 0, "stats are whole grains");
_Static_assert(sizeof(struct books) % LINE_BYTES == 0,
               "cells, ids and predictions are cache lines");

/* --- indexes in process memory --- */

/* What one batch has noted about a slot, valid if tick is the step's. */
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

/* What is derived of a slot's run, in pools with granules. */
struct hold {
    uint32_t top_key;      /* that of the highest index, NONE: none */
    uint32_t gathered;     /* blocks that the batch of `gathered_tick` gathers from it */
    uint32_t gathered_tick;
    bool spare;            /* kept, and may be given up now */
    bool tied;             /* in the list of those kept that were not spare */
};

/* Where a key is among others. */
struct key_links {
    uint32_t below;        /* of the same run, with the index below */
    uint32_t prev, next;   /* of one hash, while it stands */
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
    uint32_t held_up_tick; /* of the step that refused an operation of it */
};

/* A slot that the step has moved, and where it was before. */
struct move {
    uint32_t slot;
    uint32_t first_start;
};

/* The beginning of a new region, to be copied from another run at the end of the batch. */
struct gather {
    uint64_t handle;
    uint32_t source;       /* slot */
    uint32_t granules;
};

/* The batch in hand, or the operation that stands alone. */
struct step {
    uint64_t seq;                /* used_tokens said in it hold; NO_BATCH: none */
    uint32_t tick;               /* of its notes */
    uint32_t safety_blocks;      /* that admission must leave free */
    uint32_t *hashes;            /* of its allocates' request ids */
    uint32_t *freed_slots;       /* by it, as far as can be seen: at most max_ops */
    struct move *moved;          /* at most max_copies */
    uint32_t moved_count;
    uint32_t moves;              /* moves so far, copied or not */
    uint32_t pins;
    uint64_t *held_up;           /* tenants of which an operation was refused: at most max_ops */
    uint32_t held_up_count;
    uint64_t first_birth;        /* births before it */
    uint64_t first_steps;        /* arena->steps when it began */
    bool ordered;                /* allocates are held up by those refused before them, */
    bool stopped;                /* as one was */
    bool places_changed;         /* since they were put into results */
    bool giving;                 /* kept runs count as gaps in the search that is under way */
    uint32_t copy_tokens_left;
    odma_result *results;
    odma_copy *copies;
    uint32_t copy_count;
    odma_place *places;
    odma_reused *reused;         /* of each of these places; NULL without granules */
    uint32_t place_count;
    struct gather *gathers;      /* at most max_ops */
    uint32_t gather_count;
};

struct layout {
    uint64_t record_bytes;
    uint64_t results, copies, moved, reused, indexes, grains; /* offsets in a record */
    uint64_t books_offset;
    uint64_t books_bytes;
    uint64_t file_bytes;
    uint32_t record_grains;    /* room for changed grains */
    uint32_t table_size;
    uint32_t most_moved;         /* places that an answer may list */
    uint32_t key_room;           /* 0 without granules */
};

struct odma_arena {
    pthread_mutex_t lock;
    odma_geometry geometry;
    struct layout layout;
    int descriptor;
    ino_t inode;                 /* of the file at the descriptor */
    dev_t device;
    uint8_t *map;
    volatile uint32_t *fork_mark; /* a page that a forked child sees zeroed */
    uint64_t lsn;                /* of the last commit */
    uint64_t sum;                /* of the file's books */
    volatile bool broken;        /* also set by faults.c, in the middle of a call */
    bool rebooted;
    uint32_t recovery;           /* odma_recovery */
    bool rescale;                /* some histogram's weights have grown too large */

    struct books *books;
    struct cell *cells;
    char (*request_ids)[ODMA_ID_BYTES];
    struct prediction *predictions;
    struct reuse *reuse;         /* these three in pools with granules only */
    struct mark *marks;
    struct key *keys;
    uint32_t granule_blocks;     /* 0: nothing is reused */

    uint32_t *dirty;             /* grains changed since the last commit */
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

    struct hold *holds;          /* by slot */
    struct key_links *links;     /* by key */
    uint32_t *key_heads;         /* standing keys by hash */
    uint32_t key_heads_mask;
    uint32_t *spare_keys;        /* a stack */
    uint32_t spare_key_count;
    uint32_t kept, kept_blocks, kept_granules;
    uint32_t spare_blocks;       /* of kept runs that may be given up now */
    uint32_t *tied;              /* kept runs that may not, or could not before */
    uint32_t tied_count;

    uint64_t steps;              /* runs looked at in search of a plan, ever */
    struct side *sides;          /* scratch of the planner and of index.c */
    struct step step;
};

#endif
