// Gradients of the window's part. Scores are computed anew. Gradients of a chunk's keys and values are collected beside
// each other and then added to the whole: at most two chunks touch a key, so that the sum does not depend on their order.
#pragma once

#include <cmath>
#include <vector>

#include "call.h"

constexpr Index LINE = BLOCK_KEYS + PANEL;  // of scores: the last tile of six keys may reach beyond the block, into zeros

struct Backward {
    const Call& c;
    const Gradients& g;
    std::vector<float> key_panels, value_panels, key_sums, value_sums, query, grad_out, grad_query, weights, scores;

    Backward(const Call& call, const Gradients& gradients) : c(call), g(gradients) {
        for (auto* rows : {&query, &grad_out, &grad_query}) rows->resize(BLOCK_ROWS * c.dim);
        for (auto* tiles : {&weights, &scores}) tiles->resize(BLOCK_ROWS * LINE);
    }

    void chunk(Index b, Index key_head, Index begin, Index end) {
        Index dim = c.dim, stop = c.offset() + end, first = c.first_key(b, begin, stop);
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
    for_chunks(c, size, [&] { return Backward(c, g); });
}
