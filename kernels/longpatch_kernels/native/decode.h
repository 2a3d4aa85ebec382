// Few queries over a cache. Keys and values are read once, a few rows of queries beside each other: a long stretch of
// keys, then the values of that stretch, so that the processor guesses what is read next.
#pragma once

#include <vector>

#include "call.h"
#include "softmax.h"

constexpr Index STEP_KEYS = 32;  // multiplied while as many are asked for
constexpr Index STAGE_KEYS = 2048, STAGE_ROW = STAGE_KEYS + 16;  // whose softmax is taken at once

// Sums of the lanes of four vectors
static inline void sums_of(Vec a, Vec b, Vec c, Vec d, float* to) {
    Vec u = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
            __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    Vec w = __builtin_shufflevector(c, d, 0, 8, 2, 10, 4, 12, 6, 14) +
            __builtin_shufflevector(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    Vec x = __builtin_shufflevector(u, w, 0, 1, 8, 9, 4, 5, 12, 13) +
            __builtin_shufflevector(u, w, 2, 3, 10, 11, 6, 7, 14, 15);
    Quad low = __builtin_shufflevector(x, x, 0, 1, 2, 3), high = __builtin_shufflevector(x, x, 4, 5, 6, 7);
    *(Quad*)to = low + high;
}

// R rows [dim] times four keys [dim]: to [R, 4], its rows STAGE_ROW apart
template <int R, class T> static inline void dots(
    const float* rows, Index dim, const T* const* keys, float* to, Ahead& next) {
    Vec sums[R][4];
    const T *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[r][i] = Vec{};
    constexpr int PARTS = sizeof(float) / sizeof(T);
#pragma GCC unroll 2
    for (Index d = 0; d < dim; d += PARTS * LANES) {
        next.fetch(4 * sizeof(Vec));
        Vec a[PARTS], b[PARTS], c[PARTS], e[PARTS];
        take(k0 + d, a), take(k1 + d, b), take(k2 + d, c), take(k3 + d, e);
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++)
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                Vec x = load(rows + r * dim + d + part * LANES);
                sums[r][0] += x * a[part], sums[r][1] += x * b[part], sums[r][2] += x * c[part], sums[r][3] += x * e[part];
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3], to + r * STAGE_ROW);
}

// Queries of one group against a share of the keys, read where they lie
template <class T> struct Decode {
    const Call& c;
    Index rows;  // group x queries: row r is query r % n of the group's head r / n
    std::vector<float> query, far_query, scores;
    std::vector<Index> begins, ends;  // of the scores that are seen in this stage, row by row

    explicit Decode(const Call& call) : c(call), rows(call.group() * call.queries) {
        query.resize(rows * c.dim);
        far_query.resize(rows * c.dim);
        scores.resize(rows * STAGE_ROW);
        begins.resize(rows);
        ends.resize(rows);
    }

    Index position(Index r) const { return c.offset() + r % c.queries; }

    // One row of float32 computes too little to hide requests behind: they took 10 % longer than none
    Ahead ahead(const T* next) const { return {rows == 1 && sizeof(T) == sizeof(float) ? nullptr : (const char*)next}; }

    void gather(const Rows& from, Index b, Index key_head, float* to) const {
        for (Index r = 0; r < rows; r++)
            scaled(row_of<T>(from, b, key_head * c.group() + r / c.queries, r % c.queries), c.dim, c.scale, to + r * c.dim);
    }

    // Scores of `count` keys, from score `first` on
    void multiply(const float* from, const T* key, Index stride, Index count, Index first, Ahead next) {
        for (Index j = 0; j < count; j += 4) {
            Ahead nothing{nullptr};
            const T* k[4];
            for (Index i = 0; i < 4; i++) k[i] = key + std::min(j + i, count - 1) * stride;
            for (Index r = 0; r < rows;) {
                Index left = rows - r, taken = left == 3 || left > 4 ? 3 : std::min<Index>(left, 2);
                if (MANY_REGISTERS && left >= 4 && left != 6) taken = 4;
                float* to = scores.data() + r * STAGE_ROW + first + j;
                if constexpr (MANY_REGISTERS)
                    if (taken == 4) dots<4>(from + r * c.dim, c.dim, k, to, r ? nothing : next);
                if (taken == 3) dots<3>(from + r * c.dim, c.dim, k, to, r ? nothing : next);
                if (taken == 2) dots<2>(from + r * c.dim, c.dim, k, to, r ? nothing : next);
                if (taken == 1) dots<1>(from + r * c.dim, c.dim, k, to, r ? nothing : next);
                r += taken;
            }
        }
    }

    // Keys at positions [begin, end); with `far` the far keys as well
    void share(Index b, Index key_head, Index begin, Index end, bool far, Softmax& state) {
        state.clear(rows);
        Index oldest = std::max(c.valid(b), c.offset() - c.window + 1);
        auto slot_of = [&](Index at) { return at + c.ring_start < c.keys ? at + c.ring_start : at + c.ring_start - c.keys; };
        auto key_at = [&](Index slot) { return row_of<T>(c.key, b, key_head, slot); };
        auto value_at = [&](Index slot) { return row_of<T>(c.value, b, key_head, slot); };
        Ahead first = ahead(key_at(slot_of(std::max(begin, oldest))));
        if (far && c.far_count) {
            gather(c.far_query, b, key_head, far_query.data());
            for (Index start = 0; start < c.far_count; start += STEP_KEYS) {
                Index count = std::min(STEP_KEYS, c.far_count - start);
                multiply(far_query.data(), row_of<T>(c.far_key, b, key_head, start), c.far_key.row, count, 0, first);
                for (Index r = 0; r < rows; r++) {
                    float* line = scores.data() + r * STAGE_ROW;
                    for (Index j = 0; j < count; j++)
                        if (position(r) - c.far_of(b)[start + j] < c.window) line[j] = NONE;
                    state.absorb(r, line, 0, 0, count, count);
                }
                const T* values = row_of<T>(c.far_value, b, key_head, start);
                multiply_rows(rows, scores.data(), STAGE_ROW, values, c.far_value.row, count, state.out, c.dim);
            }
        }
        gather(c.query, b, key_head, query.data());
        for (Index start = std::max(begin, oldest); start < end;) {
            Index slot = slot_of(start);
            Index count = std::min(std::min(STAGE_KEYS, end - start), c.keys - slot);
            for (Index j = 0; j < count; j += STEP_KEYS) {
                Index some = std::min(STEP_KEYS, count - j);
                bool last = j + some == count;
                Ahead next = ahead(last ? value_at(slot) : key_at(slot + j + some));
                multiply(query.data(), key_at(slot + j), c.key.row, some, j, next);
            }
            for (Index r = 0; r < rows; r++) {
                Index from = std::max(oldest, position(r) - c.window + 1) - start, to = position(r) + 1 - start;
                from = std::min(std::max<Index>(from, 0), count);
                to = std::min(to, count);
                bool seen = state.raise(r, scores.data() + r * STAGE_ROW, 0, from, to, count);
                begins[r] = seen ? from : 0, ends[r] = seen ? to : 0;
            }
            for (Index j = 0; j < count; j += STEP_KEYS) {
                Index some = std::min(STEP_KEYS, count - j);
                bool last = j + some == count;
                Ahead next = ahead(last ? key_at(slot_of(start + count)) : value_at(slot + j + some));
                for (Index r = 0; r < rows; r++)  // a little at a time, while values are on their way
                    state.weigh(r, scores.data() + r * STAGE_ROW, std::max(begins[r], j), std::min(ends[r], j + some));
                multiply_rows(rows, scores.data() + j, STAGE_ROW, value_at(slot + j), c.value.row, some, state.out, c.dim,
                              &next);
            }
            start += count;
        }
    }
};

template <class T> static void decode(const Call& c) {
    Index heads = c.batch * c.key_heads, rows = c.group() * c.queries, numbers = rows * (c.dim + 2);
    Index splits = heads >= 4 * c.threads ? 1 : std::min((c.keys + 511) / 512, 4 * c.threads);
    Index size = (c.keys + splits - 1) / splits;
    std::vector<float> results(heads * splits * numbers);
    auto state = [&](Index item) {
        float* start = results.data() + item * numbers;
        return Softmax{c.dim, start, start + rows * c.dim, start + rows * (c.dim + 1)};
    };
#pragma omp parallel num_threads(c.threads)
    {
        Decode<T> worker(c);
#pragma omp for schedule(dynamic, 1)
        for (Index item = 0; item < heads * splits; item++) {
            Index head = item / splits, split = item % splits;
            Softmax part = state(item);
            worker.share(head / c.key_heads, head % c.key_heads, split * size, std::min((split + 1) * size, c.keys),
                         split == 0, part);
        }
    }
    for (Index head = 0; head < heads; head++)
        for (Index r = 0; r < rows; r++) {
            Softmax whole = state(head * splits);
            for (Index split = 1; split < splits; split++) {
                Softmax part = state(head * splits + split);
                float most = std::max(whole.largest[r], part.largest[r]);
                if (part.total[r] == 0) continue;
                float left = std::exp2(whole.largest[r] - most), right = std::exp2(part.largest[r] - most);
                for (Index d = r * c.dim; d < (r + 1) * c.dim; d++) whole.out[d] = whole.out[d] * left + part.out[d] * right;
                whole.total[r] = whole.total[r] * left + part.total[r] * right;
                whole.largest[r] = most;
            }
            Index b = head / c.key_heads, query_head = head % c.key_heads * c.group() + r / c.queries, q = r % c.queries;
            whole.finish(r, row_of<T>(c.out, b, query_head, q), c.lse + (b * c.heads + query_head) * c.queries + q);
        }
}
