/* odma_features.h - what a length predictor sees of a prompt.
 *
 *     text -> head and tail -> words -> ids in three groups -> pooled embeddings
 *                           -> statistics
 *
 * A model is trained on what these functions give and served with it, so what
 * they give may never change: another way of seeing a prompt is another
 * ODMA_FEATURES_VERSION. tests/test_features.py holds golden values.
 *
 * Text      Any bytes; UTF-8 is expected, and what is not UTF-8 is taken for
 *           letters. Of a long text the first ODMA_FEATURES_HEAD and the last
 *           ODMA_FEATURES_TAIL bytes are seen. Nothing is kept.
 * Errors    As in odma.h.
 * Memory    None is taken.
 * Threads   Nothing is shared: any thread may call.
 */
#ifndef ODMA_FEATURES_H
#define ODMA_FEATURES_H

#include "odma.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

enum {
    ODMA_FEATURES_VERSION = 1,
    ODMA_FEATURES_BUCKETS = 32768,  /* ids are below it */
    ODMA_FEATURES_GROUPS = 3,       /* words, pairs of words, pieces of words */
    ODMA_FEATURES_STATS = 51,
    ODMA_FEATURES_HEAD = 1024,      /* bytes */
    ODMA_FEATURES_TAIL = 512,
    ODMA_FEATURES_IDS = 6400,       /* most ids of a prompt */
    ODMA_FEATURES_DIMS = 64,        /* most numbers of an embedding */
    ODMA_FEATURES_NO_ROW = 65535
};

/* A prompt as ids, the groups behind each other, and statistics. */
typedef struct odma_features {
    uint32_t counts[ODMA_FEATURES_GROUPS];
    float stats[ODMA_FEATURES_STATS];
    uint16_t ids[ODMA_FEATURES_IDS];
} odma_features;

/* Embeddings of the ids that a model knows. */
typedef struct odma_embeddings {
    const uint16_t *row_of;         /* ODMA_FEATURES_BUCKETS: its row, or NO_ROW */
    const int8_t *rows;             /* row_count x dims */
    const float *scales;            /* dims: what 1 in a row stands for */
    uint32_t row_count;             /* below ODMA_FEATURES_NO_ROW */
    uint32_t dims;                  /* 1 to ODMA_FEATURES_DIMS */
} odma_embeddings;

/* See a prompt. Only the first sum(counts) ids are written.
 *
 * Fails     ODMA_INVALID if text is NULL and bytes is not 0.
 * Cost      About 20 us for a text that is cut, less for others.
 */
odma_status odma_features_see(const uint8_t *text, size_t bytes, uint32_t prompt_tokens,
                              odma_features *features);

/* The mean embedding of each group, GROUPS x dims, and the share of each group's
 * ids that the model knows. A group without any that it knows is zeros.
 *
 * Fails     ODMA_INVALID for a row or a count out of its bounds.
 */
odma_status odma_features_pool(const odma_features *features, const odma_embeddings *embeddings,
                               float *pooled, float known[ODMA_FEATURES_GROUPS]);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
