/* odma_lpddr.h - what reading and writing LPDDR memory costs.
 *
 * Two models of one device. The channel model follows every 32-byte request
 * through a memory controller, command by command, and is checked against the
 * figures of a cycle-level simulator. The estimator is calibrated by it and
 * answers in nanoseconds.
 *
 *     runs -> blocks in flight -> channels -> queues -> banks    odma_lpddr_run()
 *     runs -> a table of run lengths                             odma_estimator_price()
 *
 * A device has some channels, interleaved by address. A run is a piece of
 * device memory that one DMA descriptor moves; so many runs are in flight.
 *
 * Units     Timings count CK cycles of clock_ps picoseconds, results too unless
 *           they are named seconds. A request moves burst_bytes. An address bit
 *           is counted from 0, the lowest bit of a byte address in one channel.
 * Errors    As in odma.h. `reason` reads "field: rule".
 * Memory    odma_lpddr_run() gives back all that it takes before it returns.
 * Threads   Nothing is shared but a finished estimator, which does not change:
 *           any thread may ask it.
 */
#ifndef ODMA_LPDDR_H
#define ODMA_LPDDR_H

#include "odma.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

enum {
    ODMA_LPDDR_BANKS = 64,        /* most banks of a channel */
    ODMA_LPDDR_GROUPS = 16,       /* most bank groups */
    ODMA_LPDDR_BITS = 32,         /* most address bits of one coordinate */
    ODMA_LPDDR_NO_BIT = 255,
    ODMA_LPDDR_QUEUE = 1024,      /* most entries of a queue */
    ODMA_LPDDR_CHANNELS = 256,
    ODMA_LPDDR_WINDOW = 1024,     /* most runs in flight */
    ODMA_LPDDR_MEASURED = 64      /* most points measured on a card */
};

/* Counts of CK, except clock_ps. Each from 1 to 65,536 unless it says 0. */
typedef struct odma_lpddr_timing {
    uint32_t clock_ps;            /* 100 to 100,000 */
    uint32_t read_latency;
    uint32_t write_latency;
    uint32_t burst_min;           /* BL/n_min: data bus of one request */
    uint32_t burst_max;           /* BL/n_max: column array of one request */
    uint32_t rcd;                 /* ACT1 to RD or WR */
    uint32_t rp_pb;               /* PRE of a bank to ACT1 */
    uint32_t rp_ab;               /* PRE of all banks to ACT1 */
    uint32_t ras;                 /* ACT1 to PRE */
    uint32_t rc;                  /* ACT1 to ACT1 of a bank */
    uint32_t wr;                  /* end of write data to PRE */
    uint32_t rtp;                 /* RD to PRE */
    uint32_t ppd;                 /* PRE to PRE */
    uint32_t ccd_s;               /* RD to RD, WR to WR, another bank group */
    uint32_t ccd_l;               /* the same bank group */
    uint32_t rrd_s;               /* ACT1 to ACT1, another bank group */
    uint32_t rrd_l;               /* the same bank group */
    uint32_t faw;                 /* four ACT1 within it at most */
    uint32_t wtr_s;               /* end of write data to RD, another bank group */
    uint32_t wtr_l;               /* the same bank group */
    uint32_t rtw_gap;             /* 0: bus turn-around between RD and WR data */
    uint32_t rfc_ab;
    uint32_t rfc_pb;
    uint32_t refi;                /* between refreshes of all banks */
    uint32_t refi_pb;             /* between refreshes of one bank */
    uint32_t pbr2pbr;             /* REFpb to REFpb */
    uint32_t pbr2act;             /* REFpb to ACT1 of another bank */
    uint32_t aad;                 /* deadline from ACT1 to ACT2 */
    uint32_t wck_post;            /* 0: the data clock runs on after data */
} odma_lpddr_timing;

/* Powers of two. */
typedef struct odma_lpddr_organisation {
    uint32_t bank_groups;         /* 1 to ODMA_LPDDR_GROUPS */
    uint32_t banks_per_group;     /* at most ODMA_LPDDR_BANKS banks in all */
    uint32_t rows;                /* of a bank, 1 to 2^24 */
    uint32_t row_bytes;           /* burst_bytes to 2^16 */
    uint32_t burst_bytes;         /* of one request, 8 to 256 */
} odma_lpddr_organisation;

typedef enum odma_lpddr_scheduler {
    ODMA_LPDDR_FRFCFS = 1,        /* the oldest request whose command is ready */
    ODMA_LPDDR_FRFCFS_ROW_HIT = 2 /* and no row is closed before its older hits */
} odma_lpddr_scheduler;

typedef enum odma_lpddr_refresh {
    ODMA_LPDDR_REFRESH_NONE = 1,
    ODMA_LPDDR_REFRESH_ALL_BANK = 2,
    ODMA_LPDDR_REFRESH_PER_BANK = 3
} odma_lpddr_refresh;

typedef struct odma_lpddr_controller {
    uint32_t scheduler;           /* odma_lpddr_scheduler */
    uint32_t refresh;             /* odma_lpddr_refresh */
    uint32_t read_entries;        /* 1 to ODMA_LPDDR_QUEUE */
    uint32_t write_entries;       /* 1 to ODMA_LPDDR_QUEUE */
    uint32_t accepts;             /* requests a CK, 1 to 64 */
    uint32_t wck_always_on;       /* 0 or 1: no CAS to wake the data clock */
    double write_high;            /* of write_entries: above it writes are drained */
    double write_low;             /* below it reads go on; 0 <= low < high <= 1 */
} odma_lpddr_controller;

/* Which address bit each coordinate bit is, lowest first; ODMA_LPDDR_NO_BIT
 * after the last. Every bit from burst_bytes up to the channel's size is used
 * once. A bank group or bank bit may be XORed with an address bit of the column
 * or row, a row bit with one of the column: two addresses never share a place. */
typedef struct odma_lpddr_mapping {
    uint8_t column[ODMA_LPDDR_BITS];
    uint8_t group[ODMA_LPDDR_BITS];
    uint8_t bank[ODMA_LPDDR_BITS];
    uint8_t row[ODMA_LPDDR_BITS];
    uint8_t group_xor[ODMA_LPDDR_BITS];
    uint8_t bank_xor[ODMA_LPDDR_BITS];
    uint8_t row_xor[ODMA_LPDDR_BITS];
} odma_lpddr_mapping;

typedef struct odma_lpddr_device {
    odma_lpddr_timing timing;
    odma_lpddr_organisation organisation;
    odma_lpddr_controller controller;
    odma_lpddr_mapping mapping;
    uint32_t channels;            /* 1 to ODMA_LPDDR_CHANNELS */
    uint32_t interleave_bytes;    /* a power of two, burst_bytes to 2^30 */
} odma_lpddr_device;

typedef struct odma_run {
    uint64_t offset_bytes;
    uint64_t length_bytes;        /* at least 1 */
} odma_run;

typedef enum odma_lpddr_pattern {
    ODMA_LPDDR_SEQUENTIAL = 1,    /* chunks follow each other */
    ODMA_LPDDR_RANDOM = 2,        /* uniform random multiples of chunk_bytes */
    ODMA_LPDDR_RUNS = 3           /* the runs given, once each, in order */
} odma_lpddr_pattern;

typedef struct odma_lpddr_traffic {
    uint32_t pattern;             /* odma_lpddr_pattern */
    uint32_t window;              /* chunks in flight, 0: the source never runs dry */
    uint32_t descriptor_ck;       /* a serial engine starts one chunk in so many CK */
    uint32_t run_count;           /* RUNS: at least 1 */
    uint64_t chunk_bytes;         /* not RUNS: a multiple of burst_bytes */
    uint64_t requests;            /* not RUNS: measured, 1 to 2^32 */
    uint64_t warmup_requests;     /* before them */
    uint64_t seed;
    double write_fraction;        /* of the chunks, 0 to 1 */
    const odma_run *runs;
} odma_lpddr_traffic;

/* Of the measured requests, summed over the channels. */
typedef struct odma_lpddr_result {
    uint64_t requests;
    uint64_t cycles;
    uint64_t row_hits;            /* requests whose first command was RD or WR */
    uint64_t activates;
    uint64_t reads, writes;
    uint64_t precharges;          /* of one bank */
    uint64_t precharges_all;
    uint64_t refreshes_all;
    uint64_t refreshes_bank;
    uint64_t wck_syncs;           /* CAS */
    double seconds;
    double bytes_per_second;
    double fraction_of_peak;
} odma_lpddr_result;

/* Whether a device can be: ODMA_OK, or ODMA_INVALID with the field in `reason`. */
odma_status odma_lpddr_check(const odma_lpddr_device *device, char reason[ODMA_REASON_BYTES]);

/* Where an address of one channel lies. */
odma_status odma_lpddr_locate(const odma_lpddr_device *device, uint64_t address, uint32_t *group,
                              uint32_t *bank, uint32_t *row, uint32_t *column);

/* Play traffic on a device and count what it does.
 *
 * Promise   The same arguments give the same result on every machine.
 * Fails     ODMA_INVALID; ODMA_NO_SPACE.
 * Cost      0.1 to 0.4 us a request.
 */
odma_status odma_lpddr_run(const odma_lpddr_device *device, const odma_lpddr_traffic *traffic,
                           odma_lpddr_result *result, char reason[ODMA_REASON_BYTES]);

/* What was measured on a card: runs of run_bytes, so many in flight. */
typedef struct odma_lpddr_measured {
    uint64_t run_bytes;           /* at least 1 */
    uint32_t window;              /* 1 to ODMA_LPDDR_WINDOW */
    double bytes_per_second;      /* above 0 */
} odma_lpddr_measured;

typedef struct odma_price {
    double seconds;
    uint64_t activations;
    uint64_t requests;
} odma_price;

typedef struct odma_estimator odma_estimator;

/* Calibrate an estimator by the model of a device; a share of the runs writes.
 * Where figures were measured they win: between and beyond them their ratio to
 * the model is carried on.
 *
 * Fails     ODMA_INVALID; ODMA_NO_SPACE.
 * Cost      Up to about a second for 24 channels.
 */
odma_status odma_estimator_create(const odma_lpddr_device *device, double write_fraction,
                                  const odma_lpddr_measured *measured, uint32_t measured_count,
                                  odma_estimator **estimator, char reason[ODMA_REASON_BYTES]);

/* Give back the memory. NULL is allowed. */
void odma_estimator_close(odma_estimator *estimator);

/* What it costs to move runs with `window` in flight (0: as many as there are),
 * where a serial engine takes descriptor_seconds for each.
 *
 * Fails     ODMA_INVALID for a length of 0, a window above ODMA_LPDDR_WINDOW or
 *           a negative descriptor_seconds. No runs cost nothing.
 * Cost      Constant for each run, under 20 ns.
 */
odma_status odma_estimator_price(const odma_estimator *estimator, const odma_run *runs,
                                 uint32_t count, uint32_t window, double descriptor_seconds,
                                 odma_price *price);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
