/* digest.c - a batch's fingerprint: 128 bits of all that the client sent.
 *
 * Predictions are left out: a retry may have others. Books keep fingerprints, so
 * the same batch must have the same one in every version of a layout.
 */
#include <string.h>

struct digest {
    uint64_t low, high;
};

static void feed(struct digest *digest, uint64_t value) {
    digest->low = stir(digest->low, value);
    digest->high = (digest->high + value) * 0xd6e8feb86659fd93ULL;
    digest->high ^= digest->high >> 32;
}

/* Words up to the first that is all padding. Answers how many bytes those are. */
static size_t feed_name(struct digest *digest, const char *name, size_t bytes) {
    size_t i = 0;
    for (; i < bytes; i += 8) {
        uint64_t word;
        memcpy(&word, name + i, 8);
        if (word == 0) break;
        feed(digest, word);
    }
    return i;
}

/* A number of tokens, all ones where none is given. */
static uint32_t word_of(bool given, uint32_t tokens) {
    return !given ? UINT32_MAX : tokens == UINT32_MAX ? tokens - 1 : tokens;
}

static void feed_allocate(struct digest *digest, const odma_op *op) {
    float accepted = gives_risk(op) ? (float)op->overflow_risk : -1;
    uint32_t risk, max_total = word_of(gives_max_total(op), op->max_total_tokens);
    memcpy(&risk, &accepted, sizeof risk);
    feed(digest, (uint64_t)op->prompt_tokens << 32 | op->generated_tokens);
    feed(digest, (uint64_t)max_total << 32 | op->guess_tokens);
    feed(digest, (uint64_t)risk << 32 | gives_text(op));
    if (gives_text(op)) {
        feed(digest, op->text_digest[0]);
        feed(digest, op->text_digest[1]);
    }
    uint64_t words = feed_name(digest, op->request_id, sizeof op->request_id);
    words = words << 16 | feed_name(digest, op->request_class, sizeof op->request_class);
    words = words << 16 | feed_name(digest, op->tenant, sizeof op->tenant);
    feed(digest, words);
}

/* What is reused and kept; nothing where nothing of it is said. */
static void feed_keys(struct digest *digest, const odma_op *op) {
    if (op->key_bytes == 0 && op->keep_tokens == 0) return;
    feed(digest, (uint64_t)op->keep_tokens << 32 | op->key_bytes);
    if (op->keys == NULL) return;
    for (uint32_t i = 0; i + 8 <= op->key_bytes; i += 8) feed(digest, word_at(op->keys + i));
}

/* Feed an operation's own digest, so that those of several operations are worked
 * out at once. */
static void feed_op(struct digest *digest, const odma_op *op) {
    struct digest own = {.low = (uint64_t)op->kind << 32 | op->end, .high = op->kind};
    if (op->kind == ODMA_OP_ALLOCATE) {
        feed_allocate(&own, op);
    } else {
        feed(&own, op->handle);
        feed(&own, (uint64_t)op->output_tokens << 32 | op->least_tokens);
        feed(&own, op->want_tokens);
    }
    feed_keys(&own, op);
    feed(digest, own.low);
    feed(digest, own.high);
}

/* The digest of a batch before its operations. */
static struct digest digest_of(const odma_batch *batch) {
    struct digest digest = {.low = 1, .high = 2};
    feed(&digest, batch->seq);
    feed(&digest, batch->completed_seq);
    uint32_t max_copy = word_of(gives_max_copy(batch), batch->max_copy_tokens);
    feed(&digest, (uint64_t)max_copy << 32 | (batch->pass_refused != 0));
    feed(&digest, (uint64_t)batch->used_count << 32 | batch->op_count);
    for (uint32_t i = 0; i < batch->used_count; i++) {
        feed(&digest, batch->used[i].handle);
        feed(&digest, (uint64_t)batch->used[i].used_tokens << 32 | (batch->used[i].pinned != 0));
        uint32_t shareable = batch->used[i].shareable_tokens;
        if (shareable > 0) feed(&digest, (uint64_t)1 << 63 | shareable); /* as no handle is */
    }
    return digest;
}
