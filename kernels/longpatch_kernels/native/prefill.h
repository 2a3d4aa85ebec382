// Many queries. The keys of a chunk of queries are packed into panels of 16, transposed; blocks of 48 query rows then walk
// their keys, and each 6 x 16 tile of either product stays in registers. Tiles that no row of theirs sees are not computed.
#pragma once

#include <vector>

#include "call.h"
#include "softmax.h"

constexpr Index SMALLEST_CHUNK = 5 * BLOCK_ROWS;  // where many threads share few heads

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
        Index dim = c.dim, stop = c.offset() + end, first = c.first_key(b, begin, stop), stride = 0, far_stride = 0;
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

template <class T> static void prefill(const Call& c) {
    Index size = std::max(LEAST_CHUNK, c.window), heads = c.batch * c.key_heads;
    if (c.threads > 1) {  // four pieces of work a thread, at the price of packing some keys more often
        Index wanted = (4 * c.threads + heads - 1) / heads;
        size = std::min(size, std::max(SMALLEST_CHUNK, (c.queries + wanted - 1) / wanted));
    }
    for_chunks(c, size / BLOCK_ROWS * BLOCK_ROWS, [&] { return Prefill<T>(c); });
}
