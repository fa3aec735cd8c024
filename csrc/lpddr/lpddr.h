/* lpddr.h - what the files of the LPDDR models know of each other.
 *
 *   mapping.c   checking a device; addresses to banks and rows
 *   channel.c   one channel: queues, banks, commands
 *   device.c    channels behind an interleave, and where traffic comes from
 *   estimate.c  the estimator
 */
#ifndef ODMA_LPDDR_ROOM_H
#define ODMA_LPDDR_ROOM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../odma_lpddr.h"

enum { READ = 0, WRITE = 1, KINDS = 2, SEGMENTS = 2 * ODMA_LPDDR_BITS };

static const uint64_t NEVER = UINT64_MAX;

/* Bits of an address that move together into a coordinate. */
struct segment {
    uint32_t shift, mask, to;
};

struct decoder {
    struct segment flat[SEGMENTS]; /* bank group and bank, as one number */
    struct segment row[SEGMENTS];
    uint32_t flat_count, row_count;
};

/* Consecutive requests of one channel. */
struct piece {
    uint64_t address;
    uint32_t requests;
    uint32_t block;               /* whose, for the source */
    uint32_t kind;
};

struct request_queue {
    uint32_t count, entries;
    uint64_t hits, misses;        /* banks that have an oldest hit, an oldest miss */
    uint64_t hit_seq[ODMA_LPDDR_BANKS], miss_seq[ODMA_LPDDR_BANKS];
    uint16_t hit[ODMA_LPDDR_BANKS], miss[ODMA_LPDDR_BANKS];
    uint16_t head[ODMA_LPDDR_BANKS], tail[ODMA_LPDDR_BANKS];
};

struct waiting {
    uint64_t seq;
    uint32_t row, block;
    uint16_t older, newer;        /* of the same bank and kind */
    uint8_t bank, kind;
    bool touched;                 /* a PRE or ACT1 was issued for it */
};

struct channel {
    const odma_lpddr_device *device;
    const struct decoder *decoder;
    uint32_t group_shift;

    struct piece *pieces;         /* a ring of what the source gave */
    uint32_t piece_room, piece_first, piece_count;
    uint64_t filled_at;
    uint64_t seq;

    struct waiting slots[2 * ODMA_LPDDR_QUEUE + ODMA_LPDDR_BANKS + 2];
    uint16_t free_slot;           /* chained by `newer` */
    struct request_queue queues[KINDS];
    bool draining;                /* writes */

    uint64_t open;                /* banks with an open row */
    uint64_t active;              /* of these, with a request that opened it */
    uint32_t row[ODMA_LPDDR_BANKS];
    uint16_t opener[ODMA_LPDDR_BANKS];
    uint32_t activating;          /* bank between ACT1 and ACT2 */
    uint64_t act2_deadline;

    /* The first cycle at which timing allows a command. */
    uint64_t cas_at[ODMA_LPDDR_BANKS], pre_at[ODMA_LPDDR_BANKS];
    uint64_t act_at[ODMA_LPDDR_BANKS], ref_at[ODMA_LPDDR_BANKS];
    uint64_t group_act_at[ODMA_LPDDR_GROUPS], group_cas_at[KINDS][ODMA_LPDDR_GROUPS];
    uint64_t rank_act_at, rank_cas_at[KINDS], rank_pre_at, all_pre_at, all_ref_at, bank_ref_at;
    uint64_t last_acts[4];
    uint32_t oldest_act;

    uint64_t refresh_at;          /* when the next one falls due */
    uint32_t refreshes_due;
    uint32_t refresh_bank;
    uint64_t wck_until;

    odma_lpddr_result counts;
    uint32_t done_block;          /* what the last step finished, NONE_DONE if nothing */
    uint64_t done_at;
};

static const uint32_t NONE_DONE = UINT32_MAX;

#endif
