/* features.c - any bytes as a prompt: what is seen keeps to its bounds.
 *
 * The first byte says how many tokens the prompt has; the rest is the text.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "odma_features.h"

enum { DIMS = 5, ROWS = 100 };

static void insist(int holds) {
    if (!holds) abort();
}

static void check_bounds(const odma_features *seen) {
    size_t count = 0;
    for (int g = 0; g < ODMA_FEATURES_GROUPS; g++) count += seen->counts[g];
    insist(count <= ODMA_FEATURES_IDS);
    for (size_t i = 0; i < count; i++) insist(seen->ids[i] < ODMA_FEATURES_BUCKETS);
    for (int i = 0; i < ODMA_FEATURES_STATS; i++) {
        insist(isfinite(seen->stats[i]) && seen->stats[i] >= 0 && seen->stats[i] < 1600);
    }
}

static void check_pooled(const odma_features *seen) {
    static uint16_t row_of[ODMA_FEATURES_BUCKETS];
    static int8_t rows[ROWS * DIMS];
    const float scales[DIMS] = {1, 1, 1, 1, 1};
    for (unsigned i = 0; i < ODMA_FEATURES_BUCKETS; i++) {
        row_of[i] = i % 3 == 0 ? ODMA_FEATURES_NO_ROW : (uint16_t)(i % ROWS);
    }
    memset(rows, -128, sizeof rows);
    odma_embeddings embeddings = {row_of, rows, scales, ROWS, DIMS};
    float pooled[ODMA_FEATURES_GROUPS * DIMS], known[ODMA_FEATURES_GROUPS];
    insist(odma_features_pool(seen, &embeddings, pooled, known) == ODMA_OK);
    for (int i = 0; i < ODMA_FEATURES_GROUPS * DIMS; i++) {
        insist(pooled[i] == (known[i / DIMS] > 0 ? -128.0f : 0.0f));
    }
    embeddings.row_count = 1; /* rows that are not there */
    odma_status status = odma_features_pool(seen, &embeddings, pooled, known);
    insist(status == ODMA_OK || status == ODMA_INVALID);
    embeddings.dims = ODMA_FEATURES_DIMS + 1;
    insist(odma_features_pool(seen, &embeddings, pooled, known) == ODMA_INVALID);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static odma_features seen, again;
    uint32_t tokens = size > 0 ? data[0] * 16909320u : 0;
    const uint8_t *text = size > 1 ? data + 1 : NULL;
    size_t bytes = size > 1 ? size - 1 : 0;
    insist(odma_features_see(text, bytes, tokens, &seen) == ODMA_OK);
    insist(odma_features_see(text, bytes, tokens, &again) == ODMA_OK);
    insist(memcmp(seen.stats, again.stats, sizeof seen.stats) == 0);
    insist(odma_features_see(NULL, 1, tokens, &again) == ODMA_INVALID);
    check_bounds(&seen);
    check_pooled(&seen);
    return 0;
}
