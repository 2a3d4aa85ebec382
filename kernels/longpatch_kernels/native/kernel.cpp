// Λ-attention on a CPU: one online softmax over the far keys and the window, in 8-wide vectors of any instruction set.
//
// Prefill packs the keys of a chunk of queries into panels of 16, transposed; blocks of 48 query rows then walk their
// keys, and each 6 x 16 tile of either product stays in registers. Tiles that no row of theirs sees are not computed.
// Decode reads keys and values once, a few rows of queries beside each other: a long stretch of keys, then the values of
// that stretch, so that the processor guesses what is read next. Scores are in units of log2.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

using Index = int64_t;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
struct BFloat16 { uint16_t bits; };

constexpr Index LANES = 8, PANEL = 2 * LANES, TILE_ROWS = 6, BLOCK_ROWS = 48, BLOCK_KEYS = 128;
constexpr Index STEP_KEYS = 32, STAGE_KEYS = 2048, STAGE_ROW = STAGE_KEYS + 16;  // of decode: converted and multiplied at once; softmax at once
constexpr Index LEAST_CHUNK = 1024;  // queries that share one packing of their keys, at least,
constexpr Index SMALLEST_CHUNK = 5 * BLOCK_ROWS;  // unless many threads share few heads
constexpr float NONE = -std::numeric_limits<float>::infinity();

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
    const Index* far_of(Index b) const { return far_positions + b * far_positions_batch; }
};

// Of the window's part, all in float32; `shift` is the log-sum-exp, +inf where a query sees nothing, and `correction`
// the sum of dO * O less the gradient of the log-sum-exp, both [B, Hq, n]
struct Gradients {
    Rows out, query, key, value;  // dO, and what is written (query) or added to (key, value)
    const float *shift, *correction;
};

static inline Vec load(const float* p) { return *(const Vec*)p; }
static inline void store(float* p, Vec x) { *(Vec*)p = x; }

// Sixteen numbers as two vectors. Those of bfloat16 come as the even ones and the odd ones, two instructions: an order of
// the dimensions that every product keeps, and `put` undoes.
static inline void take(const float* p, Vec& a, Vec& b) { a = load(p), b = load(p + LANES); }
static inline void put(float* p, Vec a, Vec b) { store(p, a), store(p + LANES, b); }
static inline void take(const BFloat16* p, Vec& a, Vec& b) {
    WordVec pairs = *(const WordVec*)p;
    a = (Vec)(pairs << 16), b = (Vec)(pairs & 0xffff0000u);
}
static inline WordVec rounded(Vec x) {  // to the nearest bfloat16, ties to even
    WordVec bits = (WordVec)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}
static inline void put(BFloat16* p, Vec a, Vec b) { *(WordVec*)p = (rounded(a) >> 16) | (rounded(b) & 0xffff0000u); }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // `b` where either is NaN

template <class T> static inline T* row_of(const Rows& x, Index b, Index head, Index row) {
    return (T*)x.data + b * x.batch + head * x.head + row * x.row;
}

// 2^x for x <= 0, 0 from 2^-126 down, NaN for NaN; relative error 2e-7
static inline Vec exp2(Vec x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Vec limited = larger(Vec{} - 126.0f, x);
    Vec shifted = limited + magic, rest = limited - (shifted - magic);
    Vec y = rest * 1.5403530e-4f + 1.3333558e-3f;
    y = y * rest + 9.6181291e-3f;
    y = y * rest + 5.5504109e-2f;
    y = y * rest + 2.4022651e-1f;
    y = y * rest + 6.9314718e-1f;
    y = y * rest + 1.0f;
    y = (Vec)((IntVec)y + ((IntVec)shifted << 23));
    return x < -126.0f ? Vec{} : y;
}

// Memory that is read next, from rows that mostly lie one behind the other: asked for a little at a time, in order, so
// that it comes while this is being computed
struct Ahead {
    const char* data;  // null: the processor's own guess does as well

    void fetch(Index bytes) {
        if (!data) return;
        for (Index at = 0; at < bytes; at += 64) __builtin_prefetch(data + at);
        data += bytes;
    }
};

// C [M, 8 V] (+)= A [M, count] B [count, 8 V]; the numbers of a row of A lie `STEP` apart
template <int M, int V, Index STEP = 1> static inline void tile(
    const float* a, Index a_row, const float* b, Index b_row, Index count, float* c, Index c_row, bool add,
    Ahead* ahead = nullptr, Index size = 0) {
    Vec sums[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sums[m][v] = add ? load(c + m * c_row + v * LANES) : Vec{};
#pragma GCC unroll 2
    for (Index k = 0; k < count; k++) {
        if (ahead) ahead->fetch(V * LANES * size);
        Vec right[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) right[v] = load(b + k * b_row + v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) sums[m][v] += a[m * a_row + k * STEP] * right[v];
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) store(c + m * c_row + v * LANES, sums[m][v]);
}

// Adds to C [rows, dim] the product A [rows, count] B [count, dim], for few rows
static void multiply_rows(
    Index rows, const float* a, Index a_row, const float* b, Index b_row, Index count, float* c, Index dim,
    Ahead* ahead = nullptr, Index size = 0) {
    for (Index r = 0; r < rows;) {
        Index left = rows - r, taken = left >= 6 ? 6 : left >= 4 ? 4 : left;
        const float* from = a + r * a_row;
        for (Index d = 0; d < dim;) {
            float* to = c + r * dim + d;
            Ahead* next = r ? nullptr : ahead;
            if (taken == 1 && dim - d >= 64) { tile<1, 8>(from, a_row, b + d, b_row, count, to, dim, true, next, size); d += 64; continue; }
            if (taken == 6) tile<6, 2>(from, a_row, b + d, b_row, count, to, dim, true, next, size);
            if (taken == 4) tile<4, 2>(from, a_row, b + d, b_row, count, to, dim, true, next, size);
            if (taken == 3) tile<3, 2>(from, a_row, b + d, b_row, count, to, dim, true, next, size);
            if (taken == 2) tile<2, 2>(from, a_row, b + d, b_row, count, to, dim, true, next, size);
            if (taken == 1) tile<1, 2>(from, a_row, b + d, b_row, count, to, dim, true, next, size);
            d += PANEL;
        }
        r += taken;
    }
}

// A block of query rows on its way through the keys
struct Softmax {
    Index dim;
    float *out, *largest, *total;  // [rows, dim], [rows], [rows]

    void clear(Index rows) {
        std::fill(out, out + rows * dim, 0.0f);
        std::fill(largest, largest + rows, NONE);
        std::fill(total, total + rows, 0.0f);
    }

    // Scores [begin, end) of one row become weights; the rest of [first, last) becomes 0
    void absorb(Index row, float* scores, Index first, Index begin, Index end, Index last) {
        if (begin >= end) {
            std::fill(scores + first, scores + last, 0.0f);
            return;
        }
        Index down = begin / LANES * LANES, up = (end + LANES - 1) / LANES * LANES;
        std::fill(scores + down, scores + begin, NONE);
        std::fill(scores + end, scores + up, NONE);
        Vec most = load(scores + down);
        for (Index j = down + LANES; j < up; j += LANES) most = larger(most, load(scores + j));
        float now = largest[row];
        for (Index lane = 0; lane < LANES; lane++) now = std::max(now, most[lane]);
        if (now == NONE) {  // nothing is seen, or nothing but NaN, which a maximum leaves out
            if (std::any_of(scores + begin, scores + end, [](float score) { return std::isnan(score); }))
                total[row] = std::numeric_limits<float>::quiet_NaN();
            std::fill(scores + first, scores + last, 0.0f);
            return;
        }
        if (now > largest[row]) {
            float decay = std::exp2(largest[row] - now);
            for (Index d = 0; d < dim; d += LANES) store(out + row * dim + d, load(out + row * dim + d) * decay);
            total[row] *= decay;
            largest[row] = now;
        }
        Vec sum = {};
        for (Index j = down; j < up; j += LANES) {
            Vec weight = exp2(load(scores + j) - now);
            store(scores + j, weight);
            sum += weight;
        }
        for (Index lane = 0; lane < LANES; lane++) total[row] += sum[lane];
        if (first < down) std::fill(scores + first, scores + down, 0.0f);
        if (up < last) std::fill(scores + up, scores + last, 0.0f);
    }

    template <class T> void finish(Index row, T* to, float* lse) const {
        float weight = total[row] == 0 ? 0.0f : 1 / total[row];
        const float* from = out + row * dim;
        for (Index d = 0; d < dim; d += PANEL) put(to + d, load(from + d) * weight, load(from + d + LANES) * weight);
        *lse = total[row] == 0 ? NONE : (largest[row] + std::log2(total[row])) * float(M_LN2);
    }
};

// Rows as float32: where they lie, or converted into `scratch`
static inline const float* floats(const float* from, Index, Index, Index row, float*, Index& stride) {
    stride = row;
    return from;
}
static inline const float* floats(
    const BFloat16* from, Index count, Index dim, Index row, float* scratch, Index& stride) {
    for (Index k = 0; k < count; k++)
        for (Index d = 0; d < dim; d += PANEL) {
            Vec a, b;
            take(from + k * row + d, a, b);
            put(scratch + k * dim + d, a, b);
        }
    stride = dim;
    return scratch;
}

// `count` keys as panels [dim, 16], the last one filled up with zeros
template <class T> static void pack(const T* from, Index count, Index dim, Index row, float* to) {
    for (Index start = 0; start < count; start += PANEL, to += dim * PANEL)
        for (Index k = 0; k < PANEL; k++)
            for (Index d = 0; d < dim; d += PANEL) {
                Vec a = {}, b = {};
                if (start + k < count) take(from + (start + k) * row + d, a, b);
                for (Index i = 0; i < LANES; i++) to[(d + i) * PANEL + k] = a[i], to[(d + LANES + i) * PANEL + k] = b[i];
            }
}

template <class T> static void scaled(const T* from, Index dim, float scale, float* to) {
    for (Index d = 0; d < dim; d += PANEL) {
        Vec a, b;
        take(from + d, a, b);
        put(to + d, a * scale, b * scale);
    }
}

template <class T> struct Prefill {
    const Call& c;
    std::vector<float> panels, values, far_panels, far_values, query, far_query, scores, numbers;
    Softmax state;

    explicit Prefill(const Call& call) : c(call) {
        query.resize(BLOCK_ROWS * c.dim);
        far_query.resize(BLOCK_ROWS * c.dim);
        scores.resize(BLOCK_ROWS * BLOCK_KEYS);
        numbers.resize(BLOCK_ROWS * (c.dim + 2));
        float* end = numbers.data() + BLOCK_ROWS * c.dim;
        state = {c.dim, numbers.data(), end, end + BLOCK_ROWS};
    }

    // Queries [begin, end) of every head that shares one key head
    void chunk(Index b, Index key_head, Index begin, Index end) {
        Index dim = c.dim, first = std::max(c.valid(b), c.offset() + begin - c.window + 1);
        Index stop = c.offset() + end, stride = 0, far_stride = 0;
        first = std::min(std::max<Index>(first, 0), stop);
        panels.resize((stop - first + PANEL) * dim);
        pack(row_of<T>(c.key, b, key_head, first), stop - first, dim, c.key.row, panels.data());
        if (sizeof(T) != sizeof(float)) values.resize((stop - first) * dim);
        const float* value = floats(
            row_of<T>(c.value, b, key_head, first), stop - first, dim, c.value.row, values.data(), stride);
        const float* far_value = nullptr;
        if (c.far_count) {
            far_panels.resize((c.far_count + PANEL) * dim);
            pack(row_of<T>(c.far_key, b, key_head, 0), c.far_count, dim, c.far_key.row, far_panels.data());
            if (sizeof(T) != sizeof(float)) far_values.resize(c.far_count * dim);
            far_value = floats(row_of<T>(c.far_value, b, key_head, 0), c.far_count, dim, c.far_value.row,
                               far_values.data(), far_stride);
        }
        for (Index head = key_head * c.group(); head < (key_head + 1) * c.group(); head++)
            for (Index row = begin; row < end; row += BLOCK_ROWS) {
                Index rows = std::min(BLOCK_ROWS, end - row);
                state.clear(BLOCK_ROWS);
                for (Index r = 0; r < rows; r++)
                    scaled(row_of<T>(c.query, b, head, row + r), dim, c.scale, query.data() + r * dim);
                std::fill(query.begin() + rows * dim, query.end(), 0.0f);
                if (c.far_count) far(b, head, row, rows, far_value, far_stride);
                window(first, c.offset() + row, rows, value, stride);
                for (Index r = 0; r < rows; r++)
                    state.finish(r, row_of<T>(c.out, b, head, row + r),
                                 c.lse + (b * c.heads + head) * c.queries + row + r);
            }
    }

    // Keys from `first` on against rows at positions `position + r`
    void window(Index first, Index position, Index rows, const float* value, Index stride) {
        Index oldest = std::max(first, position - c.window + 1), stop = position + rows;
        if (oldest >= stop) return;
        for (Index start = first + (oldest - first) / PANEL * PANEL; start < stop; start += BLOCK_KEYS) {
            Index last = std::min(start + BLOCK_KEYS, stop);
            auto visible = [&](Index low, Index high, Index& from, Index& to) {  // by rows [low, high], from start on
                from = std::max(std::max(first, position + low - c.window + 1) - start, Index(0));
                to = std::max(std::min(last, position + high + 1) - start, from);
            };
            Index from[BLOCK_ROWS / TILE_ROWS], to[BLOCK_ROWS / TILE_ROWS], tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
            for (Index t = 0; t < tiles; t++)
                visible(t * TILE_ROWS, std::min(rows, (t + 1) * TILE_ROWS) - 1, from[t], to[t]);
            for (Index j = 0; j < last - start; j += PANEL)
                for (Index t = 0; t < tiles; t++)
                    if (j < to[t] && j + PANEL > from[t])
                        tile<TILE_ROWS, 2>(query.data() + t * TILE_ROWS * c.dim, c.dim,
                                           panels.data() + (start - first + j) * c.dim, PANEL, c.dim,
                                           scores.data() + t * TILE_ROWS * BLOCK_KEYS + j, BLOCK_KEYS, false);
            for (Index r = 0; r < tiles * TILE_ROWS; r++) {
                Index t = r / TILE_ROWS, begin = 0, end = 0;
                if (r < rows) visible(r, r, begin, end);
                state.absorb(r, scores.data() + r * BLOCK_KEYS, from[t], begin, end, to[t]);
            }
            for (Index d = 0; d < c.dim; d += PANEL)
                for (Index t = 0; t < tiles; t++)
                    tile<TILE_ROWS, 2>(scores.data() + t * TILE_ROWS * BLOCK_KEYS + from[t], BLOCK_KEYS,
                                       value + (start - first + from[t]) * stride + d, stride, to[t] - from[t],
                                       state.out + t * TILE_ROWS * c.dim + d, c.dim, true);
        }
    }

    void far(Index b, Index head, Index row, Index rows, const float* value, Index stride) {
        const Index* places = c.far_of(b);
        Index position = c.offset() + row;
        if (position + rows - 1 - *std::min_element(places, places + c.far_count) < c.window) return;
        for (Index r = 0; r < rows; r++)
            scaled(row_of<T>(c.far_query, b, head, row + r), c.dim, c.scale, far_query.data() + r * c.dim);
        std::fill(far_query.begin() + rows * c.dim, far_query.end(), 0.0f);
        for (Index start = 0; start < c.far_count; start += BLOCK_KEYS) {
            Index count = std::min(BLOCK_KEYS, c.far_count - start);
            for (Index j = 0; j < count; j += PANEL)
                for (Index r = 0; r < rows; r += TILE_ROWS)
                    tile<TILE_ROWS, 2>(far_query.data() + r * c.dim, c.dim, far_panels.data() + (start + j) * c.dim,
                                       PANEL, c.dim, scores.data() + r * BLOCK_KEYS + j, BLOCK_KEYS, false);
            for (Index r = 0; r < rows; r++) {
                float* line = scores.data() + r * BLOCK_KEYS;
                for (Index j = 0; j < count; j++)
                    if (position + r - places[start + j] < c.window) line[j] = NONE;
                state.absorb(r, line, 0, 0, count, count);
            }
            multiply_rows(rows, scores.data(), BLOCK_KEYS, value + start * stride, stride, count, state.out, c.dim);
        }
    }
};

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
template <int R> static inline void dots(const float* rows, Index dim, const float* const* keys, float* to) {
    Vec sums[R][4];
    const float *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[r][i] = Vec{};
#pragma GCC unroll 2
    for (Index d = 0; d < dim; d += LANES) {
        Vec a = load(k0 + d), b = load(k1 + d), c = load(k2 + d), e = load(k3 + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            Vec x = load(rows + r * dim + d);
            sums[r][0] += x * a, sums[r][1] += x * b, sums[r][2] += x * c, sums[r][3] += x * e;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3], to + r * STAGE_ROW);
}

// Queries of one group against a share of the keys, read where they lie
template <class T> struct Decode {
    const Call& c;
    Index rows;  // group x queries: row r is query r % n of the group's head r / n
    std::vector<float> query, far_query, scores, keys, values;

    explicit Decode(const Call& call) : c(call), rows(call.group() * call.queries) {
        query.resize(rows * c.dim);
        far_query.resize(rows * c.dim);
        scores.resize(rows * STAGE_ROW);
        keys.resize(STEP_KEYS * c.dim);
        values.resize(STEP_KEYS * c.dim);
    }

    Index position(Index r) const { return c.offset() + r % c.queries; }

    // One row of float32 computes too little to hide requests behind: they took 10 % longer than none
    Ahead ahead(const T* next) const { return {rows == 1 && sizeof(T) == sizeof(float) ? nullptr : (const char*)next}; }

    void gather(const Rows& from, Index b, Index key_head, float* to) const {
        for (Index r = 0; r < rows; r++)
            scaled(row_of<T>(from, b, key_head * c.group() + r / c.queries, r % c.queries), c.dim, c.scale, to + r * c.dim);
    }

    // Scores of `count` keys, from score `first` on
    void multiply(const float* from, const float* key, Index stride, Index count, Index first, Ahead next) {
        for (Index j = 0; j < count; j += 4) {
            next.fetch(4 * c.dim * sizeof(T));
            const float* k[4];
            for (Index i = 0; i < 4; i++) k[i] = key + std::min(j + i, count - 1) * stride;
            for (Index r = 0; r < rows;) {
                Index left = rows - r, taken = left == 3 || left > 4 ? 3 : std::min<Index>(left, 2);
                float* to = scores.data() + r * STAGE_ROW + first + j;
                if (taken == 3) dots<3>(from + r * c.dim, c.dim, k, to);
                if (taken == 2) dots<2>(from + r * c.dim, c.dim, k, to);
                if (taken == 1) dots<1>(from + r * c.dim, c.dim, k, to);
                r += taken;
            }
        }
    }

    // Keys at positions [begin, end); with `far` the far keys as well
    void share(Index b, Index key_head, Index begin, Index end, bool far, Softmax& state) {
        Index key_stride = 0, value_stride = 0;
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
                const float* key = floats(row_of<T>(c.far_key, b, key_head, start), count, c.dim, c.far_key.row,
                                          keys.data(), key_stride);
                const float* value = floats(row_of<T>(c.far_value, b, key_head, start), count, c.dim,
                                            c.far_value.row, values.data(), value_stride);
                multiply(far_query.data(), key, key_stride, count, 0, first);
                for (Index r = 0; r < rows; r++) {
                    float* line = scores.data() + r * STAGE_ROW;
                    for (Index j = 0; j < count; j++)
                        if (position(r) - c.far_of(b)[start + j] < c.window) line[j] = NONE;
                    state.absorb(r, line, 0, 0, count, count);
                }
                multiply_rows(rows, scores.data(), STAGE_ROW, value, value_stride, count, state.out, c.dim);
            }
        }
        gather(c.query, b, key_head, query.data());
        for (Index start = std::max(begin, oldest); start < end;) {
            Index slot = slot_of(start);
            Index count = std::min(std::min(STAGE_KEYS, end - start), c.keys - slot);
            for (Index j = 0; j < count; j += STEP_KEYS) {
                Index some = std::min(STEP_KEYS, count - j);
                const float* key = floats(key_at(slot + j), some, c.dim, c.key.row, keys.data(), key_stride);
                bool last = j + some == count;
                Ahead next = ahead(last ? value_at(slot) : key_at(slot + j + some));
                multiply(query.data(), key, key_stride, some, j, next);
            }
            for (Index r = 0; r < rows; r++) {
                Index from = std::max(oldest, position(r) - c.window + 1) - start, to = position(r) + 1 - start;
                from = std::min(std::max<Index>(from, 0), count);
                state.absorb(r, scores.data() + r * STAGE_ROW, 0, from, std::min(to, count), count);
            }
            for (Index j = 0; j < count; j += STEP_KEYS) {
                Index some = std::min(STEP_KEYS, count - j);
                const float* value = floats(value_at(slot + j), some, c.dim, c.value.row, values.data(), value_stride);
                bool last = j + some == count;
                Ahead next = ahead(last ? key_at(slot_of(start + count)) : value_at(slot + j + some));
                multiply_rows(rows, scores.data() + j, STAGE_ROW, value, value_stride, some, state.out, c.dim, &next, sizeof(T));
            }
            start += count;
        }
    }
};

constexpr Index LINE = BLOCK_KEYS + PANEL;  // of a block's scores: the last tile of six keys may reach beyond the block, into zeros

// Scores are computed anew. Gradients of a chunk's keys and values are collected beside each other and then added to the
// whole: at most two chunks touch a key, so that the sum does not depend on their order.
struct Backward {
    const Call& c;
    const Gradients& g;
    std::vector<float> key_panels, value_panels, key_sums, value_sums, query, grad_out, grad_query, weights, scores;

    Backward(const Call& call, const Gradients& gradients) : c(call), g(gradients) {
        for (auto* rows : {&query, &grad_out, &grad_query}) rows->resize(BLOCK_ROWS * c.dim);
        for (auto* tiles : {&weights, &scores}) tiles->resize(BLOCK_ROWS * LINE);
    }

    void chunk(Index b, Index key_head, Index begin, Index end) {
        Index dim = c.dim, stop = c.offset() + end;
        Index first = std::max(c.valid(b), c.offset() + begin - c.window + 1);
        first = std::min(std::max<Index>(first, 0), stop);
        for (auto* panels : {&key_panels, &value_panels}) panels->resize((stop - first + PANEL) * dim);
        for (auto* sums : {&key_sums, &value_sums}) sums->assign((stop - first + PANEL) * dim, 0.0f);
        const float* key = row_of<float>(c.key, b, key_head, first);
        pack(key, stop - first, dim, c.key.row, key_panels.data());
        pack(row_of<float>(c.value, b, key_head, first), stop - first, dim, c.value.row, value_panels.data());
        for (Index head = key_head * c.group(); head < (key_head + 1) * c.group(); head++)
            for (Index row = begin; row < end; row += BLOCK_ROWS) {
                Index rows = std::min(BLOCK_ROWS, end - row), line = (b * c.heads + head) * c.queries + row;
                for (auto* block : {&query, &grad_out, &grad_query}) std::fill(block->begin(), block->end(), 0.0f);
                for (Index r = 0; r < rows; r++) {
                    scaled(row_of<float>(c.query, b, head, row + r), dim, c.scale, query.data() + r * dim);
                    scaled(row_of<float>(g.out, b, head, row + r), dim, 1, grad_out.data() + r * dim);
                }
                window(first, c.offset() + row, rows, key, g.shift + line, g.correction + line);
                for (Index r = 0; r < rows; r++)
                    scaled(grad_query.data() + r * dim, dim, c.scale * float(M_LN2), row_of<float>(g.query, b, head, row + r));
            }
#pragma omp critical
        for (Index k = 0; k < stop - first; k++) {
            float *to_key = row_of<float>(g.key, b, key_head, first + k), *to_value = row_of<float>(g.value, b, key_head, first + k);
            for (Index d = 0; d < dim; d += LANES) {
                store(to_key + d, load(to_key + d) + load(key_sums.data() + k * dim + d) * float(M_LN2));
                store(to_value + d, load(to_value + d) + load(value_sums.data() + k * dim + d));
            }
        }
    }

    // Keys from `first` on against rows at positions `position + r`
    void window(Index first, Index position, Index rows, const float* key, const float* shift, const float* correction) {
        Index dim = c.dim, oldest = std::max(first, position - c.window + 1), stop = position + rows;
        Index used = (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        if (oldest >= stop) return;
        for (Index start = first + (oldest - first) / PANEL * PANEL; start < stop; start += BLOCK_KEYS) {
            Index count = std::min(BLOCK_KEYS, stop - start), padded = (count + PANEL - 1) / PANEL * PANEL;
            const float* panels[] = {key_panels.data() + (start - first) * dim, value_panels.data() + (start - first) * dim};
            for (Index j = 0; j < padded; j += PANEL)
                for (Index r = 0; r < used; r += TILE_ROWS) {
                    Index to = r * LINE + j;
                    tile<TILE_ROWS, 2>(query.data() + r * dim, dim, panels[0] + j * dim, PANEL, dim, weights.data() + to, LINE, false);
                    tile<TILE_ROWS, 2>(grad_out.data() + r * dim, dim, panels[1] + j * dim, PANEL, dim, scores.data() + to, LINE, false);
                }
            for (Index r = 0; r < used; r++) {
                Index begin = 0, end = 0;
                if (r < rows) {
                    begin = std::max(std::max(first, position + r - c.window + 1) - start, Index(0));
                    end = std::max(std::min(count, position + r + 1 - start), begin);
                }
                absorb(weights.data() + r * LINE, scores.data() + r * LINE, std::min(begin, padded), std::min(end, padded), padded,
                       r < rows ? shift[r] * float(M_LOG2E) : 0, r < rows ? correction[r] : 0);
            }
            for (Index d = 0; d < dim; d += PANEL) {
                for (Index r = 0; r < used; r += TILE_ROWS)
                    tile<TILE_ROWS, 2>(scores.data() + r * LINE, LINE, key + (start - first) * c.key.row + d, c.key.row, count,
                                       grad_query.data() + r * dim + d, dim, true);
                for (Index j = 0; j < count; j += TILE_ROWS) {
                    Index to = (start - first + j) * dim + d;
                    tile<TILE_ROWS, 2, LINE>(scores.data() + j, 1, query.data() + d, dim, used, key_sums.data() + to, dim, true);
                    tile<TILE_ROWS, 2, LINE>(weights.data() + j, 1, grad_out.data() + d, dim, used, value_sums.data() + to, dim, true);
                }
            }
        }
    }

    // One row: scores become weights, gradients of weights those of scores; 0 outside of [begin, end)
    static void absorb(float* weights, float* scores, Index begin, Index end, Index count, float shift, float correction) {
        for (Index j = 0; j < count; j += LANES) {
            Vec weight = exp2(load(weights + j) - shift);
            store(weights + j, weight);
            store(scores + j, weight * (load(scores + j) - correction));
        }
        for (float* line : {weights, scores}) {
            std::fill(line, line + begin, 0.0f);
            std::fill(line + end, line + count + PANEL, 0.0f);
        }
    }
};

static void backward(const Call& c, const Gradients& g) {
    Index size = (std::max(LEAST_CHUNK, c.window) + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    Index heads = c.batch * c.key_heads, chunks = (c.queries + size - 1) / size;
#pragma omp parallel num_threads(c.threads)
    {
        Backward worker(c, g);
#pragma omp for schedule(dynamic, 1)
        for (Index item = 0; item < heads * chunks; item++) {
            Index begin = item % chunks * size, head = item / chunks;
            worker.chunk(head / c.key_heads, head % c.key_heads, begin, std::min(begin + size, c.queries));
        }
    }
}

template <class T> static void prefill(const Call& c) {
    Index size = std::max(LEAST_CHUNK, c.window), heads = c.batch * c.key_heads;
    if (c.threads > 1) {  // four pieces of work a thread, at the price of packing some keys more often
        Index wanted = (4 * c.threads + heads - 1) / heads;
        size = std::min(size, std::max(SMALLEST_CHUNK, (c.queries + wanted - 1) / wanted));
    }
    size = size / BLOCK_ROWS * BLOCK_ROWS;
    Index chunks = (c.queries + size - 1) / size;
#pragma omp parallel num_threads(c.threads)
    {
        Prefill<T> worker(c);
#pragma omp for schedule(dynamic, 1)
        for (Index item = 0; item < heads * chunks; item++) {
            Index begin = item % chunks * size, head = item / chunks;
            worker.chunk(head / c.key_heads, head % c.key_heads, begin, std::min(begin + size, c.queries));
        }
    }
}

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

extern "C" {
void prefill_float32(const Call* c) { prefill<float>(*c); }
void prefill_bfloat16(const Call* c) { prefill<BFloat16>(*c); }
void decode_float32(const Call* c) { decode<float>(*c); }
void decode_bfloat16(const Call* c) { decode<BFloat16>(*c); }
void backward_float32(const Call* c, const Gradients* g) { backward(*c, *g); }
}
