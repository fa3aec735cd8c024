/* odma.h - who owns which blocks of a KV cache that must stay contiguous.
 *
 * An arena is the block range [0, blocks) of one pool of device memory. Each
 * request holds one region, a contiguous run of blocks, until it is freed. The
 * library decides where regions lie and when they move. It gives out places
 * and copy instructions and never touches the memory behind them, which may
 * live on a device that the host cannot address.
 *
 *     0          4      6            10     12         blocks
 *     |  region  | free |   region   | wait |   free   |
 *
 * "wait" is a run that was given back but may still be used by work that the
 * device has not finished. Where a pool has granules, the run of a request that
 * ended may be kept for later ones that begin alike: it counts as free, and is
 * given up when anything else needs it. The books are one mapped file with one writer. They
 * survive the death of the process at any instruction, not a power cut.
 *
 * Units     Places and lengths count blocks. What is written in them (used,
 *           limits, histograms, copies) counts tokens. Prices are seconds.
 * Errors    Every call that can fail returns an odma_status and writes its
 *           outputs only on ODMA_OK. After any other status nothing changed.
 *           Functions that take `reason` write a sentence there on failure.
 * Memory    odma_arena_create() and odma_arena_attach() take all the memory the
 *           arena will ever use, so no later call can run out of it.
 * Unset     A field that is 0 is unset: whoever zeroes a struct asks for the defaults.
 * Threads   Every call takes the arena's own lock. After a fork the child must
 *           attach for itself: its calls answer ODMA_FORKED.
 *
 * The shortest program:
 *
 *     odma_geometry geometry = {.blocks = 4096, .model_length_tokens = 2048};
 *     odma_engine engine = {0};
 *     odma_op op = {.kind = ODMA_OP_ALLOCATE, .request_id = "first", .prompt_tokens = 100};
 *     odma_result result = {0};
 *     odma_arena *arena = NULL;
 *     char reason[ODMA_REASON_BYTES] = "";
 *
 *     if (odma_arena_create("kv.pool", &geometry, &arena, reason) != ODMA_OK) puts(reason);
 *     odma_arena_open_epoch(arena, 1, &engine, NULL, NULL, 0);
 *     odma_arena_unary(arena, (odma_caller){.epoch = 1}, &op, &result);
 *     printf("%u blocks from block %u\n", result.length, result.start);
 *     odma_arena_close(arena);
 */
#ifndef ODMA_H
#define ODMA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

enum {
    ODMA_LAYOUT_VERSION = 4,
    ODMA_ID_BYTES = 64,          /* request ids, padded with zero bytes */
    ODMA_NAME_BYTES = 32,        /* classes and tenants, padded with zero bytes */
    ODMA_BOOT_BYTES = 40,        /* boot ids, as text */
    ODMA_REASON_BYTES = 256,
    ODMA_DESCRIPTION_BYTES = 8192,
    ODMA_QUANTILES = 7,          /* .1 .25 .5 .75 .9 .95 .99 of output tokens */
    ODMA_LIMITS = 16,
    ODMA_TENANTS = 16,           /* tenants with shares of their own */
    ODMA_CLAIM_TURNS = 64,       /* calls that change something, which a claim outlives, */
    ODMA_CLAIM_CALLS = 4096,     /* and calls at all */
    ODMA_CLASSES = 64,           /* request classes with statistics of their own */
    ODMA_CLASS_POOL = 64,        /* index of all classes together */
    ODMA_CLASS_OTHER = 65,       /* index of the classes beyond ODMA_CLASSES */
    ODMA_BINS = 512,
    ODMA_RING = 256,             /* completions remembered one by one, per class */
    ODMA_LEARNT_ENOUGH = 32,     /* completions from which lengths are known */
    ODMA_TEXT_BYTES = 16384,     /* of a prompt, of which a digest is given here */
    ODMA_KEY_BYTES = 16,         /* of a granule's key */
    ODMA_MAX_KEYS = 4096,        /* of one allocate, and of one free */
    ODMA_MAX_BATCH_KEYS = 8192,
    ODMA_MIN_GRANULE_TOKENS = 64,
    ODMA_MAX_GRANULE_TOKENS = 512,
    ODMA_MAX_TOKENS = 268435456, /* of an arena and of a request */
    ODMA_MAX_BLOCKS = 16777216,
    ODMA_MAX_REGIONS = 65536,
    ODMA_MAX_OPS = 4096,
    ODMA_MAX_COPIES = 4096
};

typedef enum odma_status {
    ODMA_OK = 0,
    ODMA_INVALID,       /* an argument breaks a rule written next to it */
    ODMA_EPOCH,         /* that epoch is over, or none is running */
    ODMA_SEQ_CHANGED,   /* the last seq, but with another body */
    ODMA_SEQ_OLD,       /* an older seq */
    ODMA_SEQ_GAP,       /* a seq beyond the next one */
    ODMA_VERSION,       /* another policy version is in force */
    ODMA_NOT_FOUND,     /* no such file, or no such handle */
    ODMA_EXISTS,        /* there is a file already */
    ODMA_LOCKED,        /* another process has the file open */
    ODMA_FOREIGN,       /* wrong owner, permissions, or not a regular file */
    ODMA_MISMATCH,      /* another layout version or another geometry */
    ODMA_CORRUPT,       /* the file breaks a rule that the library keeps */
    ODMA_NO_SPACE,      /* the file system is full */
    ODMA_IO,            /* the system refused: memory, descriptors, rights, a bad disk; try again */
    ODMA_BROKEN,        /* the file changed under the arena: only close it */
    ODMA_FORKED,        /* this process did not attach the arena */
    ODMA_FENCED,        /* another owner number is the present one */
    ODMA_UNFENCED,      /* the epoch has an owner number, the call has none */
    ODMA_LATE           /* its number was passed, or refused before */
} odma_status;

/* --- make: a file, an epoch, a policy --- */

typedef struct odma_arena odma_arena;

/* What the memory is. Fixed for the life of a file. */
typedef struct odma_geometry {
    uint32_t blocks;              /* 1 to ODMA_MAX_BLOCKS, of ODMA_MAX_TOKENS tokens: no default */
    uint32_t block_tokens;        /* a power of two, 1 to 1,024; default 16 */
    uint32_t max_regions;         /* live at once, 1 to ODMA_MAX_REGIONS; default 1,024 */
    uint32_t max_ops;             /* of one batch, 1 to ODMA_MAX_OPS; default 1,024 */
    uint32_t max_copies;          /* of one answer, 1 to ODMA_MAX_COPIES; default 1,024 */
    uint32_t model_length_tokens; /* longest total of a request; default: all blocks */
    uint64_t digest;              /* the caller's, of everything else that must match */
    uint32_t granule_tokens;      /* what is reused: a multiple of a block, 64 to 512; 0: nothing */
    uint32_t pad;
} odma_geometry;

/* Make the file at `path`, whose directory must exist, and attach it. No epoch
 * is running in it.
 *
 * Fails     ODMA_EXISTS; ODMA_INVALID for a bad geometry; ODMA_NO_SPACE;
 *           ODMA_IO. The file is removed again.
 */
odma_status odma_arena_create(const char *path, const odma_geometry *geometry,
                              odma_arena **arena, char reason[ODMA_REASON_BYTES]);

/* Attach the file at `path` for writing, finish what a killed process left
 * half done, and check everything. An epoch of another boot than `boot_id` is
 * ended (NULL: not compared). `geometry` may be NULL: any will do.
 *
 * Fails     ODMA_NOT_FOUND, ODMA_LOCKED, ODMA_FOREIGN, ODMA_MISMATCH,
 *           ODMA_CORRUPT, ODMA_NO_SPACE, ODMA_IO. The file is as before.
 * Cost      O(file size), a few milliseconds for 20,000 regions.
 */
odma_status odma_arena_attach(const char *path, const odma_geometry *geometry, const char *boot_id,
                              odma_arena **arena, char reason[ODMA_REASON_BYTES]);

/* Give back the memory and the lock. The file stays. NULL is allowed. In a forked
 * child it gives back only what the child has; the parent keeps the lock. */
void odma_arena_close(odma_arena *arena);

typedef enum odma_moves {
    ODMA_MOVES_NONE = 1,
    ODMA_MOVES_OWN_GROWTH = 2,
    ODMA_MOVES_ANY = 3
} odma_moves;

/* What the engine can do and what its copies cost. Fixed for an epoch.
 * A plan costs planes x pieces x descriptor_seconds + tokens x token_seconds. */
typedef struct odma_engine {
    uint32_t moves;                 /* odma_moves; default ODMA_MOVES_NONE */
    uint32_t single_ordered_stream; /* 0 or 1 */
    uint32_t copies_may_overlap;    /* 0 or 1 */
    uint32_t planes;                /* at least 1; default 1 */
    double descriptor_seconds;      /* at least 0 */
    double token_seconds;           /* to copy one token in every plane, at least 0 */
    uint32_t reads_two_runs;        /* 0 or 1: it reads a beginning where it lies; with granules */
    uint32_t pad;
} odma_engine;

/* Begin an epoch with empty books; a running one ends. What was learnt stays.
 *
 * Promise   `epoch` is the one running; `description` can be read back.
 * Fails     ODMA_INVALID unless epoch is above every earlier one and below
 *           2^53, and the engine and sizes keep their rules.
 */
odma_status odma_arena_open_epoch(odma_arena *arena, uint64_t epoch, const odma_engine *engine,
                                  const char *boot_id, const void *description,
                                  uint32_t description_bytes);

/* Who asks. An epoch that has an owner number (odma_arena_describe) does only
 * what carries it, and each message of its owner once and in order: one whose
 * number is above the last is done, and its number and its effect are in one
 * commit. One with the last number is a retry: a batch gets its stored answer,
 * another call is done again, which has the same effect; if it was refused, it
 * stays refused. All else is refused, and changes nothing.
 *
 * Fails     ODMA_EPOCH, ODMA_FENCED, ODMA_UNFENCED, ODMA_LATE. */
typedef struct odma_caller {
    uint64_t epoch;
    uint64_t owner;               /* default: none, as in a pool without a service */
    uint64_t number;              /* from 1 under each owner number, below 2^53 */
} odma_caller;

/* Change the description, and with it the owner number of the epoch: both or
 * neither. Under a larger one numbers begin anew.
 *
 * Fails     ODMA_INVALID if `owner` is below the present one or not below 2^53,
 *           or if it changes and no epoch is running.
 */
odma_status odma_arena_describe(odma_arena *arena, uint64_t owner, const void *description,
                                uint32_t description_bytes);

/* Use up the number of a call that was refused outside of the books: if it comes
 * again it stays refused. Fails as odma_caller says. */
odma_status odma_arena_spend(odma_arena *arena, odma_caller caller);

/* End the epoch. A caller without an owner number is not compared with the epoch's:
 * that is an operator, or nobody calls any more. Fails as odma_caller says. */
odma_status odma_arena_end_epoch(odma_arena *arena, odma_caller caller);

typedef enum odma_start {
    ODMA_START_MAXIMUM = 1,
    ODMA_START_QUANTILE = 2,
    ODMA_START_STEP = 3
} odma_start;

typedef enum odma_overflow {
    ODMA_OVERFLOW_PREEMPT = 1,
    ODMA_OVERFLOW_RELOCATE = 2,
    ODMA_OVERFLOW_COMPACT = 3
} odma_overflow;

/* What one tenant is sure of and what it may hold, as shares of the blocks.
 *
 * What a guarantee leaves idle is lent to anybody. An allocate that its
 * tenant's guarantee covers and that finds no room is a claim: its refusal names
 * a region of a tenant that holds more than its guarantee, and until it is let
 * in nobody else is admitted beyond a guarantee. A claim lapses once it was not
 * asked for again in ODMA_CLAIM_CALLS batches and unary calls, of which one that
 * changed something counts for as many as make ODMA_CLAIM_TURNS of them do. */
typedef struct odma_tenant {
    char name[ODMA_NAME_BYTES];   /* not empty, named once */
    double guaranteed_share;      /* 0 to maximum_share */
    double maximum_share;         /* that it may be admitted to, (0, 1]; default 1 */
} odma_tenant;

/* The policy record: how long a region is, who is admitted, what may move.
 *
 * A length starts from `start`: the request's maximum; or the quantile of its
 * predicted total at the accepted risk (the maximum if nothing is predicted);
 * or prompt + generated + step. After an overflow (an extend, or an allocate
 * with generated tokens) it starts from at least the tokens needed x growth.
 * Then it is the smallest limit that holds it, else a multiple of step; never
 * above the request's maximum; rounded up to blocks. */
typedef struct odma_policy {
    char name[ODMA_NAME_BYTES];   /* default "static" */
    uint32_t version;             /* counts changes from 1; set by the arena */
    uint32_t start;               /* odma_start; default ODMA_START_MAXIMUM */
    uint32_t overflow;            /* odma_overflow; default ODMA_OVERFLOW_PREEMPT */
    uint32_t step_tokens;         /* 1 to 2^20; default 64 */
    uint32_t max_copy_tokens;     /* of a batch that does not say */
    uint32_t limit_count;         /* 0 to ODMA_LIMITS */
    uint32_t limits_tokens[ODMA_LIMITS]; /* ascending, from at least 1 */
    double overflow_risk;         /* 0 to 1 */
    double safety_share;          /* 0 to 0.9 of the blocks are closed to admission */
    double unsure_ratio;          /* q95/q50 above it is unsure; 0: never, else >= 1 */
    double growth;                /* 1 to 4; default 1 */
    double tenant_share;          /* maximum of a tenant that is not named, (0, 1]; default 1 */
    uint32_t tenant_count;        /* 0 to ODMA_TENANTS */
    uint32_t pad;
    odma_tenant tenants[ODMA_TENANTS]; /* guarantees + safety_share: at most 1 */
} odma_policy;

/* Install a policy record and write it back as it is stored: with its new version,
 * and with defaults where it was unset. `caller` may be NULL: nobody who is fenced.
 *
 * Fails     ODMA_INVALID if a field breaks its rule; ODMA_VERSION if
 *           expected_version is not 0 and not in force; as odma_caller says.
 */
odma_status odma_arena_set_policy(odma_arena *arena, const odma_caller *caller,
                                  odma_policy *policy, uint32_t expected_version);

/* Whether a finished record, in which nothing is unset, keeps every rule: ODMA_OK,
 * or ODMA_INVALID with "field: rule" in `reason`. */
odma_status odma_policy_check(const odma_policy *policy, char reason[ODMA_REASON_BYTES]);
odma_status odma_geometry_check(const odma_geometry *geometry, char reason[ODMA_REASON_BYTES]);

/* Bytes of the file of an arena of this geometry, 0 for a bad one. The memory of a
 * process that has it open is less. */
uint64_t odma_geometry_file_bytes(const odma_geometry *geometry);

/* --- step: what one decode step asks, and its answer --- */

typedef struct odma_used {
    uint64_t handle;
    uint32_t used_tokens;         /* upper bound, all enqueued work included */
    uint32_t pinned;              /* 1: must not move in this batch */
    uint32_t shareable_tokens;    /* never written again: may be reused as far as keys go */
    uint32_t pad;
} odma_used;

typedef enum odma_op_kind {
    ODMA_OP_FREE = 1,
    ODMA_OP_TRIM = 2,
    ODMA_OP_EXTEND = 3,
    ODMA_OP_ALLOCATE = 4
} odma_op_kind;

typedef enum odma_end {
    ODMA_END_FINISHED = 1,        /* its length is learnt */
    ODMA_END_HIT_LIMIT = 2,       /* learnt as "at least" */
    ODMA_END_ABORTED = 3,
    ODMA_END_PREEMPTED = 4
} odma_end;

/* What of an operation or a batch is given even where it is 0. A bit whose field
 * is not 0 changes nothing. */
enum {
    ODMA_GIVEN_MAX_TOTAL = 1,     /* refused, as a request of no tokens is */
    ODMA_GIVEN_RISK = 2,          /* no risk is accepted */
    ODMA_GIVEN_QUANTILES = 4,     /* an empty answer is predicted */
    ODMA_GIVEN_MAX_COPY = 8       /* the batch may copy nothing */
};

typedef struct odma_op {
    uint32_t kind;                /* odma_op_kind */
    uint32_t end;                 /* free: odma_end */
    uint64_t handle;              /* free, trim, extend */
    uint32_t output_tokens;       /* free: all that was generated */
    uint32_t least_tokens;        /* extend: total to hold; trim: new length */
    uint32_t want_tokens;         /* extend: length to aim at; default: the policy's */
    uint32_t prompt_tokens;       /* the rest: allocate */
    uint32_t generated_tokens;
    uint32_t max_total_tokens;    /* default: model length or capacity */
    uint32_t guess_tokens;        /* the engine's own prediction; default: none */
    uint32_t given;               /* ODMA_GIVEN_ bits */
    double overflow_risk;         /* 0 to 1; default: the policy's */
    float quantiles[ODMA_QUANTILES]; /* predicted output tokens; default: none */
    float raw[ODMA_QUANTILES];    /* the same before corrections, only kept; default: none */
    uint64_t text_digest[2];      /* of the prompt's text, for the fingerprint; default: no text */
    const uint8_t *keys;          /* allocate: of its granules from the first; free: of the next */
    uint32_t key_bytes;           /* of them, whole keys */
    uint32_t keep_tokens;         /* free: to be kept as far as keys go; default: nothing */
    char request_id[ODMA_ID_BYTES];
    char request_class[ODMA_NAME_BYTES];
    char tenant[ODMA_NAME_BYTES];
} odma_op;

typedef struct odma_batch {
    uint64_t epoch;
    uint64_t seq;
    uint64_t completed_seq;
    uint32_t max_copy_tokens;     /* default: the policy's */
    uint32_t given;               /* ODMA_GIVEN_MAX_COPY, or 0 */
    uint32_t pass_refused;        /* 1: later allocates are not held up by a refused one */
    uint32_t used_count;          /* at most max_regions */
    uint32_t op_count;            /* at most max_ops */
    const odma_used *used;
    const odma_op *ops;
    uint64_t owner;               /* with epoch as in odma_caller, and in no fingerprint */
    uint64_t number;
} odma_batch;

typedef enum odma_outcome {
    ODMA_PLACED = 1,              /* handle, start, length */
    ODMA_REFUSED = 2,             /* reason and what follows it */
    ODMA_FREED = 3,
    ODMA_ALREADY_FREE = 4
} odma_outcome;

typedef enum odma_reason {
    ODMA_REASON_NONE = 0,
    ODMA_REASON_NO_SPACE = 1,
    ODMA_REASON_FRAGMENTED = 2,
    ODMA_REASON_COPY_BUDGET = 3,
    ODMA_REASON_SAFETY_SHARE = 4,
    ODMA_REASON_QUOTA = 5,
    ODMA_REASON_TABLE_FULL = 6,
    ODMA_REASON_WAITS_FOR_COMPLETION = 7,
    ODMA_REASON_PINNED = 8,
    ODMA_REASON_NOT_FOUND = 9,
    ODMA_REASON_INVALID = 10,
    ODMA_REASON_SKIPPED = 11,
    ODMA_REASON_CLAIMED = 12
} odma_reason;

/* The rule that an INVALID or NOT_FOUND operation, or an ODMA_INVALID batch,
 * breaks. */
typedef enum odma_rule {
    ODMA_RULE_NONE = 0,
    ODMA_RULE_HANDLE_DEAD,        /* the handle's region must be live */
    ODMA_RULE_HANDLE_UNKNOWN,     /* the handle was never issued in this epoch */
    ODMA_RULE_END,                /* end must be one of odma_end */
    ODMA_RULE_OUTPUT_TOKENS,      /* output_tokens is at most 2^24 */
    ODMA_RULE_LEAST_TOKENS,       /* 1 to the request's maximum, rounded up to a block */
    ODMA_RULE_WANT_TOKENS,        /* 0, or least_tokens to 2^28 */
    ODMA_RULE_TO_TOKENS,          /* 1 to the length, at least what is used, reused, has keys */
    ODMA_RULE_REQUEST_ID,         /* 1 to 64 bytes */
    ODMA_RULE_REQUEST_ID_CHANGED, /* it lives with other numbers */
    ODMA_RULE_PROMPT_TOKENS,      /* at least 1, with generated at most the maximum */
    ODMA_RULE_MAX_TOTAL_TOKENS,   /* 1 to the capacity */
    ODMA_RULE_OVERFLOW_RISK,      /* 0 to 1 */
    ODMA_RULE_QUANTILES,          /* finite, at least 0, ascending */
    ODMA_RULE_KIND,               /* kind must be one of odma_op_kind */
    ODMA_RULE_COUNTS,             /* too many ops or used */
    ODMA_RULE_COMPLETED_SEQ,      /* never falls, at most the last answered seq */
    ODMA_RULE_USED_HANDLE,        /* live, and listed once */
    ODMA_RULE_USED_TOKENS,        /* at most the region's length */
    ODMA_RULE_REQUEST_ID_TWICE,   /* an earlier operation of the batch placed it */
    ODMA_RULE_TENANT_MAX_TOTAL,   /* at most what its tenant may hold: most_blocks */
    ODMA_RULE_TENANT_PROMPT,      /* with one more token at most what its tenant may hold */
    ODMA_RULE_KEYS,               /* whole keys, at most the granules of prompt and generated */
    ODMA_RULE_NO_GRANULES,        /* keys need a pool with granules */
    ODMA_RULE_KEEP_TOKENS,        /* at most the larger of used and reused */
    ODMA_RULE_FREE_KEYS,          /* whole keys, at most the granules of keep_tokens left */
    ODMA_RULE_BATCH_KEYS,         /* of a batch: at most ODMA_MAX_BATCH_KEYS */
    ODMA_RULE_SHAREABLE_TOKENS,   /* at most used_tokens, in a pool with granules */
    ODMA_RULE_PADDING             /* ids and names end with zero bytes only */
} odma_rule;

typedef struct odma_result {
    uint32_t outcome;             /* odma_outcome */
    uint32_t reason;              /* odma_reason */
    uint32_t rule;                /* odma_rule */
    uint32_t start;               /* blocks, as after the whole batch */
    uint32_t length;              /* 0: a later operation freed the region */
    union {
        uint32_t free_blocks;     /* refused; kept runs count as free */
        uint32_t reused_tokens;   /* placed: need no prefill, in whole granules */
    };
    union {
        uint32_t largest_run;     /* refused */
        uint32_t shared_start;    /* placed: blocks, of the run whose beginning it reads */
    };
    union {
        uint32_t waiting_blocks;  /* refused */
        uint32_t shared_tokens;   /* placed: so many of reused_tokens; then start counts behind */
    };
    uint32_t copy_tokens_needed;  /* COPY_BUDGET: 0 if max_copies is what is lacking */
    uint32_t most_blocks;         /* what a tenant may hold, where a request breaks that rule */
    uint64_t handle;
    uint64_t preempt_handle;      /* 0: nobody */
} odma_result;

/* In every plane, copy tokens [from, from + tokens) to [to, to + tokens). */
typedef struct odma_copy {
    uint64_t handle;              /* whose tokens they are then; 0: a kept run's */
    uint32_t from_token;
    uint32_t to_token;
    uint32_t tokens;
    uint32_t overlaps;
} odma_copy;

typedef struct odma_place {
    uint64_t handle;
    uint32_t start;
    uint32_t length;
} odma_place;

/* What a place reuses, as in odma_result. */
typedef struct odma_reused {
    uint32_t reused_tokens;
    uint32_t shared_start;
    uint32_t shared_tokens;
    uint32_t pad;
} odma_reused;

/* The caller's memory for one answer. */
typedef struct odma_answer {
    uint64_t seq;
    uint32_t replayed;
    uint32_t policy_version;
    uint32_t result_count;
    uint32_t copy_count;
    uint32_t moved_count;
    uint32_t rule;                /* odma_rule, written with ODMA_INVALID too */
    uint32_t rule_index;          /* of the used entry or operation that breaks it */
    uint32_t pad;
    odma_result *results;         /* room for max_ops */
    odma_copy *copies;            /* room for max_copies */
    odma_place *moved;            /* room for max_copies; with granules for max_regions more */
    odma_reused *moved_reused;    /* of each that moved; as many, NULL without granules */
} odma_answer;

/* Do the operations of one decode step, in the order given.
 *
 * Promise   All of it or none of it, whenever the process dies. The same seq
 *           with the same body gets the stored answer, `replayed` set.
 * Fails     ODMA_SEQ_CHANGED, ODMA_SEQ_OLD, ODMA_SEQ_GAP; as odma_caller says;
 *           ODMA_INVALID with answer->rule and rule_index; ODMA_BROKEN.
 * Cost      O(used + ops); an operation that has to move regions O(live), and all
 *           of a batch together 2^24 runs looked at: beyond that nothing is moved.
 */
odma_status odma_arena_apply(odma_arena *arena, const odma_batch *batch, odma_answer *answer);

/* Look whether `batch` was answered already, without doing it: ODMA_OK with the
 * stored answer if so, ODMA_NOT_FOUND if odma_arena_apply() would do it, else
 * the status it would return for its epoch and seq. Predictions do not count. */
odma_status odma_arena_replay(odma_arena *arena, const odma_batch *batch, odma_answer *answer);

/* Do one operation outside of batches: it takes no seq, leaves the stored
 * answer alone and copies nothing. A free promises that no enqueued work uses
 * the region. */
odma_status odma_arena_unary(odma_arena *arena, odma_caller caller, const odma_op *op,
                             odma_result *result);

/* Free every live region whose handle is not among `handles`, and every waiting
 * run. Stores where the listed ones lie in `kept` (length 0: it is dead), in
 * the order given, and the handles freed in `freed`, which has room for
 * max_regions. Unless `completed_seq` is the last answered seq, what enqueued work has
 * written is doubtful: every kept run is given up then, and no key stands any more. */
odma_status odma_arena_reconcile(odma_arena *arena, odma_caller caller, uint64_t completed_seq,
                                 const uint64_t *handles, uint32_t count, odma_place *kept,
                                 uint64_t *freed, uint32_t *freed_count);

/* --- read: what the books say --- */

/* Counted since the file was made; outlive epochs. */
typedef struct odma_counters {
    uint64_t batches, allocates, extends, trims, frees;
    uint64_t refused_allocates, refused_extends;
    uint64_t preempted;           /* freed with ODMA_END_PREEMPTED */
    uint64_t copies, copied_tokens;
    uint64_t relocations;         /* extends that went to another hole */
    uint64_t compactions;         /* operations for which others were moved */
    uint64_t safety_hits_growth, safety_hits_unsure;
    uint64_t finished, hit_limit;
} odma_counters;

/* What is kept and reused; totals are counted since the file was made. */
typedef struct odma_reuse {
    uint32_t kept_runs;
    uint32_t pad;
    uint64_t kept_tokens;         /* that keys stand for in them */
    uint64_t prompt_tokens;       /* with generated ones, of all requests let in */
    uint64_t adopted_tokens;
    uint64_t gathered_tokens;
    uint64_t shared_tokens;
    uint64_t given_up_tokens;
} odma_reuse;

typedef enum odma_recovery {
    ODMA_CLEAN = 0,               /* nothing was half done */
    ODMA_DROPPED = 1,             /* a record that was not committed */
    ODMA_REDONE = 2               /* a committed record was applied again */
} odma_recovery;

typedef struct odma_report {
    uint64_t epoch;               /* 0: none is running */
    uint64_t last_epoch;
    uint64_t seq;                 /* last answered */
    uint64_t completed_seq;
    uint64_t owner;               /* number of the epoch's owner, 0: none */
    uint64_t number;              /* of its last message that was done or refused */
    uint32_t live;                /* regions */
    uint32_t waiting;             /* vacated runs */
    uint32_t free_runs;
    uint32_t free_blocks;         /* waiting ones not counted */
    uint32_t waiting_blocks;
    uint32_t largest_run;
    uint32_t reserved_blocks;     /* of live regions */
    uint32_t safety_blocks;       /* that admission must leave free */
    uint64_t used_tokens;         /* of live regions */
    uint32_t classes;             /* named so far */
    uint32_t rebooted;            /* attach ended an epoch of another boot */
    uint32_t recovery;            /* odma_recovery: what attach found */
    uint32_t pad;
    odma_counters counters;
    odma_reuse reuse;             /* kept memory counts as free above */
} odma_report;

odma_status odma_arena_report(odma_arena *arena, odma_report *report);

/* How many runs the last batch or unary call has looked at in search of plans. */
odma_status odma_arena_plan_steps(odma_arena *arena, uint64_t *steps);

odma_status odma_arena_geometry(odma_arena *arena, odma_geometry *geometry);
odma_status odma_arena_engine(odma_arena *arena, odma_engine *engine);

/* Copy out the description of the running epoch, or of the last one; *bytes is
 * its length. `description` has room for ODMA_DESCRIPTION_BYTES. */
odma_status odma_arena_description(odma_arena *arena, void *description, uint32_t *bytes);

odma_status odma_arena_policy(odma_arena *arena, odma_policy *policy);

/* What one named tenant holds, in blocks. */
typedef struct odma_tenant_use {
    char name[ODMA_NAME_BYTES];
    uint32_t regions;             /* live */
    uint32_t held;                /* by them; more than guaranteed is borrowed */
    uint32_t guaranteed;
    uint32_t maximum;
    uint32_t claimed;             /* that it waits for, 0: no claim stands */
    uint32_t pad;
} odma_tenant_use;

/* What each tenant of the policy holds, in its order; room for ODMA_TENANTS. */
odma_status odma_arena_tenants(odma_arena *arena, odma_tenant_use *uses, uint32_t *count);

typedef enum odma_region_state {
    ODMA_REGION_LIVE = 1,
    ODMA_REGION_WAITING = 2,
    ODMA_REGION_KEPT = 3          /* of a request that ended, for those that begin alike */
} odma_region_state;

typedef struct odma_region {
    uint64_t handle;
    uint64_t awaits_seq;          /* waiting, kept: the completed_seq that frees it */
    uint64_t birth;               /* live: order of its allocate */
    uint32_t state;               /* odma_region_state */
    uint32_t start;
    uint32_t length;
    uint32_t used_tokens;
    uint32_t prompt_tokens;
    uint32_t generated_tokens;
    uint32_t max_total_tokens;
    uint32_t class_index;
    uint32_t shareable_tokens;    /* live, kept: for which keys stand */
    uint32_t pad;
    char request_id[ODMA_ID_BYTES];
} odma_region;

/* List entries in address order from block `from`: at most `room` of them. */
odma_status odma_arena_regions(odma_arena *arena, uint32_t from, odma_region *regions,
                               uint32_t room, uint32_t *count);

/* Whether the books keep every rule, memory and file alike: ODMA_OK, or
 * ODMA_CORRUPT with the broken rule in `reason`; ODMA_IO: the file cannot be read. */
odma_status odma_arena_check(odma_arena *arena, char reason[ODMA_REASON_BYTES]);

/* A word for a status, never NULL. */
const char *odma_status_name(odma_status status);

/* --- learn: what completions teach --- */

/* One completion, or a request that still runs. */
typedef struct odma_completion {
    float quantiles[ODMA_QUANTILES]; /* as predicted; [0] < 0: none */
    float raw[ODMA_QUANTILES];    /* before corrections; all 0: none */
    float overflow_risk;          /* accepted for it */
    uint32_t prompt_tokens;
    uint32_t output_tokens;       /* running: as last reported, an upper bound */
    uint32_t censored;            /* stopped at its limit, or running: "at least" */
    uint64_t issue;               /* order of its allocate, over all epochs */
    uint64_t until;               /* allocates there had been when it ended; running: until now */
} odma_completion;

/* Decayed weights, in units of the newest completion. */
typedef struct odma_histogram {
    uint64_t completions;         /* ever */
    double output_finished[ODMA_BINS];
    double output_censored[ODMA_BINS];
    double total_finished[ODMA_BINS];
    double total_censored[ODMA_BINS];
} odma_histogram;

/* Name of a class by its index; ODMA_NOT_FOUND if there is none. */
odma_status odma_arena_class(odma_arena *arena, uint32_t index, char name[ODMA_NAME_BYTES]);

/* Index that a class name has, or would share: ODMA_CLASS_OTHER if the table is
 * full, ODMA_CLASS_POOL if it is new. */
odma_status odma_arena_class_index(odma_arena *arena, const char name[ODMA_NAME_BYTES],
                                   uint32_t *index);

odma_status odma_arena_histogram(odma_arena *arena, uint32_t class_index,
                                 odma_histogram *histogram);

/* Upper ends of the histogram bins in tokens: the same for every class. */
odma_status odma_arena_bins(odma_arena *arena, uint32_t upper_tokens[ODMA_BINS]);

/* The last completions, oldest first; room for ODMA_RING. Stores in *ever how
 * many there have been, which changes whenever the list does. */
odma_status odma_arena_completions(odma_arena *arena, uint32_t class_index,
                                   odma_completion *completions, uint32_t *count, uint64_t *ever);

/* The running requests of a class in address order, at most `room`, with what
 * they have generated so far. One that the last batch did not list counts with
 * what it had generated before. */
odma_status odma_arena_running(odma_arena *arena, uint32_t class_index,
                               odma_completion *running, uint32_t room, uint32_t *count);

/* Quantiles of the output tokens of a class, given that they are more than
 * `more_than`. Censored completions count by Kaplan-Meier. A class with fewer
 * than ODMA_LEARNT_ENOUGH completions uses the pool's; *weight is what they rest on.
 *
 * Fails     ODMA_NOT_FOUND if fewer are known there as well.
 */
odma_status odma_arena_quantiles(odma_arena *arena, uint32_t class_index, uint32_t more_than,
                                 float quantiles[ODMA_QUANTILES], double *weight);

/* The at most `limit_count` limits, each the upper end of a bin, that waste the
 * fewest tokens if every length in bin i, of weight weights[i] >= 0, takes the
 * smallest limit that holds it, and a limit at bin i that is not the last costs
 * tolls[i] >= 0 more: what outgrows it has to be copied. NULL: no tolls. Exact.
 *
 * Promise   limits[0 .. *found) ascend and the last is upper[bins - 1]; *waste
 *           is the sum of weight x (limit - upper), and of the tolls.
 * Fails     ODMA_INVALID unless upper ascends, 1 <= bins <= 4,096 and
 *           1 <= limit_count <= ODMA_LIMITS.
 * Cost      O(limit_count x bins): about 50 us for 512 bins and 16 limits.
 */
odma_status odma_optimal_limits(const double *weights, const uint32_t *upper, const double *tolls,
                                uint32_t bins, uint32_t limit_count, uint32_t *limits,
                                uint32_t *found, double *waste);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
