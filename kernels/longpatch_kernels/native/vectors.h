// Eight numbers at a time, in vectors of any instruction set, and the products made of them.
#pragma once

#include <algorithm>
#include <cstdint>

using Index = int64_t;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
struct BFloat16 { uint16_t bits; };

constexpr Index LANES = 8, PANEL = 2 * LANES, TILE_ROWS = 6;
#ifdef __AVX512VL__
constexpr bool MANY_REGISTERS = true;  // 32 of them instead of 16
#else
constexpr bool MANY_REGISTERS = false;
#endif

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
// One vector's worth of memory
static inline void take(const float* p, Vec (&to)[1]) { to[0] = load(p); }
static inline void take(const BFloat16* p, Vec (&to)[2]) { take(p, to[0], to[1]); }
static inline WordVec rounded(Vec x) {  // to the nearest bfloat16, ties to even
    WordVec bits = (WordVec)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}
static inline void put(BFloat16* p, Vec a, Vec b) { *(WordVec*)p = (rounded(a) >> 16) | (rounded(b) & 0xffff0000u); }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // `b` where either is NaN

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
// that it comes while this is being computed; and into the second cache, for in the first it would displace this
struct Ahead {
    const char* data;  // null: the processor's own guess does as well

    void fetch(Index bytes) {
        if (!data) return;
        for (Index at = 0; at < bytes; at += 64) __builtin_prefetch(data + at, 0, 2);
        data += bytes;
    }
};

// C [M, 8 V] (+)= A [M, count] B [count, 8 V]; the numbers of a row of A lie `STEP` apart
template <int M, int V, Index STEP = 1, class T> static inline void tile(
    const float* a, Index a_row, const T* b, Index b_row, Index count, float* c, Index c_row, bool add,
    Ahead* ahead = nullptr) {
    static_assert(V % 2 == 0);
    Vec sums[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sums[m][v] = add ? load(c + m * c_row + v * LANES) : Vec{};
#pragma GCC unroll 2
    for (Index k = 0; k < count; k++) {
        if (ahead) ahead->fetch(V * LANES * sizeof(T));
        Vec right[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v += 2) take(b + k * b_row + v * LANES, right[v], right[v + 1]);
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
template <class T> static void multiply_rows(
    Index rows, const float* a, Index a_row, const T* b, Index b_row, Index count, float* c, Index dim,
    Ahead* ahead = nullptr) {
    for (Index r = 0; r < rows;) {
        Index left = rows - r, taken = left >= 6 ? 6 : left >= 4 ? 4 : left;
        const float* from = a + r * a_row;
        for (Index d = 0; d < dim;) {
            float* to = c + r * dim + d;
            Ahead* next = r ? nullptr : ahead;
            if (taken == 1 && dim - d >= 64) { tile<1, 8>(from, a_row, b + d, b_row, count, to, dim, true, next); d += 64; continue; }
            if (MANY_REGISTERS && taken == 4 && dim - d >= 32) { tile<4, 4>(from, a_row, b + d, b_row, count, to, dim, true, next); d += 32; continue; }
            if (taken == 6) tile<6, 2>(from, a_row, b + d, b_row, count, to, dim, true, next);
            if (taken == 4) tile<4, 2>(from, a_row, b + d, b_row, count, to, dim, true, next);
            if (taken == 3) tile<3, 2>(from, a_row, b + d, b_row, count, to, dim, true, next);
            if (taken == 2) tile<2, 2>(from, a_row, b + d, b_row, count, to, dim, true, next);
            if (taken == 1) tile<1, 2>(from, a_row, b + d, b_row, count, to, dim, true, next);
            d += PANEL;
        }
        r += taken;
    }
}

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
