// What a call is given, and where its numbers lie.
#pragma once

#include "vectors.h"

// [B, H, n, d]: strides in numbers, the last axis dense
struct Rows { void* data; Index batch, head, row; };

struct Call {
    Rows query, key, value, far_query, far_key, far_value, out;
    float* lse;                  // [B, Hq, n]
    const Index* far_positions;  // [f], and how far the next batch row's are
    Index far_positions_batch;
    const Index* first_valid;  // [B] or null
    Index batch, heads, key_heads, queries, keys, dim, window, far_count, ring_start, threads;
    float scale;

    Index group() const { return heads / key_heads; }
    Index offset() const { return keys - queries; }  // position of the first query
    Index valid(Index b) const { return first_valid ? std::max<Index>(0, first_valid[b]) : 0; }
    // The oldest key that queries [begin, ...) see, at most `stop`
    Index first_key(Index b, Index begin, Index stop) const {
        return std::min(std::max(valid(b), offset() + begin - window + 1), stop);
    }
    const Index* far_of(Index b) const { return far_positions + b * far_positions_batch; }
};

// Of the window's part, all in float32; `shift` is the log-sum-exp, +inf where a query sees nothing, and `correction`
// the sum of dO * O less the gradient of the log-sum-exp, both [B, Hq, n]
struct Gradients {
    Rows out, query, key, value;  // dO, and what is written (query) or added to (key, value)
    const float *shift, *correction;
};

template <class T> static inline T* row_of(const Rows& x, Index b, Index head, Index row) {
    return (T*)x.data + b * x.batch + head * x.head + row * x.row;
}

constexpr Index BLOCK_ROWS = 48, BLOCK_KEYS = 128;  // query rows, and keys, whose scores exist at one time
constexpr Index LEAST_CHUNK = 1024;  // queries that share one packing of their keys, at least

// `worker().chunk(b, key head, begin, end)` for chunks of `size` queries of every key head, shared out among threads
template <class Make> static void for_chunks(const Call& c, Index size, Make worker) {
    Index heads = c.batch * c.key_heads, chunks = (c.queries + size - 1) / size;
#pragma omp parallel num_threads(c.threads)
    {
        auto mine = worker();
#pragma omp for schedule(dynamic, 1)
        for (Index item = 0; item < heads * chunks; item++) {
            Index begin = item % chunks * size, head = item / chunks;
            mine.chunk(head / c.key_heads, head % c.key_heads, begin, std::min(begin + size, c.queries));
        }
    }
}
