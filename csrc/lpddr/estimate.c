/* estimate.c - a price for each run, from a table that the device model fills.
 *
 * The table has a column for every length of a power of two of requests and a
 * row for every power of two of runs in flight: seconds and activations of a
 * run in the steady state. Lengths between two columns are interpolated, long
 * ones go on at the rate of a stream and open a row for every row_bytes; windows
 * are interpolated in their logarithm. Once the bytes in flight fill every
 * channel's queue many times, more of them change nothing, and the row is that
 * of a source that never runs dry.
 *
 * Refreshes are rare, so a short run sees none or too many. The table is filled
 * without them; what they add is measured apart, on one channel, for each length.
 *
 * A list costs the sum over its runs; at least what one of them costs alone;
 * and at least the engine's time for the descriptors, which come one by one.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    PLAYED = 14,                  /* 1 to 2^13 requests: the columns that are played */
    LENGTHS = 20,                 /* the rest go on from there at the rate of a stream */
    WINDOWS = 11,                 /* 1 to 2^10 runs, the last: never dry */
    FILLED_BYTES = 8192,          /* in flight in a channel, to call it filled */
    LEAST_REQUESTS = 8000,
    ROUNDS = 6,
    DRY_ROUNDS = 32,              /* of what fills the queues, until their load has settled */
    REFRESH_REQUESTS = 20000,     /* of one channel: a dozen refreshes of all banks */
    SEED = 12345
};

struct price_cell {
    double seconds, activations;  /* of one run */
};

struct odma_estimator {
    uint32_t burst_shift;
    struct price_cell stream;     /* of one request more where a run goes on and on */
    struct price_cell cells[WINDOWS][LENGTHS];
};

static odma_status fill_cell(const odma_lpddr_device *device, odma_lpddr_traffic traffic,
                             uint32_t length, struct price_cell *cell, char *reason) {
    odma_lpddr_result result;
    traffic.pattern = ODMA_LPDDR_RANDOM;
    traffic.chunk_bytes = (uint64_t)device->organisation.burst_bytes << length;
    traffic.warmup_requests = traffic.requests / ROUNDS;
    traffic.seed = SEED;
    odma_status status = odma_lpddr_run(device, &traffic, &result, reason);
    if (status != ODMA_OK) return status;
    double runs = ldexp((double)result.requests, -(int)length);
    *cell = (struct price_cell){result.seconds / runs, (double)result.activates / runs};
    return ODMA_OK;
}

static uint64_t most(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* What refresh adds to runs of a length, in one channel: factors. */
static odma_status refresh_factor(const odma_lpddr_device *device, double write_fraction,
                                  uint32_t length, struct price_cell *factor, char *reason) {
    odma_lpddr_device one = *device;
    one.channels = 1;
    odma_lpddr_traffic traffic = {.write_fraction = write_fraction,
                                  .requests = REFRESH_REQUESTS};
    struct price_cell with, without;
    odma_status status = fill_cell(&one, traffic, length, &with, reason);
    one.controller.refresh = ODMA_LPDDR_REFRESH_NONE;
    if (status == ODMA_OK) status = fill_cell(&one, traffic, length, &without, reason);
    if (status != ODMA_OK) return status;
    *factor =
        (struct price_cell){with.seconds / without.seconds, with.activations / without.activations};
    return ODMA_OK;
}

/* Fill the column of a length. */
static odma_status calibrate(odma_estimator *estimator, const odma_lpddr_device *device,
                             double write_fraction, uint32_t length, char *reason) {
    uint64_t filled = (uint64_t)device->channels * FILLED_BYTES >> estimator->burst_shift;
    odma_lpddr_device still = *device;
    still.controller.refresh = ODMA_LPDDR_REFRESH_NONE;
    odma_lpddr_traffic traffic = {
        .write_fraction = write_fraction,
        .requests = most(LEAST_REQUESTS + DRY_ROUNDS * filled, (uint64_t)ROUNDS << length)};
    struct price_cell factor, dry;
    odma_status status = refresh_factor(device, write_fraction, length, &factor, reason);
    if (status == ODMA_OK) status = fill_cell(&still, traffic, length, &dry, reason);
    for (uint32_t row = 0; row < WINDOWS && status == ODMA_OK; row++) {
        struct price_cell *cell = &estimator->cells[row][length];
        *cell = dry;
        bool is_filled = row > 0 && (uint64_t)1 << (row + length) > filled;
        traffic.window = 1U << row;
        traffic.requests = most(LEAST_REQUESTS, (uint64_t)ROUNDS << (row + length));
        if (row + 1 < WINDOWS && !is_filled)
            status = fill_cell(&still, traffic, length, cell, reason);
        cell->seconds *= factor.seconds;
        cell->activations *= factor.activations;
    }
    return status;
}

/* Fill the columns that are too long to be played. */
static void go_on(odma_estimator *estimator, const odma_lpddr_device *device) {
    const struct price_cell *longest = &estimator->cells[WINDOWS - 1][PLAYED - 1];
    struct price_cell *stream = &estimator->stream;
    stream->seconds = ldexp(longest->seconds, 1 - PLAYED);
    stream->activations =
        (double)device->organisation.burst_bytes / device->organisation.row_bytes;
    for (uint32_t row = 0; row < WINDOWS; row++) {
        const struct price_cell *last = &estimator->cells[row][PLAYED - 1];
        for (uint32_t length = PLAYED; length < LENGTHS; length++) {
            double more = (1 << length) - (1 << (PLAYED - 1));
            estimator->cells[row][length] =
                (struct price_cell){last->seconds + more * stream->seconds,
                              last->activations + more * stream->activations};
        }
    }
}

/* One row for a window, which lies between two of the table. */
static void row_for(const odma_estimator *estimator, uint32_t window,
                    struct price_cell row[LENGTHS]) {
    double place = log2(window);
    uint32_t low = (uint32_t)place;
    if (low > WINDOWS - 1) low = WINDOWS - 1;
    uint32_t high = low + 1 < WINDOWS ? low + 1 : low;
    double part = high > low ? place - low : 0;
    for (uint32_t i = 0; i < LENGTHS; i++) {
        const struct price_cell *a = &estimator->cells[low][i], *b = &estimator->cells[high][i];
        row[i].seconds = a->seconds + part * (b->seconds - a->seconds);
        row[i].activations = a->activations + part * (b->activations - a->activations);
    }
}

static inline struct price_cell cell_for(const odma_estimator *estimator,
                                   const struct price_cell row[LENGTHS], uint64_t requests) {
    uint32_t low = 63 - (uint32_t)__builtin_clzll(requests);
    if (low > LENGTHS - 2) {
        const struct price_cell *last = &row[LENGTHS - 1];
        double known = 1 << (LENGTHS - 1), more = (double)requests - known;
        return (struct price_cell){last->seconds + more * estimator->stream.seconds,
                             last->activations + more * estimator->stream.activations};
    }
    double base = (double)((uint64_t)1 << low);
    double part = ((double)requests - base) / base;
    return (struct price_cell){
        row[low].seconds + part * (row[low + 1].seconds - row[low].seconds),
        row[low].activations + part * (row[low + 1].activations - row[low].activations)};
}

/* --- what was measured --- */

/* The ratio of measurement to model at a length, from the points whose window
 * is nearest; linear between two of them in the logarithm of the length. */
static double measured_ratio(const odma_lpddr_measured *points, const double *ratios,
                             uint32_t count, double window, double bytes) {
    double nearest = INFINITY;
    for (uint32_t i = 0; i < count; i++)
        nearest = fmin(nearest, fabs(log2(points[i].window) - log2(window)));
    double below = -INFINITY, above = INFINITY, low = 1, high = 1;
    for (uint32_t i = 0; i < count; i++) {
        if (fabs(log2(points[i].window) - log2(window)) > nearest) continue;
        double away = log2((double)points[i].run_bytes) - log2(bytes);
        if (away <= 0 && away >= below) {
            below = away;
            low = ratios[i];
        }
        if (away >= 0 && away <= above) {
            above = away;
            high = ratios[i];
        }
    }
    if (isinf(below)) return high;
    if (isinf(above)) return low;
    return above > below ? low + (high - low) * -below / (above - below) : low;
}

static odma_status correct(odma_estimator *estimator, const odma_lpddr_measured *points,
                           uint32_t count, char *reason) {
    double ratios[ODMA_LPDDR_MEASURED];
    if (count > ODMA_LPDDR_MEASURED || (count > 0 && points == NULL))
        return refuse(reason, ODMA_INVALID, "measured: at most %d points", ODMA_LPDDR_MEASURED);
    for (uint32_t i = 0; i < count; i++) {
        const odma_lpddr_measured *point = &points[i];
        if (point->run_bytes < 1 || point->run_bytes > (uint64_t)1 << 40 || point->window < 1 ||
            point->window > ODMA_LPDDR_WINDOW ||
            !(point->bytes_per_second >= 1 && point->bytes_per_second <= 1e15))
            return refuse(reason, ODMA_INVALID,
                          "measured[%u]: run_bytes, window and bytes_per_second in range", i);
        struct price_cell row[LENGTHS];
        row_for(estimator, point->window, row);
        uint64_t requests = ((point->run_bytes - 1) >> estimator->burst_shift) + 1;
        double seconds = (double)point->run_bytes / point->bytes_per_second;
        ratios[i] = seconds / cell_for(estimator, row, requests).seconds;
    }
    for (uint32_t row = 0; row < WINDOWS && count > 0; row++)
        for (uint32_t length = 0; length < LENGTHS; length++)
            estimator->cells[row][length].seconds *=
                measured_ratio(points, ratios, count, ldexp(1, (int)row),
                               ldexp(1, (int)(length + estimator->burst_shift)));
    if (count > 0)
        estimator->stream.seconds *=
            measured_ratio(points, ratios, count, ODMA_LPDDR_WINDOW,
                           ldexp(1, (int)(LENGTHS - 1 + estimator->burst_shift)));
    return ODMA_OK;
}

/* --- the doors --- */

odma_status odma_estimator_create(const odma_lpddr_device *device, double write_fraction,
                                  const odma_lpddr_measured *measured, uint32_t measured_count,
                                  odma_estimator **estimator, char reason[ODMA_REASON_BYTES]) {
    if (estimator == NULL) return refuse(reason, ODMA_INVALID, "estimator: missing");
    odma_status status = odma_lpddr_check(device, reason);
    if (status != ODMA_OK) return status;
    if (channel_bytes(&device->organisation) * device->channels <
        (uint64_t)device->organisation.burst_bytes << PLAYED)
        return refuse(reason, ODMA_INVALID,
                      "organisation.rows: too small a device to calibrate by");
    odma_estimator *made = calloc(1, sizeof *made);
    if (made == NULL) {
        refuse(reason, ODMA_INVALID, "memory: not enough");
        return ODMA_NO_SPACE;
    }
    made->burst_shift = log2_of(device->organisation.burst_bytes);
    for (uint32_t length = 0; length < PLAYED && status == ODMA_OK; length++)
        status = calibrate(made, device, write_fraction, length, reason);
    go_on(made, device);
    if (status == ODMA_OK) status = correct(made, measured, measured_count, reason);
    if (status != ODMA_OK) {
        free(made);
        return status;
    }
    *estimator = made;
    return ODMA_OK;
}

void odma_estimator_close(odma_estimator *estimator) { free(estimator); }

odma_status odma_estimator_price(const odma_estimator *estimator, const odma_run *runs,
                                 uint32_t count, uint32_t window, double descriptor_seconds,
                                 odma_price *price) {
    if (estimator == NULL || price == NULL || (runs == NULL && count > 0) ||
        window > ODMA_LPDDR_WINDOW || !(descriptor_seconds >= 0 && descriptor_seconds <= 1))
        return ODMA_INVALID;
    if (count == 0) {
        memset(price, 0, sizeof *price);
        return ODMA_OK;
    }
    if (window == 0) window = ODMA_LPDDR_WINDOW;
    if (window > count) window = count;
    struct price_cell row[LENGTHS];
    row_for(estimator, window, row);
    double seconds = 0, activations = 0, least = window == 1 ? descriptor_seconds : 0;
    uint64_t requests = 0, longest = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (runs[i].length_bytes == 0 || runs[i].offset_bytes > UINT64_MAX - runs[i].length_bytes)
            return ODMA_INVALID;
        uint64_t first = runs[i].offset_bytes >> estimator->burst_shift;
        uint64_t last = (runs[i].offset_bytes + runs[i].length_bytes - 1) >> estimator->burst_shift;
        uint64_t length = last - first + 1;
        struct price_cell cell = cell_for(estimator, row, length);
        seconds += cell.seconds > least ? cell.seconds : least;
        activations += cell.activations;
        requests += length;
        if (length > longest) longest = length;
    }
    double alone = cell_for(estimator, estimator->cells[0], longest).seconds;
    double serial = (count - 1) * descriptor_seconds + alone;
    price->seconds = seconds > serial ? seconds : serial;
    price->activations = (uint64_t)llround(activations);
    price->requests = requests;
    return ODMA_OK;
}
